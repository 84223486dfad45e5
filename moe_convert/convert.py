"""The conversion: one pass over the decoder layers, from the plan to a finished folder.

The folder is built as `<output>.partial` and renamed when it is complete; a run that was killed
goes on at the layer it had reached.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from moe_convert.checkpoint import CheckpointWriter, Source, TensorRef, sha256_of
from moe_convert.checkpoint.replace import WORK
from moe_convert.compose import ExpertSource, averaged, check_tokenizers, distinct
from moe_convert.data import SelfWriter
from moe_convert.errors import MoeConvertError, OutputExistsError, UsageError
from moe_convert.experts import Compose, ComposeSource, Method, Split
from moe_convert.ffn import Weight
from moe_convert.inputs import Inputs, read_inputs
from moe_convert.making import Maker, layer_maker
from moe_convert.manifest import (
    MANIFEST_NAME,
    SCHEMA,
    FileInfo,
    Manifest,
    SourceInfo,
    TargetInfo,
    Warning_,
    hardware,
    versions,
)
from moe_convert.plan import Plan, lay_out
from moe_convert.provenance import Hashing, expert_files, files_of, with_origin
from moe_convert.recipe import PushSection, Recipe
from moe_convert.routing import routing_notes, routing_report
from moe_convert.runtime import chosen_device
from moe_convert.sensitivity import KEPT_NAME, settled

PLAN_NAME = ".plan"
WORKING_NAMES = (KEPT_NAME, PLAN_NAME)
"""What lies in a folder under construction only."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how far it is and how far it goes."""


def silent(what: str, done: int, total: int) -> None:
    """Report nothing."""


def convert(plan: Plan, progress: Progress = silent) -> Manifest:
    """Write the planned checkpoint and return its manifest.

    Raises:
        OutputExistsError: the output folder exists and may not be replaced.
        DoesNotFitError: the disk filled up; what was written is kept for the next run.
    """
    check_output(plan)
    progress("source", 0, 1)
    local = replace(plan.source.fetch(), sha=plan.source.sha)
    progress("source", 1, 1)
    plan = replace(plan, experts=tuple(expert.fetch() for expert in plan.experts))
    for expert in plan.experts:
        check_tokenizers(expert.source, local)
    vocab_size, device = plan.layout.body.vocab_size, plan.recipe.runtime.device
    author = SelfWriter(local, progress, device)
    inputs = read_inputs(plan.recipe, plan.shape, vocab_size, local.folder, author)
    partial = _open_partial(plan, local, inputs)
    weights = _weights_around(plan, local)
    plan, sensitivity = settled(plan, local, weights, inputs, partial, progress)
    refs = [*local.tensors.values(), *(r for e in distinct(plan.experts) for r in e.refs)]
    refs = sorted(refs, key=lambda ref: not ref.local)
    with ThreadPoolExecutor(max_workers=1) as pool:
        broken = [pool.submit(ref.nonfinite) for ref in refs if ref.local]
        hashing = Hashing(pool)
        for read in (files_of(local), *map(expert_files, plan.experts)):
            hashing.start(read)
        try:
            with (
                closing(CheckpointWriter(partial, plan.shards)) as files,
                closing(layer_maker(plan, local, weights, inputs, files, progress)) as make,
            ):
                hashes = _write_tensors(plan, weights, make, files, progress)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        shutil.rmtree(partial / WORK, ignore_errors=True)
        broken += [pool.submit(ref.nonfinite) for ref in refs if not ref.local]
        warnings = _nonfinite_warnings(refs, broken)
    _write_side_files(plan, local, partial)
    routing = routing_report(plan.recipe, inputs, make.found)
    warnings += routing_notes(routing, plan.recipe.router.balance)
    manifest = _manifest(plan, local, partial, hashes, warnings, hashing)
    manifest.routing = routing
    manifest.split = make.report
    manifest.sensitivity = sensitivity
    manifest.save(partial)
    for name in WORKING_NAMES:
        (partial / name).unlink(missing_ok=True)
    _publish(plan, partial)
    return manifest


def check_output(plan: Plan) -> None:
    """Refuse an output folder that exists, or that is the source itself.

    Raises:
        OutputExistsError: it exists and --overwrite is off, or this program did not write it.
        UsageError: it is the source folder.
    """
    output = plan.output
    folders = [plan.source.folder, *(expert.folder for expert in plan.experts)]
    if any(folder and output.resolve() == folder.resolve() for folder in folders):
        raise UsageError("The output folder is the source itself.", "Choose another with -o.")
    if not output.exists():
        return
    if not plan.recipe.output.overwrite:
        raise OutputExistsError(
            f"{output} exists already.", "Choose another with -o, or pass --overwrite."
        )
    if not (output / MANIFEST_NAME).is_file():
        raise OutputExistsError(
            f"{output} exists and was not written by moe-convert, so it is not replaced.",
            "Choose another with -o.",
        )


def _open_partial(plan: Plan, local: Source, inputs: Inputs | None) -> Path:
    """Create the folder under construction, or take up the one that the same plan left."""
    partial = plan.output.absolute().with_name(plan.output.absolute().name + ".partial")
    fingerprint = _fingerprint(plan, local, inputs)
    mark = partial / PLAN_NAME
    if partial.exists() and not (mark.is_file() and mark.read_text() == fingerprint):
        _remove_partial(partial)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        mark.write_text(fingerprint, encoding="ascii")
    except OSError as error:
        raise MoeConvertError(
            f"Cannot write into {partial.parent}: {error.strerror}.", "Choose another with -o."
        ) from error
    return partial


def _remove_partial(partial: Path) -> None:
    """Remove what another conversion left, and nothing that somebody else put there.

    Raises:
        OutputExistsError: it was not written by this program.
    """
    names = {path.name for path in partial.iterdir()} if partial.is_dir() else {""}
    if names and names.isdisjoint({PLAN_NAME, MANIFEST_NAME}):
        raise OutputExistsError(
            f"{partial} is where the result is built, and it was not written by moe-convert.",
            "Move it away, or choose another output with -o.",
        )
    shutil.rmtree(partial)


def _fingerprint(plan: Plan, local: Source, inputs: Inputs | None) -> str:
    """Return a hash of everything that decides the bytes of the result."""
    files = [*local.tensors.values(), *(ref for e in plan.experts for ref in e.refs)]
    stamps = {str(path): ref.stamp for path, ref in {ref.path: ref for ref in files}.items()}
    recipe = public_recipe(plan).model_dump_json(exclude={"verify"})
    tokens = inputs.sha256 if inputs else ""
    parts = [recipe, repr(plan.specs), json.dumps(plan.config), repr(stamps), tokens]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _write_tensors(
    plan: Plan,
    weights: Mapping[str, Weight],
    make: Maker,
    writer: CheckpointWriter,
    progress: Progress,
) -> dict[str, str]:
    total = sum(spec.num_bytes for spec in plan.specs)
    done, layers = 0, plan.layout.body.num_layers
    for number, (step, layer, tensors) in enumerate(lay_out(plan.layout, weights, make)):
        names = [name for name, _ in tensors]
        if writer.skip_step(step, names):
            tensors = [(name, writer.written(name)) for name in names]
            make.pass_over(layer, tensors)
        else:
            for name, weight in sorted(tensors, key=_is_computed):
                writer.write(name, weight)
            writer.finish_step(step)
        make.leave(layer, tensors)
        done += sum(weight.num_bytes for _, weight in tensors)
        if plan.recipe.carves:  # whose layers take long, however few bytes they have
            progress("split", min(number, layers), layers)
        else:
            progress("convert", done, total)
    return writer.finish()


def _is_computed(named: tuple[str, Weight]) -> bool:
    """Sort what is copied, in the background, before what is computed here meanwhile."""
    return named[1].stored is None


def _weights_around(plan: Plan, local: Source) -> dict[str, Weight]:
    """Return what everything outside the experts is taken from."""
    method = plan.recipe.experts
    if isinstance(method, Compose) and method.attention == "average":
        return averaged(plan.experts)
    return {name: ref.weight() for name, ref in local.tensors.items()}


def _write_side_files(plan: Plan, local: Source, partial: Path) -> None:
    config = json.dumps(dict(plan.config), indent=2, sort_keys=True) + "\n"
    (partial / "config.json").write_text(config, encoding="utf-8")
    recipe = public_recipe(plan)
    (partial / "recipe.yaml").write_text(recipe.as_yaml(), encoding="utf-8")
    for name, path in plan.target.files.items():
        shutil.copyfile(path, partial / name)
    for file in local.side_files():
        target = partial / file
        target.parent.mkdir(parents=True, exist_ok=True)
        assert local.folder is not None
        shutil.copyfile(local.folder / file, target)


def public_recipe(plan: Plan) -> Recipe:
    """Return the resolved recipe without local paths: what is written beside the weights."""
    recipe, model = plan.recipe, plan.recipe.source.model
    source = recipe.source.model_copy(
        update={
            "model": model if model.startswith("package://") else plan.source.name,
            "revision": plan.source.sha if plan.source.revision else recipe.source.revision,
            "download": True,
        }
    )
    target = recipe.target.model_copy(
        update={"architecture": plan.target.recipe_name, "active": None}
    )
    experts: Method = recipe.experts
    if isinstance(experts, Compose):
        experts = experts.model_copy(update={"sources": _public_sources(experts, plan.experts)})
    if isinstance(experts, Split):
        experts = experts.resolved(gpu=chosen_device(recipe.runtime.device) == "cuda")
    router = recipe.router.model_copy(update={"init": recipe.router.kind})
    data = recipe.data.public
    output = recipe.output.model_copy(update={"dir": None, "overwrite": False})
    runtime = recipe.runtime.model_copy(update={"offload_dir": None})
    return recipe.model_copy(
        update={
            "source": source,
            "target": target,
            "experts": experts,
            "router": router,
            "data": data,
            "output": output,
            "runtime": runtime,
            "push": PushSection(),
        }
    )


def _public_sources(
    method: Compose, experts: tuple[ExpertSource, ...]
) -> tuple[ComposeSource, ...]:
    return tuple(
        wanted.model_copy(
            update={
                "model": wanted.model if wanted.model.startswith("package://") else expert.name,
                "revision": expert.sha or wanted.revision,
            }
        )
        for wanted, expert in zip(method.sources, experts, strict=True)
    )


def _manifest(
    plan: Plan,
    local: Source,
    partial: Path,
    hashes: dict[str, str],
    warnings: list[Warning_],
    hashing: Hashing,
) -> Manifest:
    files = [path for path in sorted(partial.rglob("*")) if path.is_file()]
    infos = [
        FileInfo(
            path=str(path.relative_to(partial)),
            size=path.stat().st_size,
            sha256=hashes.get(path.name) or sha256_of(path),
        )
        for path in files
        if path.name not in {*WORKING_NAMES, MANIFEST_NAME}
    ]
    notes = [Warning_(code=n.code, message=n.message, hint=n.hint) for n in plan.warnings]
    return Manifest(
        schema=SCHEMA,
        exact=plan.exact,
        created_at=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        recipe=public_recipe(plan).model_dump(mode="json", by_alias=True),
        source=with_origin(source_info(plan, local), local.folder, hashing.of(files_of(local))),
        expert_sources=[
            with_origin(expert_info(plan, one), one.folder, hashing.of(expert_files(one)))
            for one in plan.experts
        ],
        target=target_info(plan).model_copy(update={"files": infos}),
        warnings=[*notes, *warnings],
        versions=versions(),
        hardware=hardware(),
        engines={name: list(notes) for name, notes in plan.engines.items()},
    )


def source_info(plan: Plan, local: Source | None = None) -> SourceInfo:
    """Describe the dense checkpoint."""
    source = plan.source
    return SourceInfo(
        id=source.name,
        revision=source.revision,
        sha=source.sha,
        architecture=plan.layout.family.architecture,
        params=plan.params_dense,
        dtype=source.dtype,
        license=source.license or (local.license if local else None),
    )


def expert_info(plan: Plan, expert: ExpertSource) -> SourceInfo:
    """Describe a checkpoint that experts come from."""
    return SourceInfo(
        id=expert.name,
        revision=expert.revision,
        sha=expert.sha,
        architecture=plan.layout.family.architecture + (" LoRA" if expert.adapter else ""),
        params=expert.num_params,
        dtype=expert.dtype,
        license=None if expert.adapter else expert.source.license,
    )


def target_info(plan: Plan) -> TargetInfo:
    """Describe the planned result."""
    shape = plan.shape
    return TargetInfo(
        architecture=plan.target.model_type,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        shared_experts=shape.num_shared,
        moe_layers=list(shape.moe_layers),
        expert_size=shape.expert_size,
        null_experts=shape.null_experts,
        mean_k=shape.mean_k,
        params_total=plan.params_total,
        params_active=plan.params_active,
        float32=[spec.name for spec in plan.specs if spec.dtype == "F32" != plan.dtype],
    )


def _nonfinite_warnings(refs: list[TensorRef], broken: list[Future[bool]]) -> list[Warning_]:
    names = [ref.name for ref, found in zip(refs, broken, strict=True) if found.result()]
    return [
        Warning_(
            code="nonfinite",
            message=f"The source's tensor {name} holds NaN or infinity.",
            hint="The result will too; check the source.",
        )
        for name in names
    ]


def _publish(plan: Plan, partial: Path) -> None:
    output = plan.output.absolute()
    if output.exists():
        old = Path(tempfile.mkdtemp(prefix=f"{output.name}.old-", dir=output.parent))
        output.rename(old / output.name)
        partial.rename(output)
        shutil.rmtree(old)
    else:
        partial.rename(output)
