"""How a text that the source writes begins, and what follows where one of its texts ends.

A document begins as the tokenizer begins a text, or behind a document separator. A chat begins with
what the chat template puts before the first user's words; the model writes user and assistant in
turn, and the template's words between them are put in. Pieces of a given text are continued behind
what begins a document.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_convert.data.packing import prefix_of

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
"""What models learn to find between documents, where the tokenizer puts nothing before a text."""

PROMPTS = (
    "The", "In", "It was", "She said", "How to", "Why do", "What is", "A short history of",
    "Question:", "Dear", "# ", "1.", "def ", "import ", "#include", "<html>", "function ",
    "SELECT ", "Let x be", "Theorem", "Solve:", "Abstract", "Chapter 1", "Once upon a time",
    "User: ", "Ingredients:", "News:", "Le ", "Der ", "El ", "On the", "According to",
)  # fmt: skip
"""Beginnings that say little, for models without a chat template."""

PIECE = 32
"""Tokens of a text that are continued."""

ROLES = ("user", "assistant", "user")
MARKS = ("First7words", "Second8words", "Third9words")
"""Words that stand for a message while the template's own words around them are looked for."""


@dataclass(frozen=True)
class Start:
    """The first tokens of a text, and those between a chat's messages, in turn."""

    first: tuple[int, ...]
    turns: tuple[tuple[int, ...], ...] = ()

    def after(self, end: int, number: int) -> tuple[tuple[int, ...], int]:
        """Return what follows the `number`-th end, token `end`, and the number of the next end.

        Where the message was meant to end the next one follows, otherwise a new text.
        """
        turn = self.turns[number % len(self.turns)] if self.turns else ()
        if end in turn:
            return turn[turn.index(end) + 1 :], number + 1
        return self.first[1:] if self.first[0] == end else self.first, 0


def document_start(tokenizer: PreTrainedTokenizerBase | None, bos: int | None) -> Start:
    """Return how a document begins; `bos` is the config's token, which may be missing."""
    if tokenizer is None:
        return Start((bos or 0,))
    if prefix := prefix_of(tokenizer):
        return Start(tuple(prefix))
    added = tokenizer.get_added_vocab()
    known = (*map(added.get, SEPARATORS), tokenizer.eos_token_id, tokenizer.bos_token_id, bos, 0)
    return Start((next(token for token in known if token is not None),))


def chat_starts(tokenizer: PreTrainedTokenizerBase) -> list[Start]:
    """Return how chats begin: through the chat template, or else the neutral prompts."""
    parts = _template_parts(tokenizer)
    if parts is not None:
        first, *turns = (tuple(_ids(tokenizer, part)) for part in parts)
        return [Start(first, tuple(turns))]
    before = document_start(tokenizer, None).first
    return [Start((*before, *_ids(tokenizer, prompt))) for prompt in PROMPTS]


def continuations(
    text_N: torch.Tensor,
    before: tuple[int, ...],
    number: int,
    width: int,
    generator: torch.Generator,
) -> list[Start]:
    """Return so many starts that are pieces of a text, int64 [N], from random places of it.

    They are at most half of the `width` of what is written. Where a text ends before that, its
    piece begins the next one too.
    """
    import torch

    length = min(PIECE, width // 2, len(text_N))
    places = torch.randint(len(text_N) - length + 1, (number,), generator=generator).tolist()
    return [Start((*before, *text_N[place : place + length].tolist())) for place in places]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _template_parts(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, str] | None:
    """Return the template's words before the user's, the assistant's and the next user's."""
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        return None
    chat = [{"role": r, "content": c} for r, c in zip(ROLES, MARKS, strict=True)]
    try:
        text = str(tokenizer.apply_chat_template(chat, tokenize=False))
    except (TemplateError, TypeError, KeyError, ValueError):
        return None
    places = [text.find(mark) for mark in MARKS]
    if places != sorted(places) or places[0] < 1:
        return None
    ends = [place + len(mark) for place, mark in zip(places, MARKS, strict=True)]
    between = text[ends[0] : places[1]], text[ends[1] : places[2]]
    return (text[: places[0]], *between) if all(between) else None


def end_tokens(tokenizer: PreTrainedTokenizerBase | None, *configs: Any) -> frozenset[int]:
    """Return every token that ends a text or a message, as tokenizer and configs say."""
    found: set[int | None] = set()
    for holder in (tokenizer, *configs):
        ends = getattr(holder, "eos_token_id", None)
        found |= set(ends) if isinstance(ends, Iterable) else {ends}
    return frozenset(token for token in found if token is not None)
