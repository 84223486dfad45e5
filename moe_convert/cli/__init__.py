"""The command line: parse, call one function, print, exit.

No command's `--help` imports torch; everything heavy is imported when it is needed.
"""

from __future__ import annotations

from moe_convert.cli import gallery, models, tables
from moe_convert.cli.base import app

COMMANDS = (models, gallery, tables)
"""Modules whose import registers their commands, in the order of the help."""


def main() -> None:
    """Run the command line."""
    app()


__all__ = ["COMMANDS", "app", "main"]
