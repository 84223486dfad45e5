"""Commands on recipes: the gallery, validation, the schema, imports."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from moe_convert.cli.base import app, command
from moe_convert.console import Output
from moe_convert.errors import OutputExistsError

recipes_app = typer.Typer(name="recipes", help="The gallery of recipes.", no_args_is_help=True)
app.add_typer(recipes_app)


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


@command(recipes_app, "import")
def recipes_import(
    output: Output,
    file: Annotated[Path, typer.Argument(help="YAML file for mergekit-moe.")],
    destination: Annotated[
        Path | None, typer.Option("-o", "--output", help="File to write; default: stdout.")
    ] = None,
) -> None:
    """Turn a mergekit-moe file into a recipe; what would differ is in its notes."""
    from moe_convert.errors import UsageError
    from moe_convert.recipe import import_recipe

    try:
        text = import_recipe(file, file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"Cannot read {file}: {error}.") from error
    if destination is None:
        output.result(
            {"recipe": text}, quiet=text.rstrip(), human=lambda c: c.print(text, markup=False)
        )
        return
    if destination.exists():
        raise OutputExistsError(f"{destination} exists already.", "Choose another name.")
    destination.write_text(text, encoding="utf-8")
    output.result(
        {"recipe": text, "artifacts": {"recipe": str(destination)}},
        quiet=str(destination),
        human=lambda c: c.print(f"written to {destination}", markup=False),
    )


@command(recipes_app, "schema")
def recipes_schema(output: Output) -> None:
    """Print the JSON Schema of recipes, for editors."""
    import json

    from moe_convert.recipe import Recipe

    schema = Recipe.model_json_schema(by_alias=True)
    text = json.dumps(schema, indent=2)
    output.result({"json_schema": schema}, quiet=text, human=lambda c: c.print(text, markup=False))
