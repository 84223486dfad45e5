"""What data must be like before anything is made of it.

B rows · T tokens
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_convert.data.reading import read_documents
from moe_convert.data.settings import Data
from moe_convert.data.tables import require_datasets
from moe_convert.errors import UsageError

if TYPE_CHECKING:
    import torch

MAX_SHARE = 0.95
"""Of one token: text that is read as one token again and again has at most a few others."""


def check_data(data: Data) -> None:
    """Refuse text that cannot be read; a Hub data set is only checked for what reading it needs.

    Raises:
        UsageError: a file is missing, empty or broken.
        MissingDependencyError: the `datasets` package is missing.
    """
    data = data.given
    if data.hub is not None:
        require_datasets(data.hub.hub)
    elif data.train is not None and not data.is_self:
        read_documents(data)


def check_varied(ids_BT: torch.Tensor, name: str) -> None:
    """Refuse token ids of which nearly all are the same one: every token would look alike.

    Raises:
        UsageError: they are.
    """
    values, counts = ids_BT.unique(return_counts=True)
    share = float(counts.max()) / ids_BT.numel()
    if share > MAX_SHARE:
        token = int(values[counts.argmax()])
        raise UsageError(
            f"{name} is one token repeated: {share:.0%} of its {ids_BT.numel()} tokens are number "
            f"{token}.",
            "Give text like the model's later input with --data.",
        )
