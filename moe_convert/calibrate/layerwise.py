"""A calibration with the layer-local objective: measure, train layer by layer, measure, write."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from accelerate.utils import broadcast_object_list
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from moe_convert.calibrate.finished import num_done
from moe_convert.calibrate.guards import failures, judge_result
from moe_convert.calibrate.hidden import train_hidden
from moe_convert.calibrate.job import Job
from moe_convert.calibrate.layers import check_hidden
from moe_convert.calibrate.measure import measure
from moe_convert.calibrate.models import load, load_teacher, target_of
from moe_convert.calibrate.report import Watcher
from moe_convert.calibrate.trackers import logged
from moe_convert.calibrate.watch import Watch
from moe_convert.calibrate.write_back import clearing, write_back
from moe_convert.manifest import CalibrationReport, Measured

if TYPE_CHECKING:
    from accelerate import Accelerator


def run_hidden(
    job: Job, ids_BT: torch.Tensor, accelerator: Accelerator, watcher: Watcher
) -> CalibrationReport:
    """Train layer by layer; whole models are in memory only while they are measured.

    The report counts the steps of all layers, each of which sees the same `tokens`; its losses are
    the means over layers of their first and last errors.
    """
    check_hidden(job)
    steps_done = num_done(job)
    rows_BT, held_BT = ids_BT[: -job.num_held], ids_BT[-job.num_held :]
    before = _measured(job, held_BT, {}, accelerator, watcher, "before")
    with clearing(job, accelerator):
        with logged(job, accelerator, watcher, steps_done) as tell:
            done = train_hidden(job, rows_BT, accelerator, tell)
        after = _measured(job, held_BT, done.tensors, accelerator, watcher, "after")
        judge_result(job, before, after, done.tensors.values())
    assert job.section.objective is not None
    report = CalibrationReport(
        steps=len(done.first) * job.steps,
        tokens=job.steps * job.batch_size * job.width,
        loss_first=sum(done.first) / len(done.first),
        loss_last=sum(done.last) / len(done.last),
        resumed_from=done.resumed_from,
        trained=list(job.section.train or ()),
        trained_params=sum(tensor.numel() for tensor in done.tensors.values()),
        objective=job.section.objective.terms,
        data=job.data.name,
        num_processes=accelerator.num_processes,
        before=before,
        after=after,
        failures=list(failures(job, after)),
    )
    watcher.phase("writing")
    if accelerator.is_main_process:
        write_back(job, done.tensors.items(), report)
    accelerator.wait_for_everyone()
    return report


def _measured(
    job: Job,
    held_BT: torch.Tensor,
    changed: dict[str, torch.Tensor],
    accelerator: Accelerator,
    watcher: Watcher,
    when: str,
) -> Measured:
    """Measure, in the main process, and tell all."""
    watcher.phase("measuring")
    found = [_changed(job, held_BT, changed) if accelerator.is_main_process else None]
    measured: Measured | None = broadcast_object_list(found)[0]
    assert measured is not None
    watcher.measured(when, measured)
    return measured


def _changed(job: Job, held_BT: torch.Tensor, changed: dict[str, torch.Tensor]) -> Measured:
    """Measure the folder's model with some of its stored tensors changed."""
    student = load(job.folder, torch.float32)
    if changed:
        mapping = get_model_conversion_mapping(student)
        config = LoadStateDictConfig(
            weight_mapping=mapping, device_map={"": "cpu"}, dtype=torch.float32
        )
        convert_and_load_state_dict_in_model(student, dict(changed), config)
    device = torch.device(job.device)
    teacher = load_teacher(job.dense, torch.float32, device, job.section.teacher)
    watch = Watch(student.to(job.device), target_of(job.folder), job.top_k, job.null_experts)
    return measure(student, teacher, watch, held_BT.to(job.device))
