"""Text to token ids: the one reader of data sets.

B rows · T tokens
"""

from __future__ import annotations

import codecs
import glob
import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from moe_convert.errors import HubError, MissingDependencyError, UsageError
from moe_convert.streams import sample_ids

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

BYTES_PER_TOKEN = 64
"""What is read at most for every wanted token, several times what a token holds: room to choose."""
CHARS_PER_TOKEN = 4
MIN_TOKENS = 16
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
SHUFFLE_BUFFER = 1000


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
        None, description="a file, a glob, org/name or {hub: …}; null: a short built-in text"
    )
    format: Literal["auto", "txt", "jsonl", "parquet"] = "auto"
    text_field: str = Field("text", description="where JSON lines or tables keep the text")
    messages_field: str | None = Field(None, description="chats, through the chat template")
    seq_len: int = Field(1024, ge=MIN_TOKENS, description="tokens of one row")
    max_tokens: int = Field(16_384, ge=MIN_TOKENS, description="tokens in all")
    shuffle_seed: int | None = Field(0, ge=0)

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
        return self.hub.hub if self.hub else Path(str(self.train)).name

    @property
    def public(self) -> Data:
        """The same without local folders."""
        if not isinstance(self.train, str) or self.hub:
            return self
        return self.model_copy(update={"train": Path(self.train).name})


@dataclass(frozen=True)
class Document:
    """A text or a chat, and whether the next one has nothing to do with it."""

    content: str | list[dict[str, Any]]
    ends: bool = True


def token_ids(data: Data, folder: Path | None, vocab_size: int) -> torch.Tensor:
    """Return int64 [B, T]: whole rows, or one shorter row if the text is shorter than that.

    Every row begins as the tokenizer begins a text, and an end-of-text token parts documents.

    Raises:
        UsageError: the data cannot be read, is too short, or there is no tokenizer.
        MissingDependencyError: it needs the `datasets` package.
        HubError: the data set cannot be had from the Hub.
    """
    if data.train is None:
        return sample_ids(folder, vocab_size)
    tokenizer = tokenizer_of(folder, "data.train")
    return pack(read_documents(data), tokenizer, data, vocab_size)


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

    prefix, tokens = _prefix(tokenizer), list[int]()
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
    if int(ids_BT.max()) >= vocab_size:
        raise UsageError(
            f"The tokenizer makes token {int(ids_BT.max())}, and the model knows {vocab_size}.",
            "The source's tokenizer belongs to another model.",
        )
    return ids_BT


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


def _prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
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


def read_documents(data: Data) -> list[Document]:
    """Return the documents in the order in which they are used.

    Raises:
        UsageError: a file is missing, empty or broken.
        MissingDependencyError: it needs the `datasets` package.
        HubError: the data set cannot be had from the Hub.
    """
    hub = data.hub
    if hub is not None:
        return list(_from_hub(hub, data))
    files = find_files(data)
    sizes = [_size(path) for path in files]
    limit_bytes = data.max_tokens * BYTES_PER_TOKEN
    documents: list[Document] = []
    for path, size in zip(files, sizes, strict=True):
        documents += _from_file(path, limit_bytes * size // sum(sizes) or 1, size, data)
    if not documents:
        raise UsageError(f"{data.name} holds no text.", "Give a file with text in it.")
    if data.shuffle_seed is not None:
        random.Random(data.shuffle_seed).shuffle(documents)  # noqa: S311
    return documents


def find_files(data: Data) -> list[Path]:
    """Return the files that a path or glob names, in the order of their names.

    Raises:
        UsageError: there is none, or its format is not known.
    """
    assert isinstance(data.train, str)
    path = Path(data.train).expanduser()
    if path.is_dir():
        raise UsageError(f"{path} is a folder.", f"Write a glob, for example {path}/*.txt.")
    matching = glob.glob(str(path), recursive=True)  # noqa: PTH207
    found = [path] if path.exists() else [Path(name) for name in matching]
    files = sorted(file for file in found if file.is_file())
    if not files:
        raise UsageError(f"There is no file {data.train} to read text from.", "Check the path.")
    for file in files:
        _format(file, data)
    return files


def _format(path: Path, data: Data) -> str:
    kind = path.suffix.removeprefix(".").lower() if data.format == "auto" else data.format
    if kind not in {"txt", "jsonl", "parquet"}:
        raise UsageError(
            f"The name {path.name} does not tell its format.",
            "Use a .txt, .jsonl or .parquet file, or set data.format.",
        )
    return kind


def _size(path: Path) -> int:
    size = path.stat().st_size
    if not size:
        raise UsageError(f"{path.name} is empty.", "Give a file with text in it.")
    return size


def _from_file(path: Path, limit_bytes: int, size: int, data: Data) -> Iterator[Document]:
    kind = _format(path, data)
    try:
        if kind == "txt":
            yield from _plain_text(path, limit_bytes, size, data)
        elif kind == "jsonl":
            yield from _json_lines(path, limit_bytes, data)
        else:
            yield from _with_datasets("parquet", limit_bytes, data, data_files=str(path))
    except OSError as error:
        raise UsageError(f"Cannot read {path.name}: {error.strerror}.") from error


def _plain_text(path: Path, limit_bytes: int, size: int, data: Data) -> Iterator[Document]:
    with path.open("rb") as file:
        block = file.read(limit_bytes)
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        text = decoder.decode(block, final=len(block) == size).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise _not_utf8(path, error.start) from error
    if not text.strip():
        return
    start, width = 0, CHARS_PER_TOKEN * data.seq_len
    while start < len(text):
        stop = len(text)
        if start + width < len(text):
            line = text.rfind("\n", start, start + width) + 1
            stop = line or text.rfind(" ", start, start + width) + 1 or start + width
        yield Document(text[start:stop], ends=data.shuffle_seed is not None or stop == len(text))
        start = stop


def _not_utf8(path: Path, byte: int) -> UsageError:
    return UsageError(f"{path.name} is not UTF-8: byte {byte} cannot be decoded.", "Convert it.")


def _json_lines(path: Path, limit_bytes: int, data: Data) -> Iterator[Document]:
    offset = number = 0
    with path.open("rb") as file:
        while offset < limit_bytes and (line := file.readline()):
            number += 1
            try:
                text = line.decode("utf-8").removeprefix("\ufeff").strip()
                row = json.loads(text) if text else None
            except UnicodeDecodeError as error:
                raise _not_utf8(path, offset + error.start) from error
            except ValueError as error:
                reason = getattr(error, "msg", error)
                raise UsageError(
                    f"{path.name} line {number} is not valid JSON: {reason}."
                ) from error
            offset += len(line)
            if text:
                yield _document(row, f"{path.name} line {number}", data)


def _document(row: object, place: str, data: Data) -> Document:
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


def _from_hub(source: HubDataset, data: Data) -> Iterator[Document]:
    limit_bytes = data.max_tokens * BYTES_PER_TOKEN
    options = {"name": source.config, "revision": source.revision, "split": source.split}
    yield from _with_datasets(source.hub, limit_bytes, data, **options)


def _with_datasets(path: str, limit_bytes: int, data: Data, **options: Any) -> Iterator[Document]:
    datasets = require_datasets(data.name)
    try:
        rows = datasets.load_dataset(path, streaming=True, **{"split": "train", **options})
        if data.shuffle_seed is not None:
            rows = rows.shuffle(seed=data.shuffle_seed, buffer_size=SHUFFLE_BUFFER)
        read_bytes = 0
        for number, row in enumerate(rows, 1):
            document = _document(dict(row), f"{data.name} row {number}", data)
            yield document
            read_bytes += len(str(document.content))
            if read_bytes >= limit_bytes:
                return
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        kind = HubError if data.hub else UsageError
        raise kind(f"Cannot read the data set {data.name}: {reason}.") from error


def require_datasets(what: str) -> Any:
    """Return the `datasets` package.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingDependencyError(
            f"Reading {what} needs the datasets package.", "pip install 'moe-convert[train]'"
        ) from error
    return datasets


def check_data(data: Data) -> None:
    """Refuse text that cannot be read; a Hub data set is only checked for what reading it needs.

    Raises:
        UsageError: a file is missing, empty or broken.
        MissingDependencyError: the `datasets` package is missing.
    """
    if data.hub is not None:
        require_datasets(data.hub.hub)
    elif data.train is not None:
        read_documents(data)
