"""Prompts to token ids, each by itself.

T tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompt:
    """One prompt's token ids [1, T], and which tokens are its own: bool [T]."""

    ids_1T: torch.Tensor
    own_T: torch.Tensor


def prompt_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """Return every prompt by itself, so that nothing has to be padded.

    Tokens that the tokenizer adds, such as a beginning of text, are in every prompt and say
    nothing about it; they do not count as its own.
    """
    import torch

    prompts = []
    for text in texts:
        found = tokenizer(text, return_special_tokens_mask=True)
        own_T = torch.tensor(found["special_tokens_mask"]) == 0
        prompts.append(Prompt(torch.tensor([found["input_ids"]]), own_T))
    return prompts
