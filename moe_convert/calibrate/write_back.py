"""The trained tensors, back in their places on disk, and what the manifest says of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from transformers.core_model_loading import revert_weight_conversion

from moe_convert.calibrate.job import Job
from moe_convert.calibrate.step import Models
from moe_convert.checkpoint import read_folder
from moe_convert.checkpoint.replace import commit, stage_tensors, stage_text
from moe_convert.manifest import (
    MANIFEST_NAME,
    CalibrationReport,
    Manifest,
    Measured,
    load_manifest,
)
from moe_convert.training.shards import whole

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def failures(job: Job, after: Measured) -> Iterator[str]:
    """Yield the gates that the result does not pass."""
    guards = job.section.guards
    ratio, dead = after.perplexity / after.dense_perplexity, after.dead_experts / after.num_experts
    if guards.max_ppl_ratio is not None and not ratio <= guards.max_ppl_ratio:
        yield f"perplexity is {ratio:.3f} x the dense model's, allowed {guards.max_ppl_ratio}"
    if guards.max_dead_share is not None and not dead <= guards.max_dead_share:
        yield f"{dead:.1%} of the experts are dead, allowed {guards.max_dead_share:.1%}"


def write_back(
    job: Job, tensors: Iterable[tuple[str, torch.Tensor]], report: CalibrationReport
) -> None:
    """Put the trained tensors in their places on disk, and the report into the manifest."""
    files = stage_tensors(job.folder, tensors)
    manifest = load_manifest(job.folder)
    for info in manifest.target.files:
        if info.path in files:
            info.size, info.sha256 = files[info.path]
    _describe(manifest, job, report)
    stage_text(job.folder, MANIFEST_NAME, manifest.as_json())
    commit(job.folder)


def _describe(manifest: Manifest, job: Job, report: CalibrationReport) -> None:
    manifest.exact = False
    manifest.state = "failed" if report.failures else "calibrated"
    manifest.calibration = report
    section = job.section.model_copy(update={"enabled": True})
    manifest.recipe["calibration"] = section.model_dump(mode="json")
    manifest.recipe["data"] = job.data.model_dump(mode="json")


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
