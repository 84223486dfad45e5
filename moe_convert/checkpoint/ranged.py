"""Tensors of a Hub repository read over HTTP by range: nothing of them ever lies on a disk here.

The tensors of one layer stay in memory, because every expert asks for them again; larger ones,
such as the embedding, go through in pieces.
"""

from __future__ import annotations

import itertools
import json
import re
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from moe_convert.checkpoint.safetensors import (
    MAX_HEADER_BYTES,
    TensorRef,
    holds_nonfinite,
    parse_header,
)
from moe_convert.errors import HubError, SourceError
from moe_convert.ffn import torch_dtype

if TYPE_CHECKING:
    import torch

HEAD_BYTES = 100_000
"""What is asked for first of a file: most headers are shorter."""
CHUNK_BYTES = 1 << 24
PARALLEL = 4
"""Chunks that are asked for at once."""
PAGE_BYTES = 1 << 18
"""What is read around a few rows of a tensor that is not held: its neighbours often follow."""


def network_errors() -> tuple[type[Exception], ...]:
    """Return what the client library raises where the Hub fails or cannot be reached.

    The Hub's own errors are based on those of an HTTP library whose name differs by release.
    """
    from huggingface_hub.errors import HfHubHTTPError

    bases = (base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception))
    return (OSError, *bases)


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository at one commit."""

    repo_id: str
    name: str
    sha: str
    size_bytes: int
    token: str | bool | None = field(default=None, compare=False, repr=False)

    def read(self, start: int, stop: int) -> bytes:
        """Return these bytes; failures of the network and of the server are tried again.

        Raises:
            HubError: it still fails, or the Hub refuses.
        """
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import (  # type: ignore[attr-defined]
            build_hf_headers,
            hf_raise_for_status,
            http_backoff,
        )

        if start == stop:
            return b""
        wanted = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        try:
            response = http_backoff(
                "GET",
                hf_hub_url(self.repo_id, self.name, revision=self.sha, endpoint=constants.ENDPOINT),
                headers={**build_hf_headers(token=self.token), **wanted},
                timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
                follow_redirects=True,
            )
            hf_raise_for_status(response)
        except network_errors() as error:
            raise HubError(
                f"{self.name} of {self.repo_id} cannot be read any further: "
                f"{' '.join(str(error).split())[:200]}",
                "Run the same command again: it goes on where it stopped.",
            ) from None
        data: bytes = response.content
        if len(data) != stop - start:
            raise HubError(
                f"The Hub sent {len(data)} bytes of {self.name} where {stop - start} were asked "
                "for.",
                "Leave --no-download out.",
            )
        return data

    def chunks(self, start: int, stop: int) -> Iterator[bytes]:
        """Yield these bytes in order, a few chunks read at once."""
        cuts = [*range(start, stop, CHUNK_BYTES), stop]
        spans = list(itertools.pairwise(cuts))
        with ThreadPoolExecutor(PARALLEL) as pool:
            for first in range(0, len(spans), PARALLEL):
                yield from pool.map(lambda span: self.read(*span), spans[first : first + PARALLEL])


class Held:
    """The bytes that were read last, up to a limit, and which tensors turned out not to be finite.

    Not safe for several threads: a conversion reads in one.
    """

    def __init__(self, limit_bytes: int) -> None:
        """Begin with nothing."""
        self.limit_bytes = limit_bytes
        self.nonfinite: set[tuple[str, int]] = set()
        self._parts: OrderedDict[tuple[str, int, int], bytes] = OrderedDict()

    def get(self, key: tuple[str, int, int], load: Callable[[], bytes]) -> bytes:
        """Return a part that is held, or load it and drop what was used longest ago."""
        if key not in self._parts:
            size = key[2] - key[1]
            while self._parts and self.num_bytes + size > self.limit_bytes:
                self._parts.popitem(last=False)
            self._parts[key] = load()
        self._parts.move_to_end(key)
        return self._parts[key]

    @property
    def num_bytes(self) -> int:
        """What is held now."""
        return sum(map(len, self._parts.values()))


@dataclass(frozen=True)
class RangedRef(TensorRef):
    """The bytes of one tensor, or of some of its rows, in a file on the Hub.

    `start` and `stop` are where the whole tensor lies in the file.
    """

    file: RemoteFile
    held: Held = field(compare=False, repr=False)
    start: int
    stop: int

    @property
    def local(self) -> bool:
        """It is not."""
        return False

    @property
    def stamp(self) -> tuple[object, ...]:
        """A commit never changes."""
        return self.file.repo_id, self.file.sha, self.file.size_bytes

    def read(self) -> torch.Tensor:
        """Return the tensor, in its own dtype.

        Raises:
            HubError: the network or the Hub fails.
        """
        import torch

        buffer = bytearray(self.num_bytes)
        at = 0
        for block in self.blocks():
            buffer[at : at + len(block)] = block
            at += len(block)
        if not buffer:
            return torch.empty(self.shape, dtype=torch_dtype(self.dtype))
        return torch.frombuffer(buffer, dtype=torch_dtype(self.dtype)).view(self.shape)

    def nonfinite(self) -> bool:
        """Return whether NaN or infinity was met; a tensor that was not read is not asked for."""
        return (self.file.name, self.start) in self.held.nonfinite

    def blocks(self) -> Iterator[bytes | memoryview]:
        """Yield the bytes in parts that hold whole elements."""
        stop = self.offset + self.num_bytes
        if self.stop - self.start <= self.held.limit_bytes:
            whole = memoryview(self._part(self.start, self.stop))
            yield whole[self.offset - self.start : stop - self.start]
        elif self.num_bytes <= PAGE_BYTES:
            yield from self._pages(stop)
        else:
            for block in self.file.chunks(self.offset, stop):
                self._scan(block)
                yield block

    def _pages(self, stop: int) -> Iterator[memoryview]:
        """Yield a few rows out of the pages around them."""
        at = self.offset
        while at < stop:
            first = self.start + (at - self.start) // PAGE_BYTES * PAGE_BYTES
            last = min(first + PAGE_BYTES, self.stop)
            page = memoryview(self._part(first, last))
            yield page[at - first : min(stop, last) - first]
            at = last

    def _part(self, start: int, stop: int) -> bytes:
        def load() -> bytes:
            data = b"".join(self.file.chunks(start, stop))
            self._scan(data)
            return data

        return self.held.get((self.file.name, start, stop), load)

    def _scan(self, block: bytes) -> None:
        if holds_nonfinite(block, self.dtype):
            self.held.nonfinite.add((self.file.name, self.start))


def read_remote(files: Mapping[str, RemoteFile], places: Mapping[str, str]) -> dict[str, TensorRef]:
    """Return where every tensor of `places` (tensor to file) lies, read by range when it is wanted.

    Raises:
        SourceError: a header is broken, or lacks a tensor.
        HubError: the network or the Hub fails.
    """
    headers = {name: _header(files[name]) for name in sorted(set(places.values()))}
    absent = [tensor for tensor, name in places.items() if tensor not in headers[name]]
    if absent:
        raise SourceError(f"{places[absent[0]]} on the Hub has no tensor {absent[0]}.")
    found = {tensor: headers[name][tensor] for tensor, name in places.items()}
    held = Held(largest_layer_bytes(found))
    return {
        tensor: RangedRef(
            ref.path,
            ref.name,
            ref.dtype,
            ref.shape,
            ref.offset,
            files[places[tensor]],
            held,
            ref.offset,
            ref.offset + ref.num_bytes,
        )
        for tensor, ref in found.items()
    }


def _header(file: RemoteFile) -> dict[str, TensorRef]:
    """Read a safetensors header; see `read_header` for a file at hand."""
    try:
        data = file.read(0, min(HEAD_BYTES, file.size_bytes))
        (length,) = struct.unpack("<Q", data[:8])
        if length > min(MAX_HEADER_BYTES, file.size_bytes - 8):
            raise ValueError("the header is longer than the file")
        data += file.read(len(data), max(len(data), 8 + length))
        header = json.loads(data[8 : 8 + length])
        if not isinstance(header, dict):
            raise ValueError("the header is no JSON object")
    except (struct.error, ValueError) as error:
        raise SourceError(
            f"{file.name} of {file.repo_id} is no safetensors file: its header cannot be read."
        ) from error
    return parse_header(Path(file.name), header, 8 + length, file.size_bytes)


def largest_layer_bytes(tensors: Mapping[str, TensorRef]) -> int:
    """Return the size of the largest decoder layer; tensors around the layers do not count."""
    sizes: dict[str, int] = {}
    for name, ref in tensors.items():
        if match := re.match(r"(.*?\.\d+)\.", name):
            sizes[match[1]] = sizes.get(match[1], 0) + ref.num_bytes
    return max(sizes.values(), default=0)
