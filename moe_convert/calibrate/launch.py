"""Several processes: a job handed to workers under a launcher, and their answer read back."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import moe_convert.errors as errors
from moe_convert.errors import MoeConvertError, UsageError
from moe_convert.manifest import CalibrationReport

LAUNCHERS = {"accelerate": "accelerate.commands.launch", "torchrun": "torch.distributed.run"}
"""Modules of the launchers, run with this interpreter."""

COUNTS = {
    "accelerate": r"--num[_-]processes(?:=(\d+))?$",
    "torchrun": r"--nproc[_-]per[_-]node(?:=(\d+))?$",
}
NODES = {"accelerate": None, "torchrun": r"--nnodes(?:=(\d+))?$"}
"""How a launcher is told of processes; accelerate counts those of all machines."""


def asked_for(launcher: str, arguments: Sequence[str]) -> int:
    """Return how many processes these arguments ask for.

    Raises:
        UsageError: the launcher is unknown, or they do not say.
    """
    if launcher not in LAUNCHERS:
        raise UsageError(f"--launcher {launcher!r} is not one of none, {', '.join(LAUNCHERS)}.")
    count = _value(COUNTS[launcher], arguments)
    if count is None:
        example = "--num_processes 2" if launcher == "accelerate" else "--nproc_per_node 2"
        raise UsageError(
            f"The arguments for {launcher} do not say how many processes to start.",
            f"Add them after --, for example: --launcher {launcher} -- {example}",
        )
    nodes = NODES[launcher]
    return count * ((_value(nodes, arguments) if nodes else None) or 1)


def _value(pattern: str, arguments: Sequence[str]) -> int | None:
    for number, argument in enumerate(arguments):
        match = re.match(pattern, argument)
        if match:
            following = arguments[number + 1] if number + 1 < len(arguments) else ""
            text = match[1] or following
            return int(text) if text.isdigit() else None
    return None


def launched(job: Path, launcher: str, arguments: Sequence[str], watch: str) -> CalibrationReport:
    """Run a saved job under a launcher and return the report of its main process.

    Raises:
        MoeConvertError: what the main process raised, or the launcher failed by itself.
        KeyboardInterrupt: the workers were interrupted.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        worker = ["-m", "moe_convert.calibrate.worker", str(job), str(answer), watch]
        command = [sys.executable, "-m", LAUNCHERS[launcher], *arguments, *worker]
        code = subprocess.run(command, check=False).returncode  # noqa: S603
        if not answer.is_file():
            raise MoeConvertError(f"{launcher} ended with code {code} before the work was done.")
        found = json.loads(answer.read_text(encoding="utf-8"))
    if found.get("interrupted"):
        raise KeyboardInterrupt
    if "error" in found:
        raise _error(found["error"])
    return CalibrationReport.model_validate(found["report"])


def _error(found: dict[str, str]) -> MoeConvertError:
    kinds = {
        kind.code: kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, MoeConvertError)
    }
    return kinds.get(found["code"], MoeConvertError)(found["message"], found["hint"])
