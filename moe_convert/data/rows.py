"""One document: a text or a chat, out of one row of JSON or of a table."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moe_convert.data.settings import Data
from moe_convert.errors import UsageError


@dataclass(frozen=True)
class Document:
    """A text or a chat, and whether the next one has nothing to do with it."""

    content: str | list[dict[str, Any]]
    ends: bool = True


def document_of(row: object, place: str, data: Data) -> Document:
    """Return one row's text or chat.

    Raises:
        UsageError: the field is missing or holds something else.
    """
    field = data.messages_field or data.text_field
    option = "data.messages_field" if data.messages_field else "--text-field"
    if not isinstance(row, dict):
        raise UsageError(f"{place} is no JSON object.", f'Write {{"{field}": …}} on each line.')
    if field not in row:
        fields = ", ".join(map(str, row)) or "none"
        raise UsageError(f"{place} has no field {field!r}; it has {fields}.", f"Set {option}.")
    content = row[field]
    if data.messages_field:
        if not _is_chat(content):
            raise UsageError(f"{place}: field {field!r} is no list of messages.", f"Set {option}.")
        return Document(list(content))
    if not isinstance(content, str):
        raise UsageError(
            f"{place}: field {field!r} holds {type(content).__name__}, expected text.",
            f"Set {option}.",
        )
    if not content.isascii() and re.search("[\ud800-\udfff]", content):
        raise UsageError(f"{place}: field {field!r} holds half of a surrogate pair.", "Repair it.")
    return Document(content)


def _is_chat(content: object) -> bool:
    return (
        isinstance(content, Sequence)
        and not isinstance(content, str)
        and len(content) > 0
        and all(isinstance(message, dict) for message in content)
    )
