"""What every command shares: the application, the output options, errors as exit codes."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from moe_convert import __version__
from moe_convert.console import Format, Output, quiet_libraries
from moe_convert.errors import InterruptedByUser, MoeConvertError, unforeseen

app = typer.Typer(
    name="moe-convert",
    help="Turn dense Hugging Face checkpoints into Mixture-of-Experts models that plain "
    "transformers loads.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

BROKEN_PIPE = 1
"""Exit code where the reader of the output has gone; Rich has the same."""

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
    title = group.info.name
    full_name = f"{title} {name}" if group is not app else name

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
            output = Output(
                full_name, _format(chosen), not chosen["no_progress"], chosen["verbose"]
            )
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
    formats: dict[str, Format] = {f: f for f in get_args(Format)}
    if wanted not in formats:
        raise typer.BadParameter(f"--format {wanted!r} is not one of {', '.join(formats)}")
    return formats[wanted]


def _guarded(output: Output, function: Callable[[], None]) -> None:
    """Run a command and turn every error into one line and an exit code."""
    debug = os.environ.get("MOE_CONVERT_DEBUG") == "1"
    try:
        function()
    except KeyboardInterrupt:
        interrupted = InterruptedByUser("Interrupted.", f"Resume with: {_command_line()}")
        output.error(interrupted, status="interrupted")
        raise typer.Exit(interrupted.exit_code) from None
    except MoeConvertError as error:
        if debug:
            raise
        output.error(error)
        raise typer.Exit(error.exit_code) from None
    except (typer.Exit, typer.Abort):
        raise
    except BrokenPipeError:
        if debug:
            raise
        # Whoever read the output has stopped, as `head` does; the interpreter must not flush it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise typer.Exit(BROKEN_PIPE) from None
    except Exception as error:
        if debug:
            raise
        output.error(unforeseen(error))
        raise typer.Exit(1) from None


def _command_line() -> str:
    """Return the command as it was given, less a token."""
    import shlex

    words = sys.argv[1:]
    kept = [w for n, w in enumerate(words) if "--token" not in words[max(0, n - 1) : n + 1]]
    return shlex.join(["moe-convert", *(w for w in kept if not w.startswith("--token="))])


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
