"""One run at a time in a folder: whoever trains it holds locks that end with the process.

The one who starts it holds one on `config.json`, which no run replaces, and the workers of a
launcher share one on their job, so that those whose starter was killed are heard of as well.
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from moe_convert.calibrate.job import JOB
from moe_convert.checkpoint.replace import WORK
from moe_convert.errors import UsageError


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder; one that is none of ours has no lock to hold.

    Raises:
        UsageError: one is at work.
    """
    with _held(folder, "config.json"):
        with _held(folder, f"{WORK}/{JOB}"):
            pass
        yield


@contextlib.contextmanager
def _held(folder: Path, name: str) -> Iterator[None]:
    if not (folder / name).is_file():
        yield
        return
    with (folder / name).open("r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"{folder} is being calibrated by another process.",
                "Wait for it, or stop it: it then leaves a checkpoint to go on from.",
            ) from None
        yield


def share(job: Path) -> IO[bytes]:
    """Let it be seen that this process works on a job, until the file returned is closed."""
    file = job.open("rb")
    fcntl.flock(file, fcntl.LOCK_SH)
    return file


@contextlib.contextmanager
def outlived(job: Path) -> Iterator[None]:
    """Leave only when every process that shares a job has ended."""
    with job.open("r+b") as file:
        yield
        fcntl.flock(file, fcntl.LOCK_EX)
