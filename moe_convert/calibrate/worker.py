"""One of several processes: `LAUNCHER … -m moe_convert.calibrate.worker JOB ANSWERS WATCH`.

JOB is the file that `Job.save` wrote. What came of it goes into the folder ANSWERS, from the main
process and from each that fails; the main one draws progress on stderr if WATCH is `show`.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from rich.console import Console

from moe_convert.calibrate.alone import share
from moe_convert.calibrate.job import load_job
from moe_convert.calibrate.panel import watcher
from moe_convert.calibrate.run import run
from moe_convert.errors import MoeConvertError, unforeseen


def main(arguments: list[str]) -> int:
    """Do the job and return an exit code."""
    job_path, answers, watch = Path(arguments[0]), Path(arguments[1]), arguments[2]
    rank = int(os.environ.get("RANK", "0"))
    with share(job_path):
        found, code = _worked(job_path, show=rank == 0 and watch == "show")
    if rank == 0 or "report" not in found:
        partial = answers / f"{rank}.partial"
        partial.write_text(json.dumps({"at": time.time(), **found}), encoding="utf-8")
        partial.replace(answers / f"{rank}.json")
    return code


def _worked(job_path: Path, *, show: bool) -> tuple[dict[str, Any], int]:
    """Do the job; return what came of it and an exit code."""
    try:
        with watcher(Console(stderr=True), show=show) as watching:
            report = run(*load_job(job_path), watching)
    except KeyboardInterrupt:
        return {"interrupted": True}, 130
    except Exception as error:  # noqa: BLE001 - the command says it, as it does its own
        if os.environ.get("MOE_CONVERT_DEBUG") == "1":
            traceback.print_exc()
        told = error if isinstance(error, MoeConvertError) else unforeseen(error)
        words: dict[str, Any] = {"code": told.code, "message": told.message, "hint": told.hint}
        words["foreseen"] = told is error
        return {"error": words}, told.exit_code
    return {"report": report.model_dump(mode="json")}, 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
