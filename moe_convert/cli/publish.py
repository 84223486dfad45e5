"""Commands on a finished folder: its card, and whether it can be made again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moe_convert.cli.base import app, command
from moe_convert.console import Output
from moe_convert.errors import VerificationError

if TYPE_CHECKING:
    from moe_convert.reproduce import Reproduction

FOLDER_HELP = "Folder that `upcycle` wrote."
SHOWN = 20
"""Differing tensors that are printed; JSON has them all."""


@command(app, "card")
def card(
    output: Output,
    model: Annotated[Path, typer.Argument(help=FOLDER_HELP)],
    check: Annotated[
        bool, typer.Option("--check", help="Only check it: metadata, links, whether it is current.")
    ] = False,
    name: Annotated[
        str | None, typer.Option(help="What the card calls the model, such as org/name.")
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace a README.md that was edited.",
            rich_help_panel="Dangerous options",
        ),
    ] = False,
) -> None:
    """Write README.md, the model card, from what was recorded; or check it."""
    if check:
        _check(output, model)
        return
    from moe_convert.card import write_card
    from moe_convert.manifest import load_manifest

    path = write_card(model, load_manifest(model), name=name, overwrite=overwrite)
    output.result(
        {"artifacts": {"card": str(path)}},
        quiet=str(path),
        human=lambda c: c.print(f"written to {path}", markup=False),
    )


def _check(output: Output, model: Path) -> None:
    from moe_convert.card import CARD_NAME, check_card

    found = check_card(model)

    def human(console: Any) -> None:
        for note in found.notes:
            console.print(f"note: {note}", markup=False)
        for problem in found.problems:
            console.print(f"wrong: {problem}", markup=False)
        console.print("fail" if found.problems else "ok")

    sections = {"card": {"problems": found.problems, "notes": found.notes}}
    if found.problems:
        error = VerificationError(
            f"{model / CARD_NAME} is not right: {found.problems[0]}.",
            "Write it again with `moe-convert card --overwrite`.",
        )
        output.fail(sections, error, human)
        raise typer.Exit(error.exit_code)
    output.result(sections, quiet="ok", human=human)


@command(app, "reproduce")
def reproduce(
    output: Output,
    model: Annotated[Path, typer.Argument(help=f"{FOLDER_HELP} Its manifest is enough.")],
    new: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="New folder (default: MODEL-reproduced)."),
    ] = None,
    source: Annotated[
        str | None, typer.Option(help="Dense checkpoint, where the manifest has only its name.")
    ] = None,
    source_expert: Annotated[
        list[str] | None,
        typer.Option(help="The same for a composed checkpoint; repeat it in their order."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="The same for a file of text that the recipe uses.")
    ] = None,
    token: Annotated[str | None, typer.Option(help="Hub token.")] = None,
) -> None:
    """Run a result's recipe again and tell whether every byte is the same; exit 5 if not."""
    from moe_convert.reproduce import Places
    from moe_convert.reproduce import reproduce as run

    places = Places(source, tuple(source_expert or ()), data)
    with output.progress() as progress:
        found = run(model, new, places, token=token, progress=progress)

    def human(console: Any) -> None:
        for line in _lines(found):
            console.print(line, markup=False)

    sections = {
        "reproduction": {
            "equal": found.equal,
            "files": found.files,
            "tensors": [asdict(change) for change in found.tensors],
            "versions": found.versions,
            "notes": found.notes,
        },
        "artifacts": {"model": str(found.output)},
    }
    if not found.equal:
        error = VerificationError(
            f"{found.output} is not what {model} records: {', '.join(found.files[:3])}.",
            "Use the versions that the manifest lists." if found.versions else "",
        )
        output.fail(sections, error, human)
        raise typer.Exit(error.exit_code)
    output.result(sections, quiet=str(found.output), human=human)


def _lines(found: Reproduction) -> Iterator[str]:
    for file in found.files:
        yield f"differs   {file}"
    for change in found.tensors[:SHOWN]:
        much = ""
        if change.max_abs_diff is not None and change.share is not None:
            much = f": up to {change.max_abs_diff:.2e}, in {change.share:.2%} of its elements"
        yield f"tensor    {change.name} {change.what}{much}"
    if len(found.tensors) > SHOWN:
        yield f"tensor    … and {len(found.tensors) - SHOWN} more"
    for name, (then, now) in found.versions.items():
        yield f"version   {name}: {then} then, {now} now"
    yield from (f"note      {note}" for note in found.notes)
    yield f"{'byte-equal' if found.equal else 'not equal'}  {found.output}"
