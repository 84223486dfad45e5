"""Tables and Hub data sets, with the `datasets` package."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moe_convert.data.rows import Document, document_of
from moe_convert.data.settings import Data, HubDataset
from moe_convert.errors import HubError, MissingDependencyError, UsageError

BYTES_PER_TOKEN = 64
"""What is read at most for every wanted token, several times what a token holds: room to choose."""
SHUFFLE_BUFFER = 1000


def from_hub(source: HubDataset, data: Data) -> Iterator[Document]:
    """Yield the documents of a Hub data set; see `with_datasets`."""
    limit_bytes = data.max_tokens * BYTES_PER_TOKEN
    options = {"name": source.config, "revision": source.revision, "split": source.split}
    yield from with_datasets(source.hub, limit_bytes, data, **options)


def with_datasets(path: str, limit_bytes: int, data: Data, **options: Any) -> Iterator[Document]:
    """Yield documents that the `datasets` package reads, until they hold enough text.

    Raises:
        MissingDependencyError: the package is not installed.
        UsageError: the file cannot be read.
        HubError: the data set cannot be had from the Hub.
    """
    datasets = require_datasets(data.name)
    try:
        rows = datasets.load_dataset(path, streaming=True, **{"split": "train", **options})
        if data.shuffle_seed is not None:
            rows = rows.shuffle(seed=data.shuffle_seed, buffer_size=SHUFFLE_BUFFER)
        read_bytes = 0
        for number, row in enumerate(rows, 1):
            document = document_of(dict(row), f"{data.name} row {number}", data)
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
