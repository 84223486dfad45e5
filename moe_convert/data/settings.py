"""The data section of the recipe: which text, and how much of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

MIN_TOKENS = 16
SELF = "self"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


class HubDataset(BaseModel):
    """A data set on the Hub, read with the `datasets` package."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    hub: str = Field(description="org/name")
    config: str | None = None
    split: str = "train"
    revision: str | None = None


class Data(BaseModel):
    """The text that measurements and initialisers see.

    Files longer than needed are read from their beginnings, each in proportion to its size. With a
    `shuffle_seed` documents (lines of JSON, pieces of plain text) come in random order; null keeps
    the order of the files and takes plain text as it runs.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    train: str | HubDataset | None = Field(
        None,
        description="self (the dense source writes it), self:TEXT (and continues pieces of a "
        "file, a glob or org/name), a file, a glob, org/name or {hub: …}; null: a short built-in "
        "text",
    )
    format: Literal["auto", "txt", "jsonl", "parquet"] = "auto"
    text_field: str = Field("text", description="where JSON lines or tables keep the text")
    messages_field: str | None = Field(None, description="chats, through the chat template")
    seq_len: int = Field(1024, ge=MIN_TOKENS, description="tokens of one row")
    max_tokens: int = Field(16_384, ge=MIN_TOKENS, description="tokens in all")
    shuffle_seed: int | None = Field(0, ge=0, description="also decides what `self` writes")

    @property
    def is_self(self) -> bool:
        """Whether the dense source writes the text; a file of that name is `./self`."""
        return isinstance(self.train, str) and self.train.partition(":")[0] == SELF

    @property
    def continued(self) -> Data | None:
        """The text of which `self:TEXT` continues pieces, as data of its own."""
        if not self.is_self or self.train == SELF:
            return None
        return self.model_copy(update={"train": str(self.train).partition(":")[2]})

    @field_validator("train")
    @classmethod
    def _continues_something(cls, value: str | HubDataset | None) -> str | HubDataset | None:
        kind, mark, text = value.partition(":") if isinstance(value, str) else ("", "", "")
        if kind == SELF and mark and (not text or text.partition(":")[0] == SELF):
            raise ValueError(f"{value!r} names no text to continue; write self:FILE or self")
        return value

    @property
    def given(self) -> Data:
        """What is read: the text of `self:TEXT`, or else this."""
        return self.continued or self

    @property
    def hub(self) -> HubDataset | None:
        """The Hub data set, which `org/name[@revision]` names too if there is no such path."""
        if isinstance(self.train, HubDataset) or self.train is None:
            return self.train
        if Path(self.train).expanduser().exists() or not HUB_NAME.fullmatch(self.train):
            return None
        if Path(self.train).suffix.removeprefix(".") in {"txt", "jsonl", "parquet"}:
            return None
        name, _, revision = self.train.partition("@")
        return HubDataset(hub=name, revision=revision or None)

    @property
    def name(self) -> str:
        """What reports call it."""
        if self.train is None:
            return "built-in sample"
        if self.continued is not None:
            return f"{SELF}:{self.continued.name}"
        return self.hub.hub if self.hub else Path(str(self.train)).name

    def placed(self, path: str) -> Data:
        """Return the same with its text at a path, which is still continued if it was."""
        again = self.continued is not None and not path.startswith(f"{SELF}:")
        return self.model_copy(update={"train": f"{SELF}:{path}" if again else path})

    @property
    def public(self) -> Data:
        """The same without local folders."""
        if not isinstance(self.train, str) or self.hub:
            return self
        if self.continued is not None:
            return self.model_copy(update={"train": f"{SELF}:{self.continued.public.train}"})
        return self.model_copy(update={"train": Path(self.train).name})
