"""One of several processes: `LAUNCHER … -m moe_convert.calibrate.worker JOB ANSWER WATCH`.

JOB is the file that `Job.save` wrote; the main process writes what came of it into ANSWER and draws
progress on stderr if WATCH is `show`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from moe_convert.calibrate.alone import share
from moe_convert.calibrate.job import load_job
from moe_convert.calibrate.panel import watcher
from moe_convert.calibrate.run import run
from moe_convert.errors import MoeConvertError


def main(arguments: list[str]) -> int:
    """Do the job and return an exit code."""
    job_path, answer, watch = Path(arguments[0]), Path(arguments[1]), arguments[2]
    with share(job_path):
        return _work(job_path, answer, watch)


def _work(job_path: Path, answer: Path, watch: str) -> int:
    job, ids_BT = load_job(job_path)
    is_main = os.environ.get("RANK", "0") == "0"
    found: dict[str, Any]
    try:
        with watcher(Console(stderr=True), show=is_main and watch == "show") as watching:
            found = {"report": run(job, ids_BT, watching).model_dump(mode="json")}
            code = 0
    except KeyboardInterrupt:
        found, code = {"interrupted": True}, 130
    except MoeConvertError as error:
        found = {"error": {"code": error.code, "message": error.message, "hint": error.hint}}
        code = error.exit_code
    if is_main:
        partial = answer.with_suffix(".partial")
        partial.write_text(json.dumps(found), encoding="utf-8")
        partial.replace(answer)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
