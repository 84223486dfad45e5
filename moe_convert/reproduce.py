"""Make a result again from its manifest, and say whether every byte is the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from moe_convert.checkpoint import Source, TensorRef, read_folder, sha256_of
from moe_convert.convert import Progress, check_output, convert, silent
from moe_convert.errors import OutputExistsError, SourceError, UsageError
from moe_convert.experts import Compose
from moe_convert.manifest import Manifest, SourceInfo, load_manifest, versions
from moe_convert.plan import Plan, check_fits, make_plan
from moe_convert.provenance import (
    calibrations,
    differing,
    expert_files,
    files_of,
    local_data,
    named_only,
    unnamed,
)
from moe_convert.recipe import Recipe

if TYPE_CHECKING:
    import torch

RECIPE_NAME = "recipe.yaml"
NOT_COMPARED = frozenset({RECIPE_NAME})
"""What says how a folder was made, the name of its source included, and not what it is."""


@dataclass(frozen=True)
class Places:
    """Where things are that the manifest knows by name only."""

    source: str | None = None
    experts: Sequence[str] = ()
    data: str | None = None


@dataclass(frozen=True)
class TensorChange:
    """A tensor that came out differently; by how much, where shapes and dtypes agree."""

    name: str
    what: str
    max_abs_diff: float | None = None
    share: float | None = None


@dataclass(frozen=True)
class Reproduction:
    """What came of it: `versions` are then and now, where they differ; `notes` what else does."""

    output: Path
    files: list[str]
    tensors: list[TensorChange]
    versions: dict[str, tuple[str, str]]
    notes: list[str] = field(default_factory=list)

    @property
    def equal(self) -> bool:
        """Whether every file has the hash that the manifest says."""
        return not self.files


def reproduce(
    folder: Path,
    output: Path | None = None,
    places: Places | None = None,
    *,
    token: str | None = None,
    progress: Progress = silent,
) -> Reproduction:
    """Run what a folder's manifest says into a new folder and compare the two.

    Tensors are compared only where the folder holds its weights; the manifest alone tells whether
    the bytes are the same.

    Raises:
        UsageError: something is known by its name only, and nobody said where it is.
        SourceError: the source is another checkpoint than the recorded one.
        OutputExistsError: the new folder exists.
    """
    manifest = load_manifest(folder)
    target = output or folder.resolve().with_name(f"{folder.resolve().name}-reproduced")
    if target.exists():
        raise OutputExistsError(f"{target} exists already.", "Choose another name with -o.")
    places = places or Places()
    recipe = recipe_again(manifest, Recipe.model_validate(manifest.recipe), places, target)
    trained = [recipe_again(manifest, one, places, target) for one in calibrations(manifest)]
    plan = make_plan(recipe, token)
    check_output(plan)
    check_fits(plan, force=False)
    _check_sources(manifest, plan)
    made = convert(plan, progress)
    for one in trained:
        made = _calibrated(one, plan, target, progress)
    return compare(folder, manifest, target, made)


def recipe_again(manifest: Manifest, recipe: Recipe, places: Places, output: Path) -> Recipe:
    """Return a recorded recipe with everything in its place.

    Raises:
        UsageError: a place is missing; the sentence names the option.
    """
    given = {"--source": places.source, "--source-expert": places.experts, "--data": places.data}
    for option, name in unnamed(manifest, recipe):
        if not given[option]:
            raise UsageError(
                f"{name} is recorded by its name only, not by where it is.", f"Give {option} PATH."
            )
    changes: dict[str, object] = {
        "output": recipe.output.model_copy(update={"dir": str(output), "overwrite": False})
    }
    if places.source:
        changes["source"] = recipe.source.model_copy(update={"model": places.source})
    if isinstance(recipe.experts, Compose):
        changes["experts"] = _placed(recipe.experts, manifest, places.experts)
    if places.data and local_data(recipe):
        changes["data"] = recipe.data.placed(places.data)
    return recipe.model_copy(update=changes)


def _calibrated(recipe: Recipe, plan: Plan, output: Path, progress: Progress) -> Manifest:
    """Train the new folder as the old one was, on this process."""
    from moe_convert.calibrate.job import Request, prepare
    from moe_convert.calibrate.run import run

    request = Request(
        folder=output,
        source=plan.source.fetch(),
        section=recipe.calibration,
        data=recipe.data,
        resume=False,
        progress=progress,
    )
    job, ids_BT = prepare(request)
    run(job, ids_BT)
    return load_manifest(output)


def _placed(method: Compose, manifest: Manifest, given: Sequence[str]) -> Compose:
    """Return the method with a path for every source that has only a name, in their order."""
    names = dict.fromkeys(
        wanted.model
        for info, wanted in zip(manifest.expert_sources, method.sources, strict=True)
        if named_only(info, wanted.model)
    )
    if len(names) != len(given):
        raise UsageError(
            f"{len(names)} of the composed checkpoints are recorded by name only "
            f"({', '.join(names)}), and {len(given)} were given.",
            "Give --source-expert PATH for each, in this order.",
        )
    paths = dict(zip(names, given, strict=True))
    sources = (s.model_copy(update={"model": paths.get(s.model, s.model)}) for s in method.sources)
    return method.model_copy(update={"sources": tuple(sources)})


def _check_sources(manifest: Manifest, plan: Plan) -> None:
    """Refuse other checkpoints than the recorded ones, before anything is written."""
    local = plan.source.fetch()
    _check_source(manifest.source, plan.source, files_of(local) if not plan.source.sha else {})
    for info, expert in zip(manifest.expert_sources, plan.experts, strict=True):
        _check_source(info, expert.source, expert_files(expert.fetch()))


def _check_source(recorded: SourceInfo, source: Source, files: dict[str, Path]) -> None:
    if files and recorded.files:
        hashes = {name: sha256_of(path) for name, path in files.items()}
        others = differing(recorded, hashes)
    else:
        others = ["its hash"] if source.sha and recorded.sha not in {None, source.sha} else []
    if others:
        raise SourceError(
            f"{source.name} is another checkpoint than the {recorded.id} that was converted: "
            f"{others[0]} differs" + (f", and {len(others) - 1} more." if others[1:] else "."),
            "Give the one whose SHA-256 the manifest lists.",
        )


def compare(folder: Path, manifest: Manifest, output: Path, made: Manifest) -> Reproduction:
    """Hold a new result against the recorded hashes, and its tensors against those of `folder`."""
    then, now = _hashes(manifest), _hashes(made)
    files = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
    known, current = manifest.versions, versions()
    return Reproduction(
        output,
        files,
        list(_changes(folder, output, set(files))),
        {
            name: (known.get(name, "none"), current.get(name, "none"))
            for name in known | current
            if known.get(name) != current.get(name)
        },
        list(_notes(manifest, made)),
    )


def _notes(manifest: Manifest, made: Manifest) -> Iterator[str]:
    """Yield what else may explain a difference."""
    tokens = {one.routing.tokens_sha256 for one in (manifest, made) if one.routing}
    if len(tokens) > 1:
        yield "the data gave other tokens than were used then"
    before, after = manifest.calibration, made.calibration
    if before and after and before.num_processes != after.num_processes:
        yield f"it was trained on {before.num_processes} processes then, and on one now"
    if manifest.hardware["machine"] != made.hardware["machine"]:
        yield f"it was made on {manifest.hardware['machine']}"
    cards = [one.hardware.get("gpu", "no GPU") for one in (manifest, made)]
    if cards[0] != cards[1]:
        yield f"it was made with {cards[0]} then, and with {cards[1]} now"


def _hashes(manifest: Manifest) -> dict[str, str]:
    return {f.path: f.sha256 for f in manifest.target.files if f.path not in NOT_COMPARED}


def _changes(folder: Path, output: Path, files: set[str]) -> Iterator[TensorChange]:
    """Yield the tensors that differ, of those in files that differ."""
    if not any(name.endswith(".safetensors") and (folder / name).is_file() for name in files):
        return
    then, now = read_folder(folder), read_folder(output)
    for name in sorted(then.keys() | now.keys()):
        if name not in now:
            yield TensorChange(name, "is missing")
        elif name not in then:
            yield TensorChange(name, "is new")
        elif {then[name].path.name, now[name].path.name} & files:
            yield from _change(then[name], now[name])


def _change(then: TensorRef, now: TensorRef) -> Iterator[TensorChange]:
    if (then.dtype, then.shape) != (now.dtype, now.shape):
        was, is_now = (f"{ref.dtype}{list(ref.shape)}" for ref in (then, now))
        yield TensorChange(now.name, f"is {is_now} and was {was}")
        return
    one, other = then.read(), now.read()
    if not _same_bits(one, other):
        distance = (one.double() - other.double()).abs()
        share = float((one != other).double().mean())
        yield TensorChange(now.name, "differs", float(distance.max()), share)


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    import torch

    flat = (tensor.contiguous().view(-1).view(torch.uint8) for tensor in (one, other))
    return bool(torch.equal(*flat))
