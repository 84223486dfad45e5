"""How far a layer-wise run has got: trained layers, a file each, and checkpoints of the next one.

Steps are counted over all layers, so that the number of a checkpoint says of which layer it is.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from moe_convert.calibrate.job import Job
from moe_convert.checkpoint.replace import WORK
from moe_convert.errors import UsageError
from moe_convert.training import state

if TYPE_CHECKING:
    import torch

HINT = "Give the same options again, or start anew with --no-resume."


@dataclass
class Done:
    """The trained tensors by their names on disk, and each layer's first and last error."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    first: list[float] = field(default_factory=list)
    last: list[float] = field(default_factory=list)
    resumed_from: int | None = None


def _path(job: Job, layer: int) -> Path:
    return job.folder / WORK / f"layer-{layer:05d}.safetensors"


def num_finished(job: Job) -> int:
    """Return how many layers an earlier run of this job has trained.

    Raises:
        UsageError: they are of a run with other settings, data or weights, or cannot be read.
    """
    paths = sorted((job.folder / WORK).glob("layer-*.safetensors")) if job.resume else []
    for path in paths:
        if _about(path)["fingerprint"] != job.fingerprint:
            raise UsageError(
                f"{job.folder.name} holds layers of a calibration with other settings, data or "
                "weights.",
                HINT,
            )
    return len(paths)


def num_done(job: Job) -> int:
    """Return how many steps, of all layers, an earlier run of this job has taken and kept.

    Raises:
        UsageError: they are of a run with other settings, data or weights, or cannot be read.
    """
    finished = num_finished(job)
    position = state.reached(job.folder, job.fingerprint) if job.resume else None
    inside = position is not None and _is_inside(job, position, finished)
    return position.step if position and inside else finished * job.steps


def begun(job: Job, index: int) -> tuple[state.Position, dict[str, torch.Tensor]] | None:
    """Return the last checkpoint of a MoE layer; None if an earlier run did not get there.

    One that is of the layer before has been outlived by what was kept of that.
    """
    found = state.latest(job.folder, job.fingerprint) if job.resume else None
    return found if found and _is_inside(job, found[0], index) else None


def _is_inside(job: Job, position: state.Position, index: int) -> bool:
    return 0 < position.step - index * job.steps <= job.steps


def _about(path: Path) -> dict[str, Any]:
    """Return what is written beside the tensors of a finished layer."""
    try:
        with safe_open(path, "pt") as file:
            found: dict[str, Any] = json.loads(file.metadata()["run"])
    except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
        raise UsageError(f"The finished layer {path.name} cannot be read.", HINT) from error
    return found


def kept(job: Job, layer: int, done: Done) -> dict[str, torch.Tensor]:
    """Return what an earlier run made of a layer; nothing if it did not get there."""
    path = _path(job, layer)
    if not job.resume or not path.is_file():
        return {}
    found = _about(path)
    done.first.append(found["first"])
    done.last.append(found["last"])
    done.resumed_from = len(done.last) * job.steps
    return dict(load_file(path))


def keep(job: Job, layer: int, stored: dict[str, torch.Tensor], done: Done) -> None:
    """Write what was made of a layer, whole or not at all; its checkpoints go."""
    found = {"fingerprint": job.fingerprint, "first": done.first[-1], "last": done.last[-1]}
    partial = _path(job, layer).with_suffix(".partial")
    partial.parent.mkdir(exist_ok=True)
    save_file(stored, partial, {"run": json.dumps(found)})
    partial.replace(_path(job, layer))
    state.discard_steps(job.folder)
