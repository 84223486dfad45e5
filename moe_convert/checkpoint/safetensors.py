"""Safetensors files by their headers: which bytes of which file are a tensor, and nothing read."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_convert.errors import SourceError
from moe_convert.ffn import ITEM_BITS, TORCH_NAMES, Weight, torch_dtype

if TYPE_CHECKING:
    import torch

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000
SCAN_BYTES = 1 << 20
EXPONENTS = {
    "F64": ("<u8", 0x7FF0_0000_0000_0000),
    "F32": ("<u4", 0x7F80_0000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
}
"""Integer type of the same width and the bits of the exponent, by dtype."""


@dataclass(frozen=True)
class TensorRef:
    """The bytes of one tensor, or of some of its rows, in a file."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def local(self) -> bool:
        """Whether the file lies on this machine."""
        return True

    @property
    def stamp(self) -> tuple[object, ...]:
        """What changes when the file does."""
        found = self.path.stat()
        return found.st_size, found.st_mtime_ns

    @property
    def num_bytes(self) -> int:
        """Length in bytes."""
        return math.prod(self.shape) * ITEM_BITS[self.dtype] // 8

    def rows(self, start: int, stop: int) -> TensorRef:
        """Return the bytes of these rows of the first axis."""
        row_bytes = self.num_bytes // self.shape[0]
        shape = (stop - start, *self.shape[1:])
        return replace(self, shape=shape, offset=self.offset + start * row_bytes)

    def read(self) -> torch.Tensor:
        """Return the tensor, in its own dtype.

        Raises:
            SourceError: the file ends before the tensor does.
        """
        import torch

        buffer = bytearray(self.num_bytes)
        with self.path.open("rb") as file:
            file.seek(self.offset)
            if file.readinto(buffer) != self.num_bytes:
                raise SourceError(f"{self.path.name} ends inside tensor {self.name}.")
        if not buffer:
            return torch.empty(self.shape, dtype=torch_dtype(self.dtype))
        return torch.frombuffer(buffer, dtype=torch_dtype(self.dtype)).view(self.shape)

    def nonfinite(self) -> bool:
        """Return whether the tensor holds NaN or infinity: an exponent of all ones."""
        return self.dtype in EXPONENTS and any(
            holds_nonfinite(block, self.dtype) for block in self.blocks()
        )

    def blocks(self) -> Iterator[bytes | memoryview]:
        """Yield the bytes in parts that hold whole elements; fewer where the file ends early."""
        left = self.num_bytes
        with self.path.open("rb") as file:
            file.seek(self.offset)
            while left and (block := file.read(min(left, SCAN_BYTES))):
                yield block
                left -= len(block)

    def weight(self) -> Weight:
        """Return the tensor as a lazily read weight that can be copied byte for byte."""
        return Weight(self.shape, self.dtype, self.read, self)


def holds_nonfinite(block: bytes | memoryview, dtype: str) -> bool:
    """Return whether one of these elements is NaN or infinity; no other dtype has them."""
    import numpy as np

    kind, mask = EXPONENTS.get(dtype, ("u1", 0))
    values = np.frombuffer(block, dtype=kind)
    return mask != 0 and bool(((values & mask) == mask).any())


def read_header(path: Path) -> dict[str, TensorRef]:
    """Return where every tensor of a safetensors file lies.

    Raises:
        SourceError: the file is missing, truncated, or its header is not valid.
    """
    try:
        size_bytes = path.stat().st_size
        with path.open("rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            if header_bytes > min(MAX_HEADER_BYTES, size_bytes - 8):
                raise SourceError(
                    f"{path.name} is truncated or no safetensors file: its header claims "
                    f"{header_bytes} bytes and the file has {size_bytes}.",
                    "Download it again.",
                )
            header = json.loads(file.read(header_bytes))
        if not isinstance(header, dict):
            raise ValueError("the header is no JSON object")
    except FileNotFoundError as error:
        raise SourceError(
            f"The checkpoint has no file {path.name}.", "Download it again."
        ) from error
    except OSError as error:
        raise SourceError(
            f"{path.name} cannot be read: {error.strerror}.", "Check its permissions."
        ) from error
    except (struct.error, ValueError, UnicodeDecodeError) as error:
        raise SourceError(
            f"{path.name} is no safetensors file: its header cannot be read.", "Download it again."
        ) from error
    return parse_header(path, header, 8 + header_bytes, size_bytes)


def parse_header(
    path: Path, header: dict[str, Any], data_start: int, size_bytes: int | None
) -> dict[str, TensorRef]:
    """Return the tensors of a decoded header; `size_bytes` None leaves the length unchecked."""
    refs = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        ref = _entry(path, name, entry, data_start)
        if size_bytes is not None and ref.offset + ref.num_bytes > size_bytes:
            raise SourceError(
                f"{path.name} is truncated: tensor {name} ends at byte "
                f"{ref.offset + ref.num_bytes} and the file has {size_bytes}.",
                "Download it again.",
            )
        refs[name] = ref
    return refs


def _entry(path: Path, name: str, entry: dict[str, Any], data_start: int) -> TensorRef:
    try:
        dtype, shape = str(entry["dtype"]), tuple(int(n) for n in entry["shape"])
        start, stop = (int(n) for n in entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise SourceError(f"{path.name} has a malformed header entry for {name}.") from error
    if dtype not in ITEM_BITS:
        raise SourceError(
            f"Tensor {name} in {path.name} has dtype {dtype}, which is not one of "
            f"{', '.join(TORCH_NAMES)}.",
            "Save the checkpoint in one of these first.",
        )
    ref = TensorRef(path, name, dtype, shape, data_start + start)
    if min((*shape, start), default=0) < 0 or stop - start != ref.num_bytes:
        raise SourceError(
            f"Tensor {name} in {path.name} has shape {list(shape)} of {dtype}, "
            f"{ref.num_bytes} bytes, but its header reserves {stop - start}.",
            "Download the file again.",
        )
    return ref


def read_folder(folder: Path) -> dict[str, TensorRef]:
    """Return every tensor of a checkpoint folder, of one file or of the shards of its index.

    Raises:
        SourceError: a shard is missing or broken, or the index points outside the folder.
    """
    index_path = folder / INDEX_NAME
    if not index_path.exists():
        return read_header(folder / SINGLE_NAME)
    weight_map = read_index(index_path)
    headers = {file: read_header(folder / file) for file in sorted(set(weight_map.values()))}
    absent = [name for name, file in weight_map.items() if name not in headers[file]]
    if absent:
        raise SourceError(
            f"{INDEX_NAME} says that {absent[0]} is in {weight_map[absent[0]]}, which has no such "
            "tensor.",
            "Download both again.",
        )
    return {name: headers[file][name] for name, file in weight_map.items()}


def read_index(path: Path) -> dict[str, str]:
    """Return tensor name to file name of an index of shards.

    Raises:
        SourceError: it is not valid, or a file name is no plain name inside the folder.
    """
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (KeyError, TypeError, ValueError) as error:
        raise SourceError(f"{path.name} is not a valid index.", "Download it again.") from error
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise SourceError(f"{path.name} is not a valid index.", "Download it again.")
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file or "\\" in file or file in {"", ".", ".."}:
            raise SourceError(
                f"{path.name} points outside the checkpoint folder: {file!r}.",
                "Only plain file names are allowed there.",
            )
    return weight_map
