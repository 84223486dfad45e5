"""Settings of a calibration: what each one does, and that those without effect are refused."""

# ruff: noqa: F401, F811 - fixtures of another file

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_convert.calibrate.alone import share
from moe_convert.calibrate.job import JOB
from moe_convert.checkpoint import read_folder
from moe_convert.checkpoint.replace import WORK
from moe_convert.manifest import CalibrationReport
from tests.conftest import Dense
from tests.test_calibrate import (
    NOISY,
    Made,
    calibrated,
    copy,
    originals,
    text,
)
from tests.test_cli import invoke

BALANCE: dict[str, Any] = {"objective": "aux", "train": "router", "optimizer": {"lr": 1e-9}}


def test_biases_move_in_proportion_to_the_scores(
    copy: Made,
    calibrated: Callable[..., CalibrationReport],
) -> None:
    """A router a thousand times flatter gets steps as much smaller, and its load evens out too."""
    moved = {}
    for std in (0.5, 0.0005):
        folder = copy(f"out-{std}", target__architecture="glm4_moe", router__logit_std=std, **NOISY)
        report = calibrated(folder, bias_update=0.01, **BALANCE)
        assert report.after.max_violation < report.before.max_violation
        refs = read_folder(folder)
        found = [ref.read() for n, ref in refs.items() if n.endswith("e_score_correction_bias")]
        moved[std] = float(torch.stack(found).abs().max())
    assert 0 < moved[0.5] < 6 * 0.01
    assert moved[0.0005] / moved[0.5] == pytest.approx(1e-3, rel=0.5)


def command(folder: Path, dense: Dense, text: Path, *options: object) -> list[str]:
    rest = ["--seq-len", "32", "--batch-size", "2", "--save-every", "1000", *map(str, options)]
    source = ["--source", str(dense()), "--data", str(text)]
    return [sys.executable, "-m", "moe_convert", "calibrate", str(folder), *source, *rest]


TORCHRUN = ("--launcher", "torchrun", "--", "--standalone", "--nproc_per_node", "1")


def at_work(folder: Path, process: subprocess.Popen[str]) -> None:
    """Wait until some steps are done."""
    log = folder / "calibration.jsonl"
    while not (log.exists() and log.read_bytes().count(b"\n") > 2):
        assert process.poll() is None
        time.sleep(0.02)


def workers(folder: Path) -> list[int]:
    """Return the processes whose command names the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_launcher_is_stopped_with_the_command(
    number: signal.Signals,
    copy: Made,
    dense: Dense,
    text: Path,
) -> None:
    """Its processes are gone before the command is, and have written a checkpoint.

    Meanwhile nobody else may train the folder.
    """
    folder = copy(**NOISY)
    words = command(folder, dense, text, "--max-steps", 100_000, *TORCHRUN)
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    at_work(folder, process)
    second = invoke(*command(folder, dense, text)[3:])
    process.send_signal(number)
    _, said = process.communicate()
    assert not workers(folder)
    assert process.returncode == 130, said
    assert list((folder / WORK).glob("step-*"))
    assert second.exit_code == 2
    assert "is being calibrated by another process" in second.stderr


def test_workers_whose_command_was_killed_keep_others_out(
    copy: Made,
    dense: Dense,
    text: Path,
) -> None:
    folder = copy(**NOISY)
    path = folder / WORK / JOB
    path.parent.mkdir()
    path.write_text("{}", encoding="utf-8")
    words = ("calibrate", folder, "--source", dense(), "--data", text, "--seq-len", 32)
    with share(path):
        result = invoke(*words, "--max-steps", 1)
        assert result.exit_code == 2
        assert "is being calibrated by another process" in result.stderr
    assert invoke(*words, "--max-steps", 1).exit_code == 0
