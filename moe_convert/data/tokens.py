"""From the data section of a recipe to token ids.

B rows · T tokens
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from moe_convert.data.checks import check_varied
from moe_convert.data.packing import pack, prefix_of, tokenizer_of
from moe_convert.data.reading import read_documents
from moe_convert.data.settings import Data
from moe_convert.errors import UsageError
from moe_convert.streams import sample_ids

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

Writer = Callable[[int, int, int, "torch.Tensor | None"], "torch.Tensor"]
"""Writes rows of so many tokens with a seed, continuing pieces of a text [N]: int64 [B, T]."""


def token_ids(
    data: Data, folder: Path | None, vocab_size: int, writer: Writer | None = None
) -> torch.Tensor:
    """Return int64 [B, T]: whole rows, or one shorter row if the text is shorter than that.

    Every row begins as the tokenizer begins a text, and an end-of-text token parts documents.
    `writer` writes the text of `data.train: self` and `self:TEXT`.

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
        text_N = _continued(data.continued, folder, vocab_size)
        return writer(data.max_tokens // width, width, data.shuffle_seed or 0, text_N)
    return _read(data, tokenizer_of(folder, "data.train"), vocab_size)


def _read(data: Data, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> torch.Tensor:
    ids_BT = pack(read_documents(data), tokenizer, data, vocab_size)
    check_varied(ids_BT, data.name)
    return ids_BT


def _continued(data: Data | None, folder: Path | None, vocab_size: int) -> torch.Tensor | None:
    """Return the tokens of a text one after the other, int64 [N], without what begins a row."""
    if data is None:
        return None
    tokenizer = tokenizer_of(folder, "data.train self:TEXT")
    begins = len(prefix_of(tokenizer))
    return _read(data, tokenizer, vocab_size)[:, begins:].flatten()


def unwritten(
    rows: int, seq_len: int, seed: int, text_N: torch.Tensor | None = None
) -> torch.Tensor:
    """Return rows of zeros: a writer for plans, which only ask how much there will be."""
    import torch

    return torch.zeros(rows, seq_len, dtype=torch.long)
