"""Where hidden states of all tokens live: on the device, or in files that nobody else sees.

T tokens · D hidden size
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moe_convert.errors import DoesNotFitError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Room:
    """Gives room for states: on `device`, or on the host, mapped from files in `folder`.

    A file has no name any more once it is mapped, so that nothing is left behind, however the run
    ends; its blocks go back to the disk with the tensor. The values are the same in either place.
    """

    device: str
    folder: Path | None = None

    def empty(self, num_tokens: int, num_dims: int) -> torch.Tensor:
        """Return room for states, fp32 [T, D], with any values.

        Raises:
            DoesNotFitError: the disk has too little.
        """
        import torch

        if self.folder is None:
            return torch.empty(num_tokens, num_dims, device=self.device)
        num_bytes = 4 * num_tokens * num_dims
        with tempfile.NamedTemporaryFile(prefix=".moe-convert-", dir=self.folder) as file:
            try:
                _reserve(file.fileno(), num_bytes)
            except OSError as error:
                raise DoesNotFitError(
                    f"{self.folder} has no room for {num_bytes / 1e9:.3g} GB of hidden states: "
                    f"{error.strerror}.",
                    "Give another folder as --offload-dir, or fewer tokens.",
                ) from error
            mapped_N = torch.from_file(file.name, shared=True, size=num_bytes // 4)
        return mapped_N.view(num_tokens, num_dims)


def _reserve(file: int, num_bytes: int) -> None:
    """Give a file its size, and its blocks where the system can."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, num_bytes)
    else:
        os.ftruncate(file, num_bytes)
