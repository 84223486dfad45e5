"""The trained tensors, back in their places on disk, and what manifest and card say of them."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from transformers.core_model_loading import revert_weight_conversion

from moe_convert.calibrate.job import Job
from moe_convert.calibrate.step import Models
from moe_convert.card import stage_card
from moe_convert.checkpoint import read_folder
from moe_convert.checkpoint.replace import commit, stage_of, stage_tensors
from moe_convert.errors import VerificationError
from moe_convert.experts import Split
from moe_convert.manifest import (
    MANIFEST_NAME,
    CalibrationReport,
    Manifest,
    load_manifest,
)
from moe_convert.recipe import Recipe
from moe_convert.training import state
from moe_convert.training.shards import whole

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from transformers import PreTrainedModel


@contextlib.contextmanager
def clearing(job: Job, accelerator: Accelerator) -> Iterator[None]:
    """Leave nothing behind of a run that diverges."""
    try:
        yield
    except VerificationError:
        if accelerator.is_main_process:
            state.clear(job.folder)
        raise


def write_back(
    job: Job, tensors: Iterable[tuple[str, torch.Tensor]], report: CalibrationReport
) -> None:
    """Put the trained tensors in their places on disk, and the report into manifest and card.

    Raises:
        VerificationError: the report has a figure that is not finite; nothing has changed.
    """
    files = stage_tensors(job.folder, tensors)
    manifest = load_manifest(job.folder)
    for info in manifest.target.files:
        if info.path in files:
            info.size, info.sha256 = files[info.path]
    _describe(manifest, job, report)
    gone = stage_card(job.folder, manifest)
    (stage_of(job.folder) / MANIFEST_NAME).write_text(manifest.checked_json(), encoding="utf-8")
    commit(job.folder, gone)


def _describe(manifest: Manifest, job: Job, report: CalibrationReport) -> None:
    """Record a calibration; the recipe stays that of the conversion.

    Exact copies compute the dense function whatever their routers say.
    """
    assert job.section.train is not None
    routers_only = set(job.section.train) <= {"router"}
    copies = not isinstance(Recipe.model_validate(manifest.recipe).experts, Split)
    manifest.exact = manifest.exact and copies and routers_only
    manifest.state = "failed" if report.failures else "calibrated"
    if manifest.calibration is not None:
        manifest.earlier.append(manifest.calibration)
    report.settings = {
        "calibration": job.section.model_dump(mode="json"),
        "data": job.data.model_dump(mode="json"),
    }
    manifest.calibration = report


def named_tensors(models: Models) -> dict[str, torch.Tensor]:
    """Return every trained tensor, whole, by all its names in memory; every process must ask."""
    masters = {id(one.parameter): one.master.detach() for one in models.stepper.trained}
    found: dict[str, torch.Tensor] = {
        name: whole(masters[id(parameter)])
        for name, parameter in models.student.named_parameters(remove_duplicate=False)
        if id(parameter) in masters
    }
    return found | dict(models.biases)


def stored_tensors(
    folder: Path, student: PreTrainedModel, named: dict[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield tensors in memory by their names on disk, a layer at a time.

    A tied tensor has several names, of which the folder need not have each.
    """
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in named.items():
        layer = re.search(r"\.\d+\.", name)
        groups.setdefault(layer[0] if layer else "", {})[name] = tensor
    aliases = getattr(student, "all_tied_weights_keys", None) or {}
    present = read_folder(folder)
    for group in groups.values():
        for name, tensor in revert_weight_conversion(student, group).items():
            if name in present or name not in aliases:
                yield name, tensor
