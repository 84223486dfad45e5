"""Write safetensors shards whose layout is known before the first byte: resumable and hashed.

Every header is written first, so each tensor has its place and a run that was killed goes on from
the last finished step. Bytes that equal the source's are copied by the kernel and never decoded.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import struct
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from moe_convert.checkpoint.hashing import Hasher
from moe_convert.checkpoint.safetensors import INDEX_NAME, SINGLE_NAME, TensorRef
from moe_convert.errors import DoesNotFitError, MoeConvertError, SourceError
from moe_convert.ffn import ITEM_BITS, Weight, torch_dtype

if TYPE_CHECKING:
    import torch

BLOCK_BYTES = 1 << 24
COPIED_BYTES = 1 << 26
"""What the copying thread does before it looks whether it should stop."""
JOURNAL_NAME = ".progress"


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and dtype of a tensor that will be written."""

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_bytes(self) -> int:
        """Size in bytes."""
        bits = ITEM_BITS[self.dtype]
        for size in self.shape:
            bits *= size
        return bits // 8


@dataclass(frozen=True)
class Shard:
    """One file of the result: its header and where each tensor's bytes go."""

    file: str
    specs: tuple[TensorSpec, ...]

    @property
    def header(self) -> bytes:
        """The file's first bytes, padded to a multiple of 8."""
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        position = 0
        for spec in self.specs:
            end = position + spec.num_bytes
            entries[spec.name] = {
                "dtype": spec.dtype,
                "shape": list(spec.shape),
                "data_offsets": [position, end],
            }
            position = end
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    @property
    def num_bytes(self) -> int:
        """Size of the finished file."""
        return len(self.header) + sum(spec.num_bytes for spec in self.specs)


def shard(specs: Iterable[TensorSpec], max_shard_bytes: int) -> tuple[Shard, ...]:
    """Cut the tensors, in order, into files of at most `max_shard_bytes` (one tensor at least)."""
    groups: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        if groups[-1] and filled + spec.num_bytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(spec)
        filled += spec.num_bytes
    if len(groups) == 1:
        return (Shard(SINGLE_NAME, tuple(groups[0])),)
    return tuple(
        Shard(f"model-{i:05d}-of-{len(groups):05d}.safetensors", tuple(group))
        for i, group in enumerate(groups, 1)
    )


class CheckpointWriter:
    """Writes announced tensors, and only those, into the shards of a folder.

    Tensors may come in any order; `finish_step` records progress and `skip_step` tells a resumed
    run what it need not do again. Bytes of local files are copied in a thread, which may be one
    step behind, and hashed behind that in another. More would not copy faster: file systems let
    one thread at a time write into a file.
    """

    def __init__(self, folder: Path, shards: tuple[Shard, ...]) -> None:
        """Lay out the files in `folder`, or take up those that an interrupted run left there."""
        self.folder, self.shards = folder, shards
        self._places: dict[str, tuple[int, int, TensorSpec]] = {}
        self._files: list[int] = []
        self._sources: dict[Path, int] = {}
        self._written: set[str] = set()
        self._begun: dict[str, Future[None] | None] = {}
        self._unrecorded: list[tuple[str, dict[str, Future[None] | None]]] = []
        self._copier = ThreadPoolExecutor(1)
        self._stopped = False
        self._journal = folder / JOURNAL_NAME
        self._steps: set[str] = set()
        try:
            for shard in shards:
                self._open(shard)
        except OSError as error:
            self.close()
            raise disk_error(error, folder) from error
        if self._journal.exists():
            self._steps = set(self._journal.read_text(encoding="utf-8").split("\n")) - {""}
        self._hasher = Hasher([folder / shard.file for shard in shards])

    def _open(self, shard: Shard) -> None:
        header = shard.header
        file = os.open(self.folder / shard.file, os.O_RDWR | os.O_CREAT, 0o644)
        number = len(self._files)
        self._files.append(file)
        os.ftruncate(file, shard.num_bytes)
        os.pwrite(file, header, 0)
        position = len(header)
        for spec in shard.specs:
            self._places[spec.name] = (number, position, spec)
            position += spec.num_bytes

    def write(self, name: str, weight: Weight) -> None:
        """Write one tensor.

        Raises:
            DoesNotFitError: the disk is full.
            MoeConvertError: the tensor was not announced, or not with this shape and dtype.
        """
        number, position, spec = self._places.get(name) or _unannounced(name)
        if (weight.shape, weight.dtype) != (spec.shape, spec.dtype):
            raise MoeConvertError(
                f"{name} came out as {weight.dtype}{list(weight.shape)}, and the plan announced "
                f"{spec.dtype}{list(spec.shape)}."
            )
        self._begun[name] = self._begin(weight, self._files[number], position)

    def _begin(self, weight: Weight, target: int, position: int) -> Future[None] | None:
        """Write a tensor, or leave it to the thread if its bytes lie in a file."""
        if weight.stored is None:
            with self._explained():
                _write_all(target, _to_bytes(weight), position)
            return None
        ref = cast("TensorRef", weight.stored)
        if not ref.local:
            with self._explained():
                for block in ref.blocks():
                    _write_all(target, memoryview(block), position)
                    position += len(block)
            return None
        source = self._sources.get(ref.path)
        if source is None:
            source = self._sources[ref.path] = os.open(ref.path, os.O_RDONLY)
        return self._copier.submit(self._copy, ref, source, target, position)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise disk_error(error, self.folder) from error

    def skip_step(self, step: str, names: Iterable[str]) -> bool:
        """Return whether an interrupted run wrote this step; its tensors then count as written."""
        if step not in self._steps:
            return False
        self._written.update(names)
        self._advance()
        return True

    def has(self, step: str) -> bool:
        """Return whether an interrupted run wrote this step."""
        return step in self._steps

    def written(self, name: str) -> Weight:
        """Return a tensor as it lies in the files."""
        number, position, spec = self._places[name]

        def load() -> torch.Tensor:
            import torch

            dtype = torch_dtype(spec.dtype)
            if not spec.num_bytes:
                return torch.empty(spec.shape, dtype=dtype)
            data = os.pread(self._files[number], spec.num_bytes, position)
            return torch.frombuffer(bytearray(data), dtype=dtype).view(spec.shape)

        return Weight(spec.shape, spec.dtype, load)

    def finish_step(self, step: str) -> None:
        """Record that everything written so far need not be written again, once it is on disk.

        Raises:
            DoesNotFitError: the disk is full.
            SourceError: a file ends before the tensor does.
        """
        self._unrecorded.append((step, self._begun))
        self._begun = {}
        if len(self._unrecorded) > 1:
            self._record()

    def _record(self) -> None:
        """Wait for the oldest step that is not recorded, and record it."""
        step, begun = self._unrecorded.pop(0)
        self._settle(begun)
        with self._journal.open("a", encoding="utf-8") as journal:
            journal.write(f"{step}\n")
        self._advance()

    def _settle(self, begun: dict[str, Future[None] | None]) -> None:
        for name, copy in begun.items():
            if copy is not None:
                with self._explained():
                    copy.result()
            self._written.add(name)

    def _advance(self) -> None:
        for number, shard in enumerate(self.shards):
            done = len(shard.header)
            for spec in shard.specs:
                if spec.name not in self._written:
                    break
                done += spec.num_bytes
            self._hasher.allow(number, done)

    def finish(self) -> dict[str, str]:
        """Write the index, close the files and return the SHA-256 of every shard.

        Raises:
            MoeConvertError: a tensor that the plan announced was never written.
        """
        while self._unrecorded:
            self._record()
        self._settle(self._begun)
        missing = [name for name in self._places if name not in self._written]
        if missing:
            raise MoeConvertError(
                f"The conversion wrote no {missing[0]}, which the plan announced."
            )
        self._advance()
        hashes = self._hasher.result()
        self.close()
        if len(self.shards) > 1:
            index = {
                "metadata": {
                    "total_size": sum(s.num_bytes for _, _, s in self._places.values()),
                },
                "weight_map": {s.name: shard.file for shard in self.shards for s in shard.specs},
            }
            text = json.dumps(index, indent=2) + "\n"
            (self.folder / INDEX_NAME).write_text(text, encoding="utf-8")
        self._journal.unlink(missing_ok=True)
        return hashes

    def close(self) -> None:
        """Close every file; what was written stays."""
        self._stopped = True
        self._copier.shutdown(cancel_futures=True)
        if hasattr(self, "_hasher"):
            self._hasher.stop()
        for file in (*self._files, *self._sources.values()):
            with contextlib.suppress(OSError):
                os.close(file)
        self._files, self._sources = [], {}

    def _copy(self, ref: TensorRef, source: int, target: int, position: int) -> None:
        offset, left = ref.offset, ref.num_bytes
        while left and not self._stopped:
            copied = _copy_block(source, target, min(left, COPIED_BYTES), offset, position)
            if copied == 0:
                raise SourceError(f"{ref.path.name} ends inside tensor {ref.name}.")
            offset, position, left = offset + copied, position + copied, left - copied


def _unannounced(name: str) -> tuple[int, int, TensorSpec]:
    raise MoeConvertError(f"The conversion made {name}, which the plan did not announce.")


def _copy_block(source: int, target: int, count: int, offset: int, position: int) -> int:
    """Copy bytes inside the kernel, or through a buffer where the file systems cannot."""
    try:
        return os.copy_file_range(source, target, count, offset, position)
    except (AttributeError, OSError) as error:
        cannot = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}
        if isinstance(error, OSError) and error.errno not in cannot:
            raise
    block = os.pread(source, min(count, BLOCK_BYTES), offset)
    return os.pwrite(target, block, position)


def _to_bytes(weight: Weight) -> memoryview:
    import torch

    tensor = weight.load().to(torch_dtype(weight.dtype)).contiguous()
    if tuple(tensor.shape) != weight.shape:
        raise MoeConvertError(f"A tensor of {weight.shape} was announced, got {tensor.shape}.")
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())


def _write_all(file: int, data: memoryview, position: int) -> None:
    while data:
        written = os.pwrite(file, data[: 1 << 30], position)
        data, position = data[written:], position + written


def disk_error(error: OSError, folder: Path) -> Exception:
    """Return what a user should read for a failed write."""
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return DoesNotFitError(
            f"The disk of {folder.parent} is full.",
            "Free some space and run the same command again: it goes on where it stopped.",
        )
    return MoeConvertError(f"Cannot write {folder.name}: {error.strerror}.")
