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
from pathlib import Path
from typing import TYPE_CHECKING

from moe_convert.checkpoint import CheckpointWriter, Source, sha256_of
from moe_convert.edits import edited
from moe_convert.errors import MoeConvertError, OutputExistsError, UsageError
from moe_convert.ffn import Experts, Weight, gather
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
from moe_convert.recipe import Recipe
from moe_convert.streams import DenseStream, sample_ids

if TYPE_CHECKING:
    import torch

PLAN_NAME = ".plan"

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
    local = plan.source.fetch()
    progress("source", 1, 1)
    partial = _open_partial(plan, local)
    with ThreadPoolExecutor(max_workers=1) as pool:
        broken = [pool.submit(ref.nonfinite) for ref in local.tensors.values()]
        try:
            hashes = _write_tensors(plan, local, partial, progress)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        warnings = _nonfinite_warnings(local, broken)
    _write_side_files(plan, local, partial)
    manifest = _manifest(plan, local, partial, hashes, warnings)
    manifest.save(partial)
    (partial / PLAN_NAME).unlink()
    _publish(plan, partial)
    return manifest


def check_output(plan: Plan) -> None:
    """Refuse an output folder that exists, or that is the source itself.

    Raises:
        OutputExistsError: it exists and --overwrite is off, or this program did not write it.
        UsageError: it is the source folder.
    """
    output = plan.output
    if plan.source.folder and output.resolve() == plan.source.folder.resolve():
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


def _open_partial(plan: Plan, local: Source) -> Path:
    """Create the folder under construction, or take up the one that the same plan left."""
    partial = plan.output.absolute().with_name(plan.output.absolute().name + ".partial")
    fingerprint = _fingerprint(plan, local)
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


def _fingerprint(plan: Plan, local: Source) -> str:
    """Return a hash of everything that decides the bytes of the result."""
    stamps = {
        str(ref.path): (ref.path.stat().st_size, ref.path.stat().st_mtime_ns)
        for ref in local.tensors.values()
    }
    recipe = public_recipe(plan).model_dump_json(exclude={"verify"})
    parts = [recipe, repr(plan.specs), json.dumps(plan.config), repr(stamps)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _write_tensors(plan: Plan, local: Source, partial: Path, progress: Progress) -> dict[str, str]:
    writer = CheckpointWriter(partial, plan.shards)
    weights = {name: ref.weight() for name, ref in local.tensors.items()}
    total = sum(spec.num_bytes for spec in plan.specs)
    done = 0
    try:
        for step, _, tensors in lay_out(plan.layout, weights, LayerMaker(plan, local, weights)):
            if not writer.skip_step(step, [name for name, _ in tensors]):
                for name, weight in tensors:
                    writer.write(name, weight)
                writer.finish_step(step)
            done += sum(weight.num_bytes for _, weight in tensors)
            progress("convert", done, total)
        return writer.finish()
    finally:
        writer.close()


class LayerMaker:
    """Makes experts and router of one layer; what needs the model's states runs it that far."""

    def __init__(self, plan: Plan, local: Source, weights: Mapping[str, Weight]) -> None:
        """Prepare; nothing is read or run yet."""
        self._plan, self._local, self._weights = plan, local, weights
        self._stream: DenseStream | None = None

    def __call__(self, layer: int) -> tuple[Experts, Weight]:
        """Return the layer's experts and router rows [E, D], lazily loaded."""
        plan = self._plan
        layout, shape = plan.layout, plan.shape
        dense = layout.family.ffn(layer, self._weights, layout.body).cast(plan.dtype)
        method = plan.recipe.experts
        assignment = method.assign(dense.num_neurons, plan.target, shape, layer)
        experts = gather((dense,), assignment)
        experts = edited(experts, method.edits, method.seed, layer)
        size = (shape.num_experts, layout.body.hidden_size)
        return experts, Weight(size, plan.dtype, lambda: self._router(layer))

    def _router(self, layer: int) -> torch.Tensor:
        router, body = self._plan.recipe.router, self._plan.layout.body
        copies = self._plan.recipe.experts.shared_rows
        num_rows = -(-self._plan.shape.num_experts // copies)
        rows_ED = router.rows(num_rows, body.hidden_size, layer).repeat_interleave(copies, dim=0)
        rows_ED = rows_ED[: self._plan.shape.num_experts]
        if router.needs_input:
            return router.scaled(rows_ED, self._reach(layer), None)
        norm = self._plan.layout.family.norm_before_ffn(layer, self._weights, body)
        return router.scaled(rows_ED, None, norm.load() if norm else None)

    def _reach(self, layer: int) -> torch.Tensor:
        """Return what the FFN of this layer receives on the sample text."""
        if self._stream is None:
            ids_BT = sample_ids(self._local.folder, self._plan.layout.body.vocab_size)
            config, family = self._local.config, self._plan.layout.family
            self._stream = DenseStream(config, family, self._weights, ids_BT)
        return self._stream.reach(layer)


def _write_side_files(plan: Plan, local: Source, partial: Path) -> None:
    config = json.dumps(dict(plan.config), indent=2, sort_keys=True) + "\n"
    (partial / "config.json").write_text(config, encoding="utf-8")
    recipe = public_recipe(plan)
    (partial / "recipe.yaml").write_text(recipe.as_yaml(), encoding="utf-8")
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
        }
    )
    target = recipe.target.model_copy(update={"architecture": plan.target.model_type})
    router = recipe.router.model_copy(update={"init": recipe.router.kind})
    output = recipe.output.model_copy(update={"dir": None, "overwrite": False})
    return recipe.model_copy(
        update={"source": source, "target": target, "router": router, "output": output}
    )


def _manifest(
    plan: Plan, local: Source, partial: Path, hashes: dict[str, str], warnings: list[Warning_]
) -> Manifest:
    files = [path for path in sorted(partial.rglob("*")) if path.is_file()]
    infos = [
        FileInfo(
            path=str(path.relative_to(partial)),
            size=path.stat().st_size,
            sha256=hashes.get(path.name) or sha256_of(path),
        )
        for path in files
        if path.name not in {PLAN_NAME, MANIFEST_NAME}
    ]
    notes = [Warning_(code=n.code, message=n.message, hint=n.hint) for n in plan.warnings]
    return Manifest(
        schema=SCHEMA,
        exact=plan.exact,
        created_at=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        recipe=public_recipe(plan).model_dump(mode="json", by_alias=True),
        source=source_info(plan, local),
        target=target_info(plan).model_copy(update={"files": infos}),
        warnings=[*notes, *warnings],
        versions=versions(),
        hardware=hardware(),
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
        params_total=plan.params_total,
        params_active=plan.params_active,
    )


def _nonfinite_warnings(local: Source, broken: list[Future[bool]]) -> list[Warning_]:
    names = [name for name, found in zip(local.tensors, broken, strict=True) if found.result()]
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
