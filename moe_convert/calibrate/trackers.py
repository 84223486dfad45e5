"""Who is told of a step: the log, whoever watches, and trackers, through Accelerate."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from moe_convert.calibrate.report import Log, StepRecord, Watcher
from moe_convert.calibration import TRACKERS
from moe_convert.errors import MissingDependencyError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from moe_convert.calibrate.job import Job


def check_trackers(names: tuple[str, ...]) -> None:
    """Make sure that the packages of the wanted trackers are there.

    Raises:
        MissingDependencyError: one is not installed.
    """
    assert set(names) <= set(TRACKERS)
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise MissingDependencyError(
                f"The tracker {name} needs the {name} package.",
                f"pip install 'moe-convert[{name}]'",
            )


@contextlib.contextmanager
def tracked(job: Job, accelerator: Accelerator) -> Iterator[Callable[[StepRecord], None]]:
    """Yield what gives a step to the trackers of a job; what they print goes to stderr."""
    if not job.section.trackers:
        yield lambda record: None
        return
    settings = {"steps": job.steps, "batch_size": job.batch_size}
    with contextlib.redirect_stdout(sys.stderr):
        accelerator.init_trackers("moe-convert", config=settings)
    try:
        yield lambda record: accelerator.log(record.scalars, step=record.step)
    finally:
        with contextlib.redirect_stdout(sys.stderr):
            accelerator.end_training()
            _finish_trackio(job)


def _finish_trackio(job: Job) -> None:
    """Let trackio know that its run is over; Accelerate does not, and it would end it at exit."""
    if "trackio" in job.section.trackers:
        import trackio

        trackio.finish()


@contextlib.contextmanager
def logged(
    job: Job, accelerator: Accelerator, watcher: Watcher, done: int
) -> Iterator[Callable[[StepRecord], None]]:
    """Yield what a step is told to: the log, the trackers and whoever watches.

    The log goes on after the `done` steps of an earlier run.
    """
    if not accelerator.is_main_process:
        yield lambda record: None
        return
    log = Log(job.folder, done)
    with tracked(job, accelerator) as track:

        def tell(record: StepRecord) -> None:
            log.step(record)
            watcher.step(record)
            track(record)

        try:
            yield tell
        finally:
            log.close()
