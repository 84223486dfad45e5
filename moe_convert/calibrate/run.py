"""One calibration on the processes at hand: load, measure, train, measure, write back."""

from __future__ import annotations

import contextlib
import gc
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    convert_and_load_state_dict_in_model,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig

from moe_convert.calibrate.hidden import check_hidden, train_hidden
from moe_convert.calibrate.job import Job
from moe_convert.calibrate.loop import Loop, Models
from moe_convert.calibrate.measure import measure
from moe_convert.calibrate.models import (
    load,
    prepare_student,
    share_weights,
    target_of,
)
from moe_convert.calibrate.report import Log, Silent, StepRecord, Watcher, check_trackers
from moe_convert.calibrate.watch import Watch
from moe_convert.checkpoint import read_folder
from moe_convert.checkpoint.replace import commit, stage_tensors, stage_text
from moe_convert.errors import MoeConvertError, VerificationError
from moe_convert.manifest import (
    MANIFEST_NAME,
    CalibrationReport,
    Manifest,
    Measured,
    load_manifest,
)
from moe_convert.training import state
from moe_convert.training.optimizer import Stepper
from moe_convert.training.shards import config_of, whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
        return _run_hidden(job, ids_BT, accelerator, watcher)
    models = _models(job, accelerator)
    held_BT = ids_BT[-max(job.num_held, 1) :].to(accelerator.device)
    before = _beside_teacher(job, models, held_BT, watcher, "before")
    with _log(job, accelerator, watcher) as tell:
        rows_BT = ids_BT[: len(ids_BT) - job.num_held]
        loop = Loop(job, rows_BT, models, accelerator, tell)
        _train(loop, accelerator)
    after = _beside_teacher(job, models, held_BT, watcher, "after")
    report = _report(job, loop, before, after, accelerator.num_processes)
    watcher.phase("writing")
    named = named_tensors(models)
    if accelerator.is_main_process:
        _write_back(job, stored_tensors(job.folder, models.student, named), report)
    accelerator.wait_for_everyone()
    return report


def _run_hidden(
    job: Job, ids_BT: torch.Tensor, accelerator: Accelerator, watcher: Watcher
) -> CalibrationReport:
    """Train layer by layer; whole models are in memory only while they are measured."""
    check_hidden(job)
    rows_BT, held_BT = ids_BT[: len(ids_BT) - job.num_held], ids_BT[-max(job.num_held, 1) :]
    watcher.phase("measuring")
    before = _measured(job, held_BT, {})
    watcher.measured("before", before)
    with _log(job, accelerator, watcher) as tell:
        try:
            done = train_hidden(job, rows_BT, tell)
        except VerificationError:
            state.clear(job.folder)
            raise
    watcher.phase("measuring")
    after = _measured(job, held_BT, done.tensors)
    watcher.measured("after", after)
    assert job.section.objective is not None
    report = CalibrationReport(
        steps=len(done.first) * job.steps,
        tokens=len(done.first) * job.steps * job.batch_size * job.width,
        loss_first=sum(done.first) / len(done.first),
        loss_last=sum(done.last) / len(done.last),
        resumed_from=done.resumed_from,
        trained=list(job.section.train or ()),
        trained_params=sum(tensor.numel() for tensor in done.tensors.values()),
        objective=job.section.objective.terms,
        data=job.data.name,
        num_processes=1,
        before=before,
        after=after,
        failures=list(_failures(job, after)),
    )
    watcher.phase("writing")
    _write_back(job, done.tensors.items(), report)
    return report


def _measured(job: Job, held_BT: torch.Tensor, changed: dict[str, torch.Tensor]) -> Measured:
    """Measure the folder's model with some of its stored tensors changed."""
    student = load(job.folder, torch.float32)
    if changed:
        mapping = get_model_conversion_mapping(student)
        config = LoadStateDictConfig(
            weight_mapping=mapping, device_map={"": "cpu"}, dtype=torch.float32
        )
        convert_and_load_state_dict_in_model(student, dict(changed), config)
    teacher = _teacher(job, torch.float32, torch.device(job.device))
    watch = Watch(student.to(job.device), target_of(job.folder), job.top_k)
    return measure(student, teacher, watch, held_BT.to(job.device))


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


def _models(job: Job, accelerator: Accelerator) -> Models:
    section, target = job.section, target_of(job.folder)
    dtype = torch.bfloat16 if section.mixed_precision == "bf16" else torch.float32
    replicated = section.parallel == "replicate"
    cut = (section.parallel, accelerator.num_processes)
    sharding = (
        {} if replicated else {"distributed_config": config_of(*cut, bf16=dtype.itemsize == 2)}
    )
    student = load(job.folder, torch.float32, **sharding)
    own = dtype if replicated else torch.float32
    trained = prepare_student(student, target, section, own, accelerator.device)
    if not trained:
        raise MoeConvertError("The model has no tensor that the section trains.")
    watch = Watch(student, target, job.top_k, dense_router=section.dense_router)
    stepper = Stepper(trained, section, job.steps)
    several = accelerator.num_processes > 1 and replicated
    wrapped = accelerator.prepare(student) if several else student
    return Models(student, wrapped, None, watch, stepper)


def _beside_teacher(
    job: Job, models: Models, held_BT: torch.Tensor, watcher: Watcher, when: str
) -> Measured:
    """Measure the student; the dense model stays in memory only if it teaches."""
    watcher.phase("measuring")
    if models.teacher is None:
        dtype = torch.bfloat16 if job.section.mixed_precision == "bf16" else torch.float32
        models.teacher = _teacher(job, dtype, held_BT.device)
        share_weights(models.teacher, models.student)
    found = measure(models.student, models.teacher, models.watch, held_BT)
    watcher.measured(when, found)
    assert job.section.objective is not None
    if not job.section.objective.distill:
        models.teacher = None
        gc.collect()
    return found


def _teacher(job: Job, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Load the dense model on the device, or leave it on the host and stream it from there."""
    from accelerate import cpu_offload

    teacher = load(job.dense, dtype)
    if job.section.teacher == "offload":
        return cpu_offload(teacher, execution_device=device)
    return teacher.to(device)


def _train(loop: Loop, accelerator: Accelerator) -> None:
    """Run the loop; a run that diverges leaves nothing behind."""
    try:
        loop.run()
    except VerificationError:
        if accelerator.is_main_process:
            state.clear(loop.job.folder)
        raise


@contextlib.contextmanager
def _log(
    job: Job, accelerator: Accelerator, watcher: Watcher
) -> Iterator[Callable[[StepRecord], None]]:
    """Yield what a step is told to: the log, the trackers and whoever watches."""
    if not accelerator.is_main_process:
        yield lambda record: None
        return
    found = state.latest(job.folder, job.fingerprint) if job.resume else None
    log = Log(job.folder, found[0].step if found else 0)
    if job.section.trackers:
        settings = {"steps": job.steps, "batch_size": job.batch_size}
        accelerator.init_trackers("moe-convert", config=settings)

    def tell(record: StepRecord) -> None:
        log.step(record)
        watcher.step(record)
        if job.section.trackers:
            accelerator.log(record.scalars, step=record.step)

    try:
        yield tell
    finally:
        log.close()
        if job.section.trackers:
            accelerator.end_training()


def _report(
    job: Job, loop: Loop, before: Measured, after: Measured, num_processes: int
) -> CalibrationReport:
    section, position = job.section, loop.position
    assert section.objective is not None
    assert section.train is not None
    assert position.loss_first is not None
    report = CalibrationReport(
        steps=position.step,
        tokens=position.tokens,
        loss_first=position.loss_first,
        loss_last=loop.last_loss,
        stopped_early=loop.stopped_early,
        resumed_from=loop.resumed_from,
        trained=list(section.train),
        trained_params=sum(one.master.numel() for one in loop.models.stepper.trained),
        objective=section.objective.terms,
        data=job.data.name,
        num_processes=num_processes,
        before=before,
        after=after,
    )
    report.failures = list(_failures(job, after))
    return report


def _failures(job: Job, after: Measured) -> Iterator[str]:
    """Yield the gates that the result does not pass."""
    guards = job.section.guards
    ratio, dead = after.perplexity / after.dense_perplexity, after.dead_experts / after.num_experts
    if guards.max_ppl_ratio is not None and not ratio <= guards.max_ppl_ratio:
        yield f"perplexity is {ratio:.3f} x the dense model's, allowed {guards.max_ppl_ratio}"
    if guards.max_dead_share is not None and not dead <= guards.max_dead_share:
        yield f"{dead:.1%} of the experts are dead, allowed {guards.max_dead_share:.1%}"


def _write_back(
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
