"""Documents out of files, in the order in which they are used."""

from __future__ import annotations

import codecs
import glob
import json
import random
from collections.abc import Iterator
from pathlib import Path

from moe_convert.data.rows import Document, document_of
from moe_convert.data.settings import Data
from moe_convert.data.tables import BYTES_PER_TOKEN, from_hub, with_datasets
from moe_convert.errors import UsageError

CHARS_PER_TOKEN = 4


def read_documents(data: Data) -> list[Document]:
    """Return the documents in the order in which they are used.

    Raises:
        UsageError: a file is missing, empty or broken.
        MissingDependencyError: it needs the `datasets` package.
        HubError: the data set cannot be had from the Hub.
    """
    hub = data.hub
    if hub is not None:
        return list(from_hub(hub, data))
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
            yield from with_datasets("parquet", limit_bytes, data, data_files=str(path))
    except OSError as error:
        raise UsageError(f"Cannot read {path.name}: {error.strerror}.") from error


def _plain_text(path: Path, limit_bytes: int, size: int, data: Data) -> Iterator[Document]:
    with path.open("rb") as file:
        block = file.read(min(limit_bytes, size))
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
                yield document_of(row, f"{path.name} line {number}", data)
