"""A launcher that says nothing of failed processes: `-m moe_convert.calibrate.launcher NAME …`.

The workers say why they failed, and a traceback of whoever started them would bury it. With
MOE_CONVERT_DEBUG=1 it is shown.
"""

from __future__ import annotations

import logging
import os
import runpy
import subprocess
import sys

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

LAUNCHERS = {"accelerate": "accelerate.commands.launch", "torchrun": "torch.distributed.run"}
"""Modules of the launchers, run with this interpreter."""
DEATHS = "torch.distributed.elastic.multiprocessing.api"
"""Who logs that a process failed, and that the others are stopped."""


def main(arguments: list[str]) -> int:
    """Run a launcher to its end and return the code of the process that failed first."""
    name, *rest = arguments
    sys.argv = [name, *rest]
    debug = os.environ.get("MOE_CONVERT_DEBUG") == "1"
    logging.getLogger(DEATHS).addFilter(lambda record: debug)
    try:
        runpy.run_module(LAUNCHERS[name], run_name="__main__", alter_sys=True)
    except (ChildFailedError, SignalException, subprocess.CalledProcessError) as error:
        if debug:
            raise
        return _code(error)
    return 0


def _code(error: Exception) -> int:
    """Return an exit code as shells have it: 128 and its number for a signal."""
    if isinstance(error, SignalException):
        return 128 + int(error.sigval)
    if isinstance(error, ChildFailedError):
        code = int(error.get_first_failure()[1].exitcode)
    else:
        assert isinstance(error, subprocess.CalledProcessError)
        code = error.returncode
    return 128 - code if code < 0 else code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
