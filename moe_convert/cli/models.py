"""Commands that make and check models."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_convert.cli.base import app, command
from moe_convert.console import Output
from moe_convert.errors import MoeConvertError, OutputExistsError, VerificationError
from moe_convert.options import conversion, recipe_from

if TYPE_CHECKING:
    from moe_convert.hub import Pushed
    from moe_convert.plan import Plan


def _plan(output: Output, values: dict[str, Any], *, only_plan: bool) -> Plan:
    recipe = recipe_from(values)
    with output.busy("reading headers"):
        from moe_convert.plan import make_plan

        return make_plan(recipe, values["token"], only_plan=only_plan)


def _print_plan(output: Output, plan: Plan) -> None:
    from moe_convert.console import plan_sections, plan_table, tensor_table

    def human(console: Any) -> None:
        console.print(plan_table(plan))
        if output.verbose:
            console.print(tensor_table(plan))

    output.warn(plan.warnings)
    output.result(plan_sections(plan), quiet=str(plan.output), human=human, status="planned")


@command(app, "upcycle")
@conversion
def upcycle(output: Output, values: dict[str, Any]) -> None:
    """Convert a dense checkpoint, check the result against it, and leave a finished folder."""
    plan = _plan(output, values, only_plan=bool(values["dry_run"]))
    if values["dry_run"]:
        _print_plan(output, plan)
        return
    from moe_convert.cli.calibrate import calibrate_result, print_calibration
    from moe_convert.cli.push import check_push, push_result
    from moe_convert.console import (
        manifest_sections,
        plan_table,
        push_lines,
        routing_lines,
        sensitivity_lines,
        split_lines,
        verify_lines,
    )
    from moe_convert.convert import check_output
    from moe_convert.workflow import require_passed
    from moe_convert.workflow import upcycle as run

    check_output(plan)
    output.say(plan_table(plan))
    output.warn(plan.warnings)
    _confirm_overwrite(output, plan, values["yes"])
    check_push(output, plan, values["token"])
    with output.progress() as progress:
        manifest = run(plan, force=bool(values["force"]), progress=progress)
    announced = {note.code for note in plan.warnings}
    output.warn(note for note in manifest.warnings if note.code not in announced)

    def human(console: Any) -> None:
        for line in routing_lines(manifest.routing) if manifest.routing else ():
            console.print(line, markup=False)
        for line in sensitivity_lines(manifest.sensitivity) if manifest.sensitivity else ():
            console.print(line, markup=False)
        for line in split_lines(manifest.split) if manifest.split else ():
            console.print(line, markup=False)
        for line in verify_lines(manifest.verify) if manifest.verify else ():
            console.print(line, markup=False)
        print_calibration(console, manifest.calibration)
        console.print(f"{manifest.state}  {plan.output}", markup=False)
        for line in push_lines(pushed, every_file=False) if pushed else ():
            console.print(line, markup=False)

    pushed: Pushed | None = None
    sections = manifest_sections(manifest, plan.output)
    try:
        require_passed(manifest.verify, plan.output)
        manifest = calibrate_result(output, plan, manifest)
        sections = manifest_sections(manifest, plan.output)
        pushed = push_result(output, plan, values["token"])
    except MoeConvertError as error:
        status = "gate_failed" if isinstance(error, VerificationError) else "failed"
        output.fail(sections, error, human, status)
        raise typer.Exit(error.exit_code) from None
    hub = {"hub": pushed.section} if pushed else {}
    output.result({**sections, **hub}, quiet=str(plan.output), human=human)


def _confirm_overwrite(output: Output, plan: Plan, yes: bool) -> None:
    asks = plan.output.exists() and output.human and sys.stdin.isatty() and not yes
    if asks and not typer.confirm(f"Replace {plan.output}?", err=True):
        raise OutputExistsError(f"{plan.output} was left as it is.")


@command(app, "plan")
@conversion
def plan(output: Output, values: dict[str, Any]) -> None:
    """Show what `upcycle` would write and take, from headers alone."""
    _print_plan(output, _plan(output, values, only_plan=True))


@command(app, "verify")
def verify(
    output: Output,
    model: Annotated[Path, typer.Argument(help="Folder that `upcycle` wrote.")],
    source: Annotated[
        str | None, typer.Option(help="Dense checkpoint to compare with; default: the manifest's.")
    ] = None,
    token: Annotated[str | None, typer.Option(help="Hub token.")] = None,
) -> None:
    """Reload a result: keys, shapes, dtypes, NaN, tokenizer, logits against the dense model."""
    from moe_convert.console import verify_lines, verify_section
    from moe_convert.workflow import require_passed, verify_folder

    with output.progress() as progress:
        report, _ = verify_folder(model, source, token, progress)

    def human(console: Any) -> None:
        for line in verify_lines(report):
            console.print(line, markup=False)
        console.print("ok" if report.passed else "fail")

    sections = {"verify": verify_section(report)}
    try:
        require_passed(report, model)
    except MoeConvertError as error:
        output.fail(sections, error, human)
        raise typer.Exit(error.exit_code) from None
    output.result(sections, quiet="ok", human=human)
