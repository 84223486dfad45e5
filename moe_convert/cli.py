"""The command line: parse, call one function, print, exit.

No command's `--help` imports torch; everything heavy is imported when it is needed.
"""

from __future__ import annotations

import functools
import inspect
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_convert import __version__
from moe_convert.console import Format, Output, quiet_libraries
from moe_convert.errors import MoeConvertError, OutputExistsError
from moe_convert.options import conversion, recipe_from

if TYPE_CHECKING:
    from moe_convert.plan import Plan

app = typer.Typer(
    name="moe-convert",
    help="Turn dense Hugging Face checkpoints into Mixture-of-Experts models that plain "
    "transformers loads.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
recipes_app = typer.Typer(help="The gallery of recipes.", no_args_is_help=True)
archs_app = typer.Typer(help="Dense families and MoE targets.", no_args_is_help=True)
methods_app = typer.Typer(help="Ways to make experts and routers.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")
app.add_typer(archs_app, name="archs")
app.add_typer(methods_app, name="methods")

INTERRUPTED = 130

OUTPUT_OPTIONS: dict[str, tuple[Any, Any]] = {
    "format": (
        Annotated[
            str,
            typer.Option(
                help="auto, human, json or quiet.",
                envvar="MOE_CONVERT_FORMAT",
                rich_help_panel="Output",
            ),
        ],
        "auto",
    ),
    "json": (
        Annotated[
            bool,
            typer.Option("--json", help="One JSON object on stdout.", rich_help_panel="Output"),
        ],
        False,
    ),
    "quiet": (
        Annotated[
            bool,
            typer.Option(
                "-q", "--quiet", help="One line: the path or verdict.", rich_help_panel="Output"
            ),
        ],
        False,
    ),
    "verbose": (
        Annotated[
            int,
            typer.Option(
                "-v", "--verbose", count=True, help="More messages.", rich_help_panel="Output"
            ),
        ],
        0,
    ),
    "log_file": (
        Annotated[
            Path | None,
            typer.Option(help="Also write messages to a file.", rich_help_panel="Output"),
        ],
        None,
    ),
    "no_progress": (
        Annotated[bool, typer.Option("--no-progress", help="No bars.", rich_help_panel="Output")],
        False,
    ),
}
"""Options that every command has: annotation and default by parameter."""


def command(
    group: typer.Typer, name: str, **settings: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command that takes an `Output` first and gets the common options added."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
        common = [
            inspect.Parameter(
                option, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default
            )
            for option, (annotation, default) in OUTPUT_OPTIONS.items()
        ]

        @functools.wraps(function)
        def run(**values: Any) -> None:
            chosen = {option: values.pop(option) for option in OUTPUT_OPTIONS}
            output = Output(name, _format(chosen), not chosen["no_progress"], chosen["verbose"])
            quiet_libraries(chosen["verbose"], chosen["log_file"])
            _guarded(output, lambda: function(output, **values))

        keyword = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        run.__signature__ = inspect.Signature([*keyword, *common])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in [*keyword, *common]}
        group.command(name, **settings)(run)
        return function

    return register


def _format(chosen: dict[str, Any]) -> Format:
    wanted = "json" if chosen["json"] else "quiet" if chosen["quiet"] else chosen["format"]
    formats: dict[str, Format] = {f: f for f in ("auto", "human", "json", "quiet")}  # type: ignore[misc]
    if wanted not in formats:
        raise typer.BadParameter(f"--format {wanted!r} is not one of {', '.join(formats)}")
    return formats[wanted]


def _guarded(output: Output, function: Callable[[], None]) -> None:
    """Run a command and turn every error into one line and an exit code."""
    debug = os.environ.get("MOE_CONVERT_DEBUG") == "1"
    try:
        function()
    except KeyboardInterrupt:
        interrupted = MoeConvertError("Interrupted.", f"Resume with: {_command_line()}")
        output.error(interrupted, status="interrupted")
        raise typer.Exit(INTERRUPTED) from None
    except MoeConvertError as error:
        if debug:
            raise
        output.error(error)
        raise typer.Exit(error.exit_code) from None
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        if debug:
            raise
        message = f"{type(error).__name__}: {' '.join(str(error).split())}"
        hint = "This is a bug or an unforeseen input; MOE_CONVERT_DEBUG=1 shows where."
        output.error(MoeConvertError(message, hint))
        raise typer.Exit(1) from None


def _command_line() -> str:
    import shlex

    return shlex.join(["moe-convert", *sys.argv[1:]])


def main() -> None:
    """Run the command line."""
    app()


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"moe-convert {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Turn dense Hugging Face checkpoints into Mixture-of-Experts models."""


def _plan(output: Output, values: dict[str, Any]) -> Plan:
    recipe = recipe_from(values)
    with output.busy("reading headers"):
        from moe_convert.plan import make_plan

        return make_plan(recipe, values["token"])


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
    plan = _plan(output, values)
    if values["dry_run"]:
        _print_plan(output, plan)
        return
    from moe_convert.console import manifest_sections, plan_table, verify_lines
    from moe_convert.convert import check_output
    from moe_convert.workflow import require_passed
    from moe_convert.workflow import upcycle as run

    check_output(plan)
    output.say(plan_table(plan))
    output.warn(plan.warnings)
    _confirm_overwrite(output, plan, values["yes"])
    with output.progress() as progress:
        manifest = run(plan, force=bool(values["force"]), progress=progress)
    output.warn(note for note in manifest.warnings if note.code == "nonfinite")

    def human(console: Any) -> None:
        for line in verify_lines(manifest.verify) if manifest.verify else ():
            console.print(line, markup=False)
        console.print(f"{manifest.state}  {plan.output}", markup=False)

    try:
        require_passed(manifest.verify, plan.output)
    except MoeConvertError as error:
        sections = manifest_sections(manifest, plan.output)
        output.fail(sections, error, human)
        raise typer.Exit(error.exit_code) from None
    output.result(manifest_sections(manifest, plan.output), quiet=str(plan.output), human=human)


def _confirm_overwrite(output: Output, plan: Plan, yes: bool) -> None:
    asks = plan.output.exists() and output.human and sys.stdin.isatty() and not yes
    if asks and not typer.confirm(f"Replace {plan.output}?", err=True):
        raise OutputExistsError(f"{plan.output} was left as it is.")


@command(app, "plan")
@conversion
def plan(output: Output, values: dict[str, Any]) -> None:
    """Show what `upcycle` would write and take, from headers alone."""
    _print_plan(output, _plan(output, values))


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


@command(recipes_app, "ls")
def recipes_ls(output: Output) -> None:
    """List the recipes that come with moe-convert."""
    from moe_convert.recipe import gallery, load_recipe

    found = {name: load_recipe(name).description or "" for name in gallery()}

    def human(console: Any) -> None:
        for name, description in found.items():
            console.print(f"[bold]{name}[/]  {description}")

    output.result({"recipes": found}, quiet="\n".join(found), human=human)


@command(recipes_app, "show")
def recipes_show(
    output: Output, name: Annotated[str, typer.Argument(help="Gallery name or file.")]
) -> None:
    """Print a recipe as it is written, comments included."""
    from moe_convert.recipe import find_recipe

    text = find_recipe(name).read_text(encoding="utf-8")
    output.result(
        {"recipe": text}, quiet=text.rstrip(), human=lambda c: c.print(text.rstrip(), markup=False)
    )


@command(recipes_app, "copy")
def recipes_copy(
    output: Output,
    name: Annotated[str, typer.Argument(help="Gallery name.")],
    destination: Annotated[Path, typer.Argument(help="File or folder.")] = Path(),
) -> None:
    """Copy a recipe to edit it."""
    from moe_convert.recipe import find_recipe

    source = find_recipe(name)
    path = destination / source.name if destination.is_dir() else destination
    if path.exists():
        raise OutputExistsError(f"{path} exists already.", "Choose another name.")
    shutil.copyfile(source, path)
    output.result(
        {"artifacts": {"recipe": str(path)}},
        quiet=str(path),
        human=lambda c: c.print(f"copied to {path}", markup=False),
    )


@command(recipes_app, "validate")
def recipes_validate(
    output: Output, file: Annotated[str, typer.Argument(help="Gallery name or file.")]
) -> None:
    """Check a recipe's fields without touching its source."""
    from moe_convert.recipe import load_recipe

    recipe = load_recipe(file)
    output.result(
        {"recipe": recipe.model_dump(mode="json", by_alias=True)},
        quiet="ok",
        human=lambda c: c.print("ok"),
    )


@command(recipes_app, "schema")
def recipes_schema(output: Output) -> None:
    """Print the JSON Schema of recipes, for editors."""
    import json

    from moe_convert.recipe import Recipe

    schema = Recipe.model_json_schema(by_alias=True)
    text = json.dumps(schema, indent=2)
    output.result({"json_schema": schema}, quiet=text, human=lambda c: c.print(text, markup=False))


@command(archs_app, "ls")
def archs_ls(output: Output) -> None:
    """List every dense family and the targets proved for it."""
    from moe_convert.families import FAMILIES

    found = {name: list(row.targets) for name, row in FAMILIES.items()}

    def human(console: Any) -> None:
        from rich.table import Table

        table = Table("dense family", "MoE targets, first choice first", "for example", box=None)
        for row in FAMILIES.values():
            table.add_row(row.model_type, ", ".join(row.targets), row.examples)
        console.print(table)

    output.result({"architectures": found}, quiet="\n".join(found), human=human)


@command(archs_app, "show")
def archs_show(
    output: Output, name: Annotated[str, typer.Argument(help="Dense family or MoE target.")]
) -> None:
    """Show what a family maps to, or what a target can and cannot hold."""
    from moe_convert.describe import describe

    rows = describe(name)

    def human(console: Any) -> None:
        for title, lines in rows.items():
            console.print(f"[bold cyan]{title}[/]")
            for line in lines:
                console.print(f"  {line}", markup=False)

    output.result({"architecture": rows}, quiet=name, human=human)


@command(methods_app, "ls")
def methods_ls(output: Output) -> None:
    """List construction methods and router initialisers."""
    from moe_convert.describe import method_summaries

    found = method_summaries()

    def human(console: Any) -> None:
        for name, summary in found.items():
            console.print(f"[bold]{name}[/]  {summary}")

    output.result({"methods": found}, quiet="\n".join(found), human=human)


@command(methods_app, "show")
def methods_show(
    output: Output, name: Annotated[str, typer.Argument(help="A name from `methods ls`.")]
) -> None:
    """Show a method's paper, what it does and its options."""
    from moe_convert.describe import describe_method

    lines = describe_method(name)
    output.result(
        {"method": lines},
        quiet=name,
        human=lambda c: c.print("\n".join(lines), markup=False),
    )


@command(app, "env")
def env(output: Output) -> None:
    """Print versions and hardware, for bug reports."""
    from moe_convert.manifest import hardware, versions

    found = {**versions(), **hardware()}
    lines = "\n".join(f"{name}: {value}" for name, value in found.items())
    output.result({"env": found}, quiet=lines, human=lambda c: c.print(lines, markup=False))


@command(app, "version")
def version(output: Output) -> None:
    """Print the version."""
    output.result({}, quiet=__version__, human=lambda c: c.print(f"moe-convert {__version__}"))
