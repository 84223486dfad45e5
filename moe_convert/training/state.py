"""Checkpoints of a run: trained tensors, the optimiser's moments and where it stood.

A checkpoint is a folder `step-00000200` of one safetensors file and one JSON file, written beside
and renamed, so that one that exists is whole. Nothing random happens in a step, so that step and
seed stand for the position in the data as well.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from moe_convert.checkpoint.replace import WORK
from moe_convert.errors import UsageError

if TYPE_CHECKING:
    import torch

TENSORS, STATE = "tensors.safetensors", "state.json"


class Position(BaseModel):
    """Where a run stands after `step` steps."""

    model_config = ConfigDict(extra="forbid")

    fingerprint: str
    step: int = 0
    tokens: int = 0
    loss_first: float | None = None
    loss_last: float | None = None
    loss_smooth: float | None = None
    loss_best: float | None = None
    best_step: int = 0
    stopped_early: bool = False

    @property
    def name(self) -> str:
        """What its checkpoint is called."""
        return f"step-{self.step:08d}"


def save(folder: Path, position: Position, tensors: dict[str, torch.Tensor], keep: int) -> Path:
    """Write a checkpoint and remove all but the last `keep` ones."""
    root = folder / WORK
    root.mkdir(exist_ok=True)
    made = root / position.name
    partial = made.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    save_file({n: t.detach().to("cpu").contiguous() for n, t in tensors.items()}, partial / TENSORS)
    (partial / STATE).write_text(position.model_dump_json(), encoding="utf-8")
    shutil.rmtree(made, ignore_errors=True)
    partial.rename(made)
    for old in _found(folder)[:-keep]:
        shutil.rmtree(old)
    return made


def latest(
    folder: Path, fingerprint: str, hint: str = ""
) -> tuple[Position, dict[str, torch.Tensor]] | None:
    """Return the last checkpoint of this run; None if there is none.

    Errors end with `hint`, if it is given.

    Raises:
        UsageError: it is of a run with other settings, data or weights, or cannot be read.
    """
    position = reached(folder, fingerprint, hint)
    if position is None:
        return None
    try:
        return position, load_file(_found(folder)[-1] / TENSORS)
    except (OSError, SafetensorError) as error:
        raise unreadable(position.name, hint) from error


def reached(folder: Path, fingerprint: str, hint: str = "") -> Position | None:
    """Return where the last checkpoint of this run stands, without its tensors.

    Raises:
        UsageError: as `latest`, but for tensors that cannot be read.
    """
    found = _found(folder)
    if not found:
        return None
    try:
        position = Position.model_validate_json((found[-1] / STATE).read_text(encoding="utf-8"))
    except (OSError, ValidationError, json.JSONDecodeError) as error:
        raise unreadable(found[-1].name, hint) from error
    if position.fingerprint != fingerprint:
        raise UsageError(
            f"{folder.name} holds a checkpoint of a run with other settings, data or weights.",
            hint or "Give the same options again, or start anew with --no-resume.",
        )
    return position


def unreadable(name: str, hint: str = "") -> UsageError:
    """Return what to raise for a checkpoint that is not what was written."""
    usual = "Remove it to go on at the one before, or start anew with --no-resume."
    return UsageError(f"The checkpoint {name} is damaged.", hint or usual)


def discard(folder: Path) -> None:
    """Remove the checkpoints of an earlier run."""
    for layer in (folder / WORK).glob("layer-*"):
        layer.unlink()
    discard_steps(folder)


def discard_steps(folder: Path) -> None:
    """Remove checkpoints, and leave finished layers."""
    for path in (folder / WORK).glob("step-*"):
        shutil.rmtree(path)


def clear(folder: Path) -> None:
    """Remove everything that a run left beside the weights."""
    shutil.rmtree(folder / WORK, ignore_errors=True)


def _found(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / WORK).glob("step-*") if not path.suffix)
