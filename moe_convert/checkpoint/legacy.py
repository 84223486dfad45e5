"""Legacy `pytorch_model.bin` checkpoints, read without running any code that they may hold."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_convert.checkpoint.gguf import cache_dir
from moe_convert.checkpoint.hashing import sha256_of
from moe_convert.checkpoint.safetensors import SINGLE_NAME, TensorRef, read_index
from moe_convert.checkpoint.source import SIDE_FILES, Source, open_folder
from moe_convert.checkpoint.writer import CheckpointWriter, TensorSpec, shard
from moe_convert.errors import SourceError
from moe_convert.ffn import TORCH_NAMES, Weight

if TYPE_CHECKING:
    import torch

BIN_NAME = "pytorch_model.bin"
SHARD_BYTES = 5 * 10**9


def open_bin(folder: Path, config: dict[str, Any]) -> Source:
    """Open a folder of .bin files; fetching rewrites them once as safetensors in the cache.

    Raises:
        SourceError: no weights are there, or a file needs unpickling of arbitrary objects.
    """
    specs = [
        TensorSpec(name, tuple(tensor.shape), _dtype(name, tensor))
        for file in _files(folder)
        for name, tensor in _load(file).items()
    ]
    tensors = {s.name: TensorRef(folder / BIN_NAME, s.name, s.dtype, s.shape, 0) for s in specs}
    return Source(
        folder.resolve().name,
        config,
        tensors,
        lambda: _rewrite(folder, specs),
        folder,
        unpack_bytes=sum(spec.num_bytes for spec in specs),
    )


def _files(folder: Path) -> list[Path]:
    index = folder / f"{BIN_NAME}.index.json"
    if index.exists():
        files = [folder / name for name in sorted(set(read_index(index).values()))]
    else:
        files = [folder / BIN_NAME]
    for file in files:
        if not file.is_file():
            raise SourceError(
                f"{folder.name} has no {SINGLE_NAME} and no {file.name}.",
                "Give a folder with weights.",
            )
    return files


def _load(file: Path) -> dict[str, torch.Tensor]:
    import torch

    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, ValueError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise SourceError(
            f"{file.name} cannot be loaded as plain tensors, and pickled code is never run.",
            "Convert the checkpoint to safetensors first.",
        ) from error
    if not isinstance(loaded, dict) or not all(torch.is_tensor(t) for t in loaded.values()):
        raise SourceError(
            f"{file.name} holds something else than tensors by name.",
            "Convert the checkpoint to safetensors first.",
        )
    return loaded


def _dtype(name: str, tensor: torch.Tensor) -> str:
    wanted = str(tensor.dtype).removeprefix("torch.")
    for stored, torch_name in TORCH_NAMES.items():
        if torch_name == wanted:
            return stored
    raise SourceError(
        f"Tensor {name} has dtype {wanted}, expected one of {', '.join(TORCH_NAMES.values())}."
    )


def _tensors(folder: Path) -> Iterator[tuple[str, Weight]]:
    for file in _files(folder):
        for name, tensor in _load(file).items():
            yield name, Weight.of(tensor, _dtype(name, tensor))


def _rewrite(folder: Path, specs: list[TensorSpec]) -> Source:
    keys = "".join(sha256_of(file) for file in _files(folder))
    cached = cache_dir() / f"bin-{keys[:32]}"
    if not cached.is_dir():
        partial = cached.with_name(cached.name + ".partial")
        partial.mkdir(parents=True, exist_ok=True)
        writer = CheckpointWriter(partial, shard(specs, SHARD_BYTES))
        for name, weight in _tensors(folder):
            writer.write(name, weight)
        writer.finish_step("all")
        writer.finish()
        for pattern in ("config.json", *SIDE_FILES):
            for path in folder.glob(pattern):
                target = partial / path.relative_to(folder)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, target)
        partial.rename(cached)
    return open_folder(cached)
