"""From the data section of a recipe to token ids.

B rows · T tokens
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from moe_convert.data.checks import check_varied
from moe_convert.data.packing import pack, tokenizer_of
from moe_convert.data.reading import read_documents
from moe_convert.data.settings import Data
from moe_convert.errors import UsageError
from moe_convert.streams import sample_ids

if TYPE_CHECKING:
    import torch

Writer = Callable[[int, int, int], "torch.Tensor"]
"""Writes rows of so many tokens with a seed: int64 [B, T]."""


def token_ids(
    data: Data, folder: Path | None, vocab_size: int, writer: Writer | None = None
) -> torch.Tensor:
    """Return int64 [B, T]: whole rows, or one shorter row if the text is shorter than that.

    Every row begins as the tokenizer begins a text, and an end-of-text token parts documents.
    `writer` writes the text of `data.train: self`.

    Raises:
        UsageError: the data cannot be read, is too short, or there is no tokenizer.
        MissingDependencyError: it needs the `datasets` package.
        HubError: the data set cannot be had from the Hub.
    """
    if data.train is None:
        return sample_ids(folder, vocab_size)
    if data.is_self:
        if writer is None:
            raise UsageError("Nobody writes the text of --data self here.", "Give text instead.")
        width = min(data.seq_len, data.max_tokens)
        return writer(data.max_tokens // width, width, data.shuffle_seed or 0)
    tokenizer = tokenizer_of(folder, "data.train")
    ids_BT = pack(read_documents(data), tokenizer, data, vocab_size)
    check_varied(ids_BT, data.name)
    return ids_BT


def unwritten(rows: int, seq_len: int, seed: int) -> torch.Tensor:
    """Return rows of zeros: a writer for plans, which only ask how much there will be."""
    import torch

    return torch.zeros(rows, seq_len, dtype=torch.long)
