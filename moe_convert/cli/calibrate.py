"""The command that trains a converted model a little."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_convert.cli.base import app, command
from moe_convert.console import Output
from moe_convert.errors import MoeConvertError
from moe_convert.options import CHOICES, changes_from

if TYPE_CHECKING:
    from moe_convert.manifest import CalibrationReport, Manifest
    from moe_convert.plan import Plan

OWN = {
    "source": Annotated[
        str | None, typer.Option(help="Dense checkpoint to learn from; default: the manifest's.")
    ],
    "resume": Annotated[
        bool | None,
        typer.Option(
            "--resume/--no-resume",
            help="Go on at the last checkpoint (default), or start anew.",
            rich_help_panel="Calibration",
        ),
    ],
    "launcher": Annotated[
        str | None,
        typer.Option(
            help="Start several processes: accelerate or torchrun, with its arguments after --; "
            "auto or none (default): this process, or those of a launcher that started it.",
            rich_help_panel="Runtime",
        ),
    ],
}
DATA_HELP = (
    "Text to learn from: a .txt, .jsonl or .parquet file, a glob, org/name on the Hub, self, which "
    "the source writes, or self:TEXT, of which it continues pieces (default: the conversion's if "
    "that is on the Hub, or self)."
)
SHARED = ("recipe", "set_", "token", "data", "text_field", "device")
"""Options of `upcycle` that mean the same here, beside those of its panel Calibration."""


def _names() -> list[str]:
    own = [name for name, choice in CHOICES.items() if choice.panel == "Calibration"]
    return [*SHARED, *(name for name in own if name != "calibrate")]


def options(function: Callable[..., None]) -> Callable[..., None]:
    """Give the command MODEL, its options and the launcher's arguments."""

    def run(out: Output, /, model: Path, arguments: list[str] | None, **values: Any) -> None:
        function(out, model, arguments or [], values)

    keyword = inspect.Parameter.KEYWORD_ONLY
    kinds = {
        "model": Annotated[Path, typer.Argument(help="Folder that `upcycle` wrote.")],
        "arguments": Annotated[
            list[str] | None,
            typer.Argument(help="After --: arguments for the launcher.", metavar="[-- ARGS]"),
        ],
        **{name: CHOICES[name].annotation for name in _names()},
        "data": CHOICES["data"]._replace(text=DATA_HELP).annotation,
        **OWN,
    }
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter("out", inspect.Parameter.POSITIONAL_ONLY),
            inspect.Parameter("model", keyword, annotation=kinds.pop("model")),
            *(
                inspect.Parameter(name, keyword, annotation=kind, default=None)
                for name, kind in kinds.items()
            ),
        ]
    )
    run.__doc__ = function.__doc__
    return run


@command(app, "calibrate")
@options
def calibrate(output: Output, model: Path, arguments: list[str], values: dict[str, Any]) -> None:
    """Train routers, experts or all of a result on a few tokens; an interrupted run goes on."""
    from moe_convert.calibrating import Processes, calibrate_folder, calibration_request

    is_main = os.environ.get("RANK", "0") == "0"
    launcher = "none" if values["launcher"] in {None, "auto"} else values["launcher"]
    processes = Processes(launcher, tuple(arguments))
    with output.progress() as progress:
        request = calibration_request(
            model,
            changes_from(values, _names()),
            values["recipe"],
            source=values["source"],
            token=values["token"],
            resume=values["resume"] is not False,
            processes=processes,
            progress=progress,
        )
    report = calibrate_folder(
        request, processes, output.err, show=is_main and output.human and output.show_progress
    )
    if is_main:
        show_report(output, model, report)


def calibrate_result(output: Output, plan: Plan, manifest: Manifest) -> Manifest:
    """Calibrate what `upcycle` made, where its plan says so; return the new manifest.

    Raises:
        VerificationError: it diverged or missed a gate.
        InterruptedByUser: a checkpoint has been written.
    """
    from moe_convert.calibrating import calibrate_plan, calibrates, require_gates
    from moe_convert.manifest import load_manifest

    if not calibrates(plan):
        return manifest

    show = output.human and output.show_progress
    with output.progress() as progress:
        report = calibrate_plan(plan, output.err, show=show, progress=progress)
    require_gates(report, plan.output)
    return load_manifest(plan.output)


def print_calibration(console: Any, report: CalibrationReport | None) -> None:
    """Print what calibration changed, if there was one."""
    from moe_convert.calibrate.panel import lines, table

    if report is not None:
        console.print(table(report))
        for line in lines(report):
            console.print(line, markup=False)


def show_report(output: Output, folder: Path, report: CalibrationReport) -> None:
    """Print the result of the command.

    Raises:
        Exit: a gate failed.
    """
    from moe_convert.calibrating import require_gates

    def human(console: Any) -> None:
        print_calibration(console, report)
        console.print(f"{'failed' if report.failures else 'calibrated'}  {folder}", markup=False)

    sections = {"calibration": report.model_dump(), "artifacts": {"model": str(folder)}}
    try:
        require_gates(report, folder)
    except MoeConvertError as error:
        output.fail(sections, error, human)
        raise typer.Exit(error.exit_code) from None
    output.result(sections, quiet=str(folder), human=human)
