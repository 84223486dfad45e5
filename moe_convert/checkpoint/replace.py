"""Replace some files of a finished folder, all or none: staged beside them, then renamed.

New files are written and synced under `<folder>/.calibration/new`; a journal then says that they
are complete. From that moment on the change is made, whoever finishes it: `recover` does so after a
crash between two renames, and drops what was never completed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moe_convert.checkpoint.hashing import sha256_of
from moe_convert.checkpoint.safetensors import TensorRef, read_folder
from moe_convert.checkpoint.writer import disk_error
from moe_convert.errors import MoeConvertError
from moe_convert.ffn import torch_dtype

if TYPE_CHECKING:
    import torch

WORK = ".calibration"
STAGE = "new"
JOURNAL = "commit.json"


def stage_tensors(
    folder: Path, tensors: Iterable[tuple[str, torch.Tensor]]
) -> dict[str, tuple[int, str]]:
    """Write copies of the shards in which these tensors lie, with their new values.

    Everything else in a shard is copied byte for byte, and every tensor keeps its place and dtype.
    Returns size and SHA-256 of each staged file by name.

    Raises:
        MoeConvertError: the folder has no such tensor, or of another shape.
        DoesNotFitError: the disk is full.
    """
    stage = stage_of(folder)
    shutil.rmtree(stage, ignore_errors=True)
    stage.mkdir(parents=True)
    refs, files = read_folder(folder), dict[str, int]()
    try:
        for name, tensor in tensors:
            ref = _place(refs, name, tensor)
            if ref.path.name not in files:
                shutil.copyfile(ref.path, stage / ref.path.name)
                files[ref.path.name] = os.open(stage / ref.path.name, os.O_RDWR)
            _write(files[ref.path.name], ref, tensor)
        for file in files.values():
            os.fsync(file)
    except OSError as error:
        raise disk_error(error, folder) from error
    finally:
        for file in files.values():
            os.close(file)
    return {name: ((stage / name).stat().st_size, sha256_of(stage / name)) for name in files}


def stage_of(folder: Path) -> Path:
    """Return where files are staged, under their own names; `commit` puts them in their places."""
    return folder / WORK / STAGE


def commit(folder: Path, gone: Sequence[str] = ()) -> None:
    """Put every staged file in its place, and remove files that are gone and the work folder."""
    staged = sorted(stage_of(folder).iterdir())
    for path in staged:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    journal = folder / WORK / JOURNAL
    partial = journal.with_suffix(".partial")
    change = {"new": [path.name for path in staged], "gone": list(gone)}
    partial.write_text(json.dumps(change), encoding="utf-8")
    partial.replace(journal)
    _finish(folder, **change)


def recover(folder: Path) -> bool:
    """Finish a replacement that was cut short, and return whether there was one.

    What was staged without a journal is incomplete, and is dropped.
    """
    journal = folder / WORK / JOURNAL
    if journal.is_file():
        _finish(folder, **json.loads(journal.read_text(encoding="utf-8")))
        return True
    shutil.rmtree(stage_of(folder), ignore_errors=True)
    return False


def _finish(folder: Path, new: Sequence[str], gone: Sequence[str]) -> None:
    for name in new:
        staged = stage_of(folder) / name
        if staged.exists():
            staged.replace(folder / name)
    for name in gone:
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / WORK)


def _place(refs: dict[str, TensorRef], name: str, tensor: torch.Tensor) -> TensorRef:
    ref = refs.get(name)
    if ref is None or ref.shape != tuple(tensor.shape):
        found = f"{list(ref.shape)} there" if ref else "not there"
        raise MoeConvertError(f"{name} {list(tensor.shape)} cannot be written: it is {found}.")
    return ref


def _write(file: int, ref: TensorRef, tensor: torch.Tensor) -> None:
    import torch

    stored = tensor.detach().to("cpu", torch_dtype(ref.dtype)).contiguous()
    data, position = memoryview(stored.view(-1).view(torch.uint8).numpy()), ref.offset
    while data:
        written = os.pwrite(file, data[: 1 << 30], position)
        data, position = data[written:], position + written
