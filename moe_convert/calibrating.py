"""What `calibrate` does, from options to a trained folder: on this process, or on several."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_convert.calibration import wanted
from moe_convert.checkpoint import Source, open_source
from moe_convert.checkpoint.replace import recover
from moe_convert.errors import (
    InterruptedByUser,
    MoeConvertError,
    UsageError,
    VerificationError,
)
from moe_convert.manifest import CalibrationReport, load_manifest
from moe_convert.provenance import local_data
from moe_convert.recipe import Recipe, build_recipe, load_recipe
from moe_convert.runtime import chosen_device

if TYPE_CHECKING:
    from rich.console import Console

    from moe_convert.calibrate.job import Request
    from moe_convert.plan import Plan

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Processes:
    """Who runs a job: this process, those of a launcher, or those of one that runs already."""

    launcher: str = "none"
    arguments: tuple[str, ...] = ()

    @property
    def started(self) -> bool:
        """Whether a launcher has started this process as one of several."""
        return int(os.environ.get("WORLD_SIZE", "1")) > 1

    @property
    def count(self) -> int:
        """How many there will be.

        Raises:
            UsageError: the launcher is unknown or is not told, or there is one already.
        """
        from moe_convert.calibrate.launch import asked_for

        if self.launcher == "none":
            if self.arguments:
                raise UsageError(
                    "Arguments after -- are for a launcher, and there is none.",
                    "Add --launcher accelerate or torchrun.",
                )
            return int(os.environ.get("WORLD_SIZE", "1"))
        if self.started:
            raise UsageError(
                "This process was started by a launcher already.", "Leave --launcher out."
            )
        return asked_for(self.launcher, self.arguments)


def calibration_request(
    folder: Path,
    changes: Mapping[str, Any],
    recipe_name: str | None = None,
    *,
    source: str | None = None,
    token: str | None = None,
    resume: bool = True,
    processes: Processes | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Request:
    """Return what options, a recipe and the folder's own recipe ask for, in falling precedence.

    Raises:
        UsageError: an option is invalid.
        SourceError: the folder is none of ours, or its dense source is not at hand.
    """
    from moe_convert.calibrate.job import Request

    count = (processes or Processes()).count
    made = load_manifest(folder).recipe
    if recipe_name:
        recipe = load_recipe(recipe_name, {"source.model": made["source"]["model"], **changes})
    else:
        recipe = build_recipe(_without_local_data(made), changes)
        _check_data(made, recipe)
    return Request(
        folder=folder,
        source=_dense(Recipe.model_validate(made), source, token),
        section=recipe.calibration,
        data=recipe.data,
        world_size=count,
        resume=resume,
        device=recipe.runtime.device,
        progress=progress,
    )


def _without_local_data(recipe: dict[str, Any]) -> dict[str, Any]:
    """Drop a local file from a recorded recipe, which keeps its name and not its place."""
    if not local_data(Recipe.model_validate(recipe)):
        return recipe
    return {**recipe, "data": {**recipe["data"], "train": None}}


def _check_data(made: dict[str, Any], recipe: Recipe) -> None:
    """Refuse to train on another text than that of the conversion where nobody asked for it.

    Raises:
        UsageError: it is a local one, whose place was not recorded, and none was given.
    """
    before = Recipe.model_validate(made)
    if recipe.data.train is None and local_data(before):
        raise UsageError(
            f"{before.data.name} is recorded by its name only, not by where it is.",
            "Give it, or another text, with --data; --data self for what the dense model writes.",
        )


def _dense(recipe: Recipe, model: str | None, token: str | None) -> Source:
    """Open the dense source, with its files at hand.

    Raises:
        UsageError: it is a local one, whose place was not recorded, and none was given.
    """
    if model is not None:
        return open_source(model, token=token).fetch()
    try:
        return open_source(recipe.source.model, recipe.source.revision, token).fetch()
    except MoeConvertError as error:
        raise UsageError(
            f"The dense source {recipe.source.model} is not at hand: {error.message}",
            "Give it with --source.",
        ) from error


def calibrate_folder(
    request: Request, processes: Processes, console: Console, *, show: bool
) -> CalibrationReport:
    """Train a folder as requested; `show` draws progress on the console.

    Where an earlier run was killed while it put the trained weights in their places, this is
    finished instead, and its report returned. Nobody else can train the folder meanwhile.

    Raises:
        UsageError: a setting cannot work, the data cannot be read, or somebody trains the folder.
        VerificationError: the run diverged; the weights are those of the start.
        KeyboardInterrupt: it was interrupted; a checkpoint has been written.
    """
    from moe_convert.calibrate.alone import alone

    is_main = os.environ.get("RANK", "0") == "0"
    with alone(request.folder) if is_main else contextlib.nullcontext():
        return _calibrate(request, processes, console, show=show)


def _calibrate(
    request: Request, processes: Processes, console: Console, *, show: bool
) -> CalibrationReport:
    from moe_convert.calibrate.job import prepare
    from moe_convert.calibrate.launch import launched
    from moe_convert.calibrate.panel import watcher
    from moe_convert.calibrate.run import run

    if _finished(request, processes) and request.resume:
        return _earlier(request, console, show=show)
    if processes.started:
        _wait_for_main(request)
    job, ids_BT = prepare(request)
    if processes.launcher != "none":
        watch = "show" if show else "hide"
        path = job.save(ids_BT)
        report = launched(path, processes.launcher, processes.arguments, watch)
    else:
        with watcher(console, show=show) as watching:
            report = run(job, ids_BT, watching)
    return report


def _finished(request: Request, processes: Processes) -> bool:
    """Finish what an earlier run was killed in; return, in every process, whether it was so."""
    if not processes.started:
        return recover(request.folder)
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    state = PartialState(cpu=chosen_device(request.device) == "cpu")
    found = [state.is_main_process and recover(request.folder)]
    return bool(broadcast_object_list(found)[0])


def _earlier(request: Request, console: Console, *, show: bool) -> CalibrationReport:
    """Return the report of a run whose result is in place only now."""
    from moe_convert.calibrate.panel import watcher

    with watcher(console, show=show) as watching:
        watching.phase("an earlier run had trained it and was killed while writing: finished now")
    report = load_manifest(request.folder).calibration
    assert report is not None
    return report


def calibrates(plan: Plan) -> bool:
    """Return whether `upcycle` goes on to calibrate what this plan makes."""
    gpu = chosen_device(plan.recipe.runtime.device) == "cuda"
    return wanted(plan.recipe.calibration, plan.recipe.experts, plan.exact, gpu=gpu)


def calibrate_plan(
    plan: Plan, console: Console, *, show: bool, progress: Progress
) -> CalibrationReport:
    """Train the folder that a plan made.

    Raises:
        VerificationError: the run diverged; the weights are those of the start.
        InterruptedByUser: it was interrupted; a checkpoint has been written.
    """
    from moe_convert.calibrate.job import Request

    request = Request(
        folder=plan.output,
        source=plan.source.fetch(),
        section=plan.recipe.calibration,
        data=plan.recipe.data,
        device=plan.recipe.runtime.device,
        progress=progress,
    )
    try:
        return calibrate_folder(request, Processes(), console, show=show)
    except KeyboardInterrupt:
        raise InterruptedByUser(
            f"Interrupted; {plan.output} is whole, and its calibration can go on.",
            f"Resume with: moe-convert calibrate {plan.output}, --source and --data as before.",
        ) from None


def _wait_for_main(request: Request) -> None:
    """Let the main process repair the folder and read or write the text before the others."""
    from accelerate import PartialState

    from moe_convert.calibrate.job import prepare

    cpu = chosen_device(request.device) == "cpu"
    with PartialState(cpu=cpu).main_process_first():
        prepare(request)


def require_gates(report: CalibrationReport, folder: Path) -> None:
    """Turn a gate that was not passed into an error.

    Raises:
        VerificationError: with the first one.
    """
    if report.failures:
        raise VerificationError(
            f"Calibration of {folder} missed a gate: {report.failures[0]}.",
            "The folder is kept and marked as failed in moe_convert.json.",
        )
