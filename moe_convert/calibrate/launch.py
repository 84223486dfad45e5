"""Several processes: a job handed to workers under a launcher, and their answer read back."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import moe_convert.errors as errors
from moe_convert.calibrate.alone import outlived
from moe_convert.errors import MoeConvertError, UsageError
from moe_convert.manifest import CalibrationReport

COUNTS = {
    "accelerate": r"--num[_-]processes(?:=(\d+))?$",
    "torchrun": r"--nproc[_-]per[_-]node(?:=(\d+))?$",
}
NODES = {"accelerate": None, "torchrun": r"--nnodes(?:=(\d+))?$"}
"""How a launcher is told of processes; accelerate counts those of all machines."""
KILLS = {
    int(signal.SIGKILL): "often for want of memory",
    int(signal.SIGSEGV): "a crash in compiled code",
    int(signal.SIGABRT): "a crash in compiled code",
}
"""Signals that end a process before it can say why, and what they mostly mean."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def asked_for(launcher: str, arguments: Sequence[str]) -> int:
    """Return how many processes these arguments ask for.

    Raises:
        UsageError: the launcher is unknown, or they do not say.
    """
    if launcher not in COUNTS:
        raise UsageError(
            f"--launcher {launcher!r} is not one of auto, none, {', '.join(COUNTS)}.",
            "Leave it out to train in this process.",
        )
    count = _value(COUNTS[launcher], arguments)
    if count is None:
        example = "--num_processes 2" if launcher == "accelerate" else "--nproc_per_node 2"
        raise UsageError(
            f"The arguments for {launcher} do not say how many processes to start.",
            f"Add them after --, for example: --launcher {launcher} -- {example}",
        )
    nodes = NODES[launcher]
    machines = _value(nodes, arguments) if nodes else None
    if count == 0 or machines == 0:
        raise UsageError(
            f"The arguments for {launcher} ask for no process at all.", "Ask for one or more."
        )
    return count * (machines or 1)


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
        MoeConvertError: what the first process to fail raised, or the launcher failed by itself.
        KeyboardInterrupt: the workers were interrupted.
    """
    with tempfile.TemporaryDirectory() as folder:
        worker = ["-m", "moe_convert.calibrate.worker", str(job), folder, watch]
        started = [sys.executable, "-m", "moe_convert.calibrate.launcher", launcher, *arguments]
        with outlived(job):
            code, stopped = _run([*started, *worker])
        found = answer_of(Path(folder))
    if found.get("interrupted") or (stopped and not found):
        raise KeyboardInterrupt
    if "report" in found:
        return CalibrationReport.model_validate(found["report"])
    raise failure(launcher, code, found.get("error"))


def failure(launcher: str, code: int, told: dict[str, Any] | None) -> MoeConvertError:
    """Return why there is no report: what a worker foresaw, else a death, else what it says.

    Where one process dies the others fail at talking to it.
    """
    if told and told["foreseen"]:
        return _error(told)
    again = "The same command goes on at the last checkpoint."
    if code - 128 in KILLS:
        return MoeConvertError(
            f"A process was killed by signal {code - 128}, {KILLS[code - 128]}.", again
        )
    if told:
        return _error(told)
    return MoeConvertError(
        f"{launcher} ended with code {code} before the work was done.",
        f"MOE_CONVERT_DEBUG=1 shows all that it says. {again}",
    )


def answer_of(folder: Path) -> dict[str, Any]:
    """Return what the workers have come to: the first to fail tells why, and others follow it."""
    every = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")]
    reports = [found for found in every if "report" in found]
    return min(reports or every, key=lambda found: float(found["at"]), default={})


def _run(command: list[str]) -> tuple[int, bool]:
    """Run a launcher to its end; return its exit code and whether a signal asked to stop.

    It gets a session of its own, and every signal once: those of a terminal would reach workers
    twice, and a second one breaks a step.
    """
    started: list[subprocess.Popen[bytes]] = []
    asked = threading.Event()

    def pass_on(number: int, frame: FrameType | None) -> None:
        asked.set()
        for process in started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)

    with _handled(pass_on):
        started.append(subprocess.Popen(command, start_new_session=True))  # noqa: S603
        if asked.is_set():
            started[0].terminate()
        return started[0].wait(), asked.is_set()


@contextlib.contextmanager
def _handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Give the signals that stop a process to a handler, where that can be done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _error(found: dict[str, Any]) -> MoeConvertError:
    kinds = {
        kind.code: kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, MoeConvertError)
    }
    return kinds.get(found["code"], MoeConvertError)(found["message"], found["hint"])
