"""The command line: parse, call one function, print, exit.

No command's `--help` imports torch; everything heavy is imported when it is needed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from moe_convert.cli import calibrate, gallery, models, publish, push, tables
from moe_convert.cli.base import app
from moe_convert.console import Output
from moe_convert.errors import InterruptedByUser, UsageError

COMMANDS = (models, calibrate, push, publish, gallery, tables)
"""Modules whose import registers their commands, in the order of the help."""


def main() -> None:
    """Run the command line; a usage error is one line, or JSON where that was asked for."""
    try:
        code = app(standalone_mode=False)
    except typer.Abort:
        raise SystemExit(InterruptedByUser.exit_code) from None
    except Exception as error:
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        output = Output(Path(sys.argv[0]).name, "json" if "--json" in sys.argv else "human")
        if text := " ".join(message().split()):
            output.error(UsageError(text, "See --help."))
        raise SystemExit(UsageError.exit_code) from None
    raise SystemExit(code if isinstance(code, int) else 0)


__all__ = ["COMMANDS", "app", "main"]
