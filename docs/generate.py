"""Write docs/cli/*.md from the command line itself: a page per command, an option per row.

Run `python docs/generate.py`; a test fails while a page is not what this writes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main

from moe_convert.cli import app

PAGES = Path(__file__).parent / "cli"
PROGRAM = "moe-convert"
MARKUP = re.compile(r"\[/?[a-z ]*\]")
VALUES = {"int": "number", "float": "number", "ath": "path"}
HIDDEN = {"install_completion", "show_completion"}


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield the words and the object of every command, in the order of the help."""
    for name, found in group.commands.items():
        if hasattr(found, "commands"):
            yield from commands(found, (*path, name))
        else:
            yield (*path, name), found


def page(words: tuple[str, ...], found: Any) -> str:
    """Return the page of one command."""
    usage = " ".join([PROGRAM, *words, "[OPTIONS]", *map(_argument, _arguments(found))])
    parts = [f"# {PROGRAM} {' '.join(words)}", _plain(found.help), f"```text\n{usage}\n```"]
    if _arguments(found):
        lines = [f"| `{_name(a)}` | {_plain(a.help)} |" for a in _arguments(found)]
        parts.append("\n".join(["| argument | |", "|---|---|", *lines]))
    for panel, options in _panels(found).items():
        title = f"## {panel}\n\n" if panel else ""
        lines = [f"| {_flags(option)} | {_kind(option)} | {_about(option)} |" for option in options]
        parts.append(title + "\n".join(["| option | value | |", "|---|---|---|", *lines]))
    return "\n\n".join(parts) + "\n"


def _arguments(found: Any) -> list[Any]:
    return [p for p in found.params if p.param_type_name == "argument" and not p.hidden]


def _name(argument: Any) -> str:
    return str(argument.name).upper()


def _argument(argument: Any) -> str:
    return _name(argument) if argument.required else f"[{_name(argument)}]"


def _panels(found: Any) -> dict[str, list[Any]]:
    """Return the options by panel, those without one first and those of every command last."""
    panels: dict[str, list[Any]] = {"": []}
    for option in found.params:
        if option.param_type_name == "option" and not option.hidden and option.name not in HIDDEN:
            panels.setdefault(option.rich_help_panel or "", []).append(option)
    common = panels.pop("Output", [])
    return {panel: options for panel, options in {**panels, "Output": common}.items() if options}


def _flags(option: Any) -> str:
    names = ", ".join(f"`{name}`" for name in option.opts)
    return names + "".join(f" / `{name}`" for name in option.secondary_opts)


def _kind(option: Any) -> str:
    if option.is_flag or option.count or "bool" in _type(option):
        return ""
    kind = next((word for name, word in VALUES.items() if name in _type(option)), "text")
    return kind + (", repeatable" if option.multiple else "")


def _type(option: Any) -> str:
    """Return what a value is converted to, in the words of this release of Typer."""
    found = getattr(option, "type_descriptor", None)
    return str(found.annotation) if found else str(option.type.name)


def _about(option: Any) -> str:
    known = f" Environment: `{option.envvar}`." if option.envvar else ""
    return _plain(option.help).replace("|", "\\|") + known


def _plain(text: str | None) -> str:
    return MARKUP.sub("", " ".join((text or "").split()))


def index(found: list[tuple[tuple[str, ...], Any]]) -> str:
    """Return the page that lists the commands."""
    lines = [
        f"| [`{' '.join(words)}`]({'-'.join(words)}.md) | {_plain(one.help)} |"
        for words, one in found
    ]
    about = "Written by `python docs/generate.py` from the command line itself."
    table = "\n".join(["| command | |", "|---|---|", *lines])
    return f"# {PROGRAM}: commands\n\n{about}\n\n{table}\n"


def pages() -> dict[str, str]:
    """Return the text of every page by its file name."""
    found = list(commands(typer.main.get_command(app)))
    return {
        "index.md": index(found),
        **{f"{'-'.join(words)}.md": page(words, one) for words, one in found},
    }


def main() -> None:
    """Write every page and remove those of commands that are gone."""
    PAGES.mkdir(exist_ok=True)
    wanted = pages()
    for old in PAGES.glob("*.md"):
        if old.name not in wanted:
            old.unlink()
    for name, text in wanted.items():
        (PAGES / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
