"""Commands that describe what there is: architectures, methods, versions."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from moe_convert import __version__
from moe_convert.cli.base import app, command
from moe_convert.console import Output

archs_app = typer.Typer(name="archs", help="Dense families and MoE targets.", no_args_is_help=True)
methods_app = typer.Typer(
    name="methods", help="Ways to make experts and routers.", no_args_is_help=True
)
app.add_typer(archs_app)
app.add_typer(methods_app)


@command(archs_app, "ls")
def archs_ls(output: Output) -> None:
    """List every dense family and the targets proved for it."""
    from moe_convert.families import FAMILIES
    from moe_convert.families.custom import CUSTOM_FAMILIES
    from moe_convert.families.refused import REFUSED
    from moe_convert.wrappers import WRAPPERS

    found = {name: list(row.targets) for name, row in FAMILIES.items()}
    multimodal = {row.model_type: row.moe_type for row in WRAPPERS}
    custom = list(CUSTOM_FAMILIES)
    exact = {name: row.limit or True for name, row in FAMILIES.items()}

    def human(console: Any) -> None:
        from rich.table import Table

        table = Table("dense family", "MoE targets, first choice first", "exact", "", box=None)
        for row in FAMILIES.values():
            proof = row.limit or "yes, tested"
            table.add_row(row.model_type, ", ".join(row.targets), proof, row.examples)
        for whole in WRAPPERS:
            table.add_row(whole.model_type, whole.moe_type, "yes, tested", whole.examples)
        console.print(table)
        console.print(f"with --target custom only, or where no target fits: {', '.join(custom)}")
        console.print(f"refused: {', '.join(REFUSED)}; `archs show NAME` says why")

    listed = {
        "architectures": found,
        "exact": exact,
        "multimodal": multimodal,
        "custom": custom,
        "refused": REFUSED,
    }
    output.result(listed, quiet="\n".join([*found, *multimodal]), human=human)


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
    """List ways to make experts, strategies to split, edits and router initialisers."""
    from moe_convert.describe import method_summaries

    found = method_summaries()

    def human(console: Any) -> None:
        for name, summary in found.items():
            console.print(f"[bold]{name}[/]  {summary}")

    output.result({"methods": found}, quiet="\n".join(found), human=human)


@command(methods_app, "show")
def methods_show(
    output: Output,
    name: Annotated[list[str], typer.Argument(help="A name from `methods ls`.")],
) -> None:
    """Show a method's paper, what it does and its options."""
    from moe_convert.describe import describe_method

    lines = describe_method(" ".join(name))
    output.result(
        {"method": lines},
        quiet=" ".join(name),
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
