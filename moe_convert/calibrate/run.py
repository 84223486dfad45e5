"""One calibration on the processes at hand: load, measure, train, measure, write back."""

from __future__ import annotations

import gc

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs

from moe_convert.calibrate.compiling import compiled
from moe_convert.calibrate.dense_experts import widen_experts
from moe_convert.calibrate.guards import failures, judge_result
from moe_convert.calibrate.job import Job
from moe_convert.calibrate.layerwise import run_hidden
from moe_convert.calibrate.loop import Loop
from moe_convert.calibrate.measure import measure
from moe_convert.calibrate.memory import compute_twice, step_need
from moe_convert.calibrate.models import (
    load,
    load_teacher,
    prepare_student,
    share_weights,
    target_of,
)
from moe_convert.calibrate.report import Silent, Watcher
from moe_convert.calibrate.step import Models
from moe_convert.calibrate.trackers import check_trackers, logged
from moe_convert.calibrate.watch import Watch
from moe_convert.calibrate.write_back import (
    clearing,
    named_tensors,
    stored_tensors,
    write_back,
)
from moe_convert.errors import MoeConvertError
from moe_convert.manifest import CalibrationReport, Measured
from moe_convert.training import state
from moe_convert.training.optimizer import Stepper
from moe_convert.training.shards import config_of


def run(job: Job, ids_BT: torch.Tensor, watcher: Watcher | None = None) -> CalibrationReport:
    """Calibrate a folder; every process of a launcher calls this with the same job.

    Raises:
        VerificationError: it diverged, and the weights are those of the start; or a gate failed,
            and they are the trained ones, marked.
        MoeConvertError: there are not as many processes as were asked for.
        KeyboardInterrupt: it was asked to stop, and a checkpoint has been written.
    """
    watcher = watcher or Silent()
    check_trackers(job.section.trackers)
    accelerator = _accelerator(job)
    if not job.resume and accelerator.is_main_process:
        state.discard(job.folder)
    watcher.phase("loading")
    if job.section.objective and job.section.objective.hidden:
        return run_hidden(job, ids_BT, accelerator, watcher)
    models = _models(job, accelerator)
    rows_BT, held_BT = ids_BT[: -job.num_held], ids_BT[-job.num_held :].to(accelerator.device)
    before = _beside_teacher(job, models, held_BT, watcher, "before")
    with clearing(job, accelerator):
        found = state.reached(job.folder, job.fingerprint) if job.resume else None
        with logged(job, accelerator, watcher, found.step if found else 0) as tell:
            if _computes_twice(job, models, rows_BT[:1], accelerator, watcher):
                compute_twice(models.student)
            loop = Loop(job, rows_BT, models, accelerator, tell)
            with compiled(models, wanted=job.section.compile):
                loop.run()
        after = _beside_teacher(job, models, held_BT, watcher, "after")
        named = named_tensors(models)
        judge_result(job, before, after, named.values())
        report = _report(job, loop, before, after, accelerator.num_processes)
        watcher.phase("writing")
        if accelerator.is_main_process:
            write_back(job, stored_tensors(job.folder, models.student, named), report)
    accelerator.wait_for_everyone()
    return report


def _accelerator(job: Job) -> Accelerator:
    """Return the processes' common ground, as many as were asked for.

    Precision is the models' own affair, so none is given here.
    """
    buckets = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    accelerator = Accelerator(
        cpu=job.device == "cpu",
        mixed_precision="no",
        kwargs_handlers=[buckets],
        log_with=list(job.section.trackers) or None,
        project_dir=job.folder.with_name(job.folder.name + ".logs"),
    )
    if accelerator.num_processes != job.world_size:
        raise MoeConvertError(
            f"{job.world_size} processes were asked for, and {accelerator.num_processes} run.",
            "Check the launcher's arguments.",
        )
    return accelerator


DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What is computed in, routers and the optimiser aside."""


def _models(job: Job, accelerator: Accelerator) -> Models:
    section, target = job.section, target_of(job.folder)
    dtype = DTYPES[section.mixed_precision]
    replicated = section.parallel == "replicate"
    cut = (section.parallel, accelerator.num_processes)
    sharding = (
        {} if replicated else {"distributed_config": config_of(*cut, bf16=dtype.itemsize == 2)}
    )
    student = load(job.folder, torch.float32, **sharding)
    own = dtype if replicated else torch.float32
    trained = prepare_student(student, target, section, own, accelerator.device)
    if section.train and not trained:
        raise MoeConvertError("The model has no tensor that the section trains.")
    dense_router, device = bool(section.dense_router), accelerator.device.type
    together = section.parallel != "experts"
    wide = together and widen_experts(student, job.top_k, device)
    hears = {"dense_router": dense_router, "wide": wide}
    watch = Watch(student, target, job.top_k, job.null_experts, **hears)
    scaled = section.mixed_precision == "fp16"
    stepper = Stepper(trained, section, job.steps, scaled=scaled)
    several = accelerator.num_processes > 1 and replicated
    wrapped = accelerator.prepare(student) if several else student
    return Models(student, wrapped, None, watch, stepper)


def _beside_teacher(
    job: Job, models: Models, held_BT: torch.Tensor, watcher: Watcher, when: str
) -> Measured:
    """Measure the student; the dense model stays in memory only if it teaches."""
    watcher.phase("measuring")
    if models.teacher is None:
        dtype = DTYPES[job.section.mixed_precision]
        models.teacher = load_teacher(job.dense, dtype, held_BT.device, job.section.teacher)
        share_weights(models.teacher, models.student)
    found = measure(models.student, models.teacher, models.watch, held_BT)
    watcher.measured(when, found)
    assert job.section.objective is not None
    if not job.section.objective.distill:
        models.teacher = None
        gc.collect()
    return found


def _computes_twice(
    job: Job, models: Models, row_1T: torch.Tensor, accelerator: Accelerator, watcher: Watcher
) -> bool:
    """Return whether to save memory; what is cut over processes is so because it is large."""
    section, processes = job.section, accelerator.num_processes
    if section.gradient_checkpointing != "auto":
        return section.gradient_checkpointing
    if section.parallel != "replicate":
        return True
    rows = job.batch_size // (processes * section.grad_accum)
    trained = sum(one.master.numel() for one in models.stepper.trained)
    row_1T = row_1T.to(accelerator.device)
    need = step_need(models.student, row_1T, rows, trained, processes)
    if not need.fits:
        watcher.phase(f"a step would take {need}, so layers are computed twice")
    return not need.fits


def _report(
    job: Job, loop: Loop, before: Measured, after: Measured, num_processes: int
) -> CalibrationReport:
    section, position = job.section, loop.position
    assert section.objective is not None
    assert section.train is not None
    assert position.loss_first is not None
    assert position.loss_last is not None
    return CalibrationReport(
        steps=position.step,
        tokens=position.tokens,
        loss_first=position.loss_first,
        loss_last=position.loss_last,
        stopped_early=position.stopped_early,
        resumed_from=loop.resumed_from,
        trained=[*section.train, *(["biases"] if loop.models.biases else [])],
        trained_params=sum(map(torch.Tensor.numel, loop.models.moved)),
        objective=section.objective.terms,
        data=job.data.name,
        num_processes=num_processes,
        before=before,
        after=after,
        failures=list(failures(job, after)),
    )
