"""Token ids in rows: documents one after the other, parted by an end-of-text token.

B rows · T tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_convert.data.rows import Document
from moe_convert.data.settings import MIN_TOKENS, Data
from moe_convert.errors import UsageError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


def tokenizer_of(folder: Path | None, what: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer in a folder, which `what` needs.

    Raises:
        UsageError: there is none.
    """
    from transformers import AutoTokenizer

    try:
        if folder is None:
            raise OSError
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"The source has no tokenizer, and {what} needs one.") from error


def pack(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    vocab_size: int,
) -> torch.Tensor:
    """Return the documents' tokens in rows, int64 [B, T]; see `token_ids`.

    Raises:
        UsageError: too few tokens, or one that the model does not know.
    """
    import torch

    prefix, tokens = prefix_of(tokenizer), list[int]()
    for document in documents:
        tokens += _encode(document, tokenizer, data)
        if len(tokens) >= data.max_tokens:
            break
    if len(prefix) + len(tokens) < MIN_TOKENS:
        raise UsageError(
            f"{data.name} holds {len(tokens)} tokens, and at least {MIN_TOKENS} are needed.",
            "Give more text.",
        )
    width = min(data.seq_len, data.max_tokens, len(prefix) + len(tokens)) - len(prefix)
    num_rows = min(len(tokens) // width, max(1, data.max_tokens // (width + len(prefix))))
    rows = [prefix + tokens[row * width : (row + 1) * width] for row in range(num_rows)]
    ids_BT = torch.tensor(rows)
    check_known(int(ids_BT.max()), vocab_size)
    return ids_BT


def check_known(largest: int, vocab_size: int) -> None:
    """Refuse tokens that the model has no embedding of.

    Raises:
        UsageError: the largest one is not in the model's vocabulary.
    """
    if largest >= vocab_size:
        raise UsageError(
            f"The tokenizer makes token {largest}, and the model knows {vocab_size}.",
            "The source's tokenizer belongs to another model.",
        )


def prefix_of(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens with which the tokenizer begins every text."""
    found = tokenizer("a", return_special_tokens_mask=True)
    length = found["special_tokens_mask"].index(0)
    prefix: list[int] = found["input_ids"][:length]
    return prefix


def _encode(document: Document, tokenizer: PreTrainedTokenizerBase, data: Data) -> list[int]:
    if isinstance(document.content, str):
        text, end = document.content, [tokenizer.eos_token_id] if document.ends else []
    else:
        text, end = _chat(document.content, tokenizer, data), []
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids + [token for token in end if token is not None]


def _chat(messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, data: Data) -> str:
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise UsageError(
            "The source has no chat template, and data.messages_field needs one.",
            "Use data.text_field.",
        )
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (TemplateError, TypeError, KeyError) as error:
        raise UsageError(
            f"The chat template cannot render field {data.messages_field!r}: {error}."
        ) from error
