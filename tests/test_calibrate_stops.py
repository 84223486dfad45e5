"""Runs that end early: killed, interrupted, diverged, no longer getting better, at a gate."""

# ruff: noqa: F401, F811 - fixtures of another file

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_convert.calibrate.run import run
from moe_convert.checkpoint import read_folder
from moe_convert.checkpoint.replace import WORK, commit, recover, stage_tensors
from moe_convert.errors import UsageError, VerificationError
from moe_convert.manifest import CalibrationReport, load_manifest
from tests.calibration import (
    NOISY,
    SPLIT,
    Made,
    Stop,
    calibrated,
    changed,
    copy,
    job_of,
    originals,
    text,
)
from tests.conftest import Dense
from tests.tools import digest, tensors

BALANCED: dict[str, Any] = {"objective": {"lm": 1.0, "aux": 0.1}, "train": "router+experts"}


@pytest.fixture(scope="module")
def whole(
    originals: Made, dense: Dense, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    """Return the tensors after a run that nothing cut short."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    shutil.copytree(originals(**NOISY), folder)
    run(*job_of(folder, dense(), text, **BALANCED))
    return tensors(folder)


@pytest.mark.parametrize("killed_at", [1, 3, 5])
def test_a_killed_run_ends_with_the_same_bytes(
    copy: Made,
    calibrated: Callable[..., CalibrationReport],
    whole: dict[str, bytes],
    killed_at: int,
) -> None:
    cut = copy("cut", **NOISY)
    before = digest(cut)
    with pytest.raises(RuntimeError, match="killed"):
        calibrated(cut, Stop(killed_at), **BALANCED)
    assert {name: value for name, value in digest(cut).items() if name in before} == before
    report = calibrated(cut, **BALANCED)
    assert report.resumed_from == (killed_at // 2 * 2 or None)
    assert tensors(cut) == whole
    log = (cut / "calibration.jsonl").read_text("utf-8").splitlines()
    steps = [json.loads(line)["step"] for line in log]
    assert steps == list(range(1, 7))
    assert not (cut / WORK).exists()


def test_an_interrupt_writes_a_checkpoint(
    copy: Made, calibrated: Callable[..., CalibrationReport], whole: dict[str, bytes]
) -> None:
    cut = copy("cut", **NOISY)
    with pytest.raises(KeyboardInterrupt):
        calibrated(cut, Stop(3, signal.SIGINT), **BALANCED)
    assert sorted(path.name for path in (cut / WORK).iterdir()) == [
        "step-00000002",
        "step-00000003",
    ]
    assert calibrated(cut, **BALANCED).resumed_from == 3
    assert tensors(cut) == whole


def test_a_process_killed_at_random_ends_with_the_same_bytes(
    copy: Made, calibrated: Callable[..., CalibrationReport], dense: Dense, text: Path
) -> None:
    """A real SIGKILL, wherever it hits."""
    whole, cut = copy("whole", **NOISY), copy("cut", **NOISY)
    settings: dict[str, Any] = {"max_steps": 30, "save_every": 3, "keep": 1}
    calibrated(whole, **settings)
    job, ids_BT = job_of(cut, dense(), text, **settings)
    path = job.save(ids_BT)
    worker = [sys.executable, "-m", "moe_convert.calibrate.worker", str(path), str(cut / "a"), "-"]
    process = subprocess.Popen(worker)
    log = cut / "calibration.jsonl"
    while process.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") > 5):
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    report = calibrated(cut, **settings)
    assert report.resumed_from
    assert tensors(cut) == tensors(whole)


def test_checkpoints_of_another_run_are_not_taken_up(
    copy: Made, calibrated: Callable[..., CalibrationReport], dense: Dense, text: Path
) -> None:
    folder = copy(**NOISY)
    with pytest.raises(RuntimeError, match="killed"):
        calibrated(folder, Stop(3))
    with pytest.raises(UsageError, match="other settings, data or weights"):
        calibrated(folder, optimizer={"lr": 1e-3})
    report = run(*job_of(folder, dense(), text, resume=False, optimizer={"lr": 1e-3}))
    assert report.resumed_from is None


@pytest.mark.parametrize("cut", ["before", "between", "after"])
def test_a_crash_while_writing_back_can_be_recovered(
    copy: Made, monkeypatch: pytest.MonkeyPatch, cut: str
) -> None:
    """Without a journal nothing has happened; with one everything will have."""
    folder = copy(output__max_shard_size="100KB")
    before = tensors(folder)
    routers = [name for name in before if ".gate." in name]
    refs = read_folder(folder)
    assert len({refs[name].path for name in routers}) > 1
    stage_tensors(folder, ((name, refs[name].read() + 1) for name in routers))
    if cut != "before":
        replace, renamed = Path.replace, 0

        def fails_second_time(path: Path, target: Path) -> Path:
            nonlocal renamed
            renamed += path.suffix == ".safetensors"
            if renamed == (2 if cut == "between" else 1):
                raise OSError("power cut")
            return replace(path, target)

        monkeypatch.setattr(Path, "replace", fails_second_time)
        with pytest.raises(OSError, match="power cut"):
            commit(folder)
        monkeypatch.undo()
    assert recover(folder) == (cut != "before")
    assert changed(before, folder) == (set() if cut == "before" else set(routers))
    assert not (folder / WORK / "new").exists()


def test_a_diverging_run_stops_and_keeps_the_weights(
    copy: Made, calibrated: Callable[..., CalibrationReport]
) -> None:
    folder = copy(**NOISY)
    before = tensors(folder)
    with pytest.raises(VerificationError, match=r"diverged at step \d+: the loss is"):
        calibrated(folder, optimizer={"lr": 30.0}, max_steps=40, clip_norm=1e9)
    assert tensors(folder) == before
    assert load_manifest(folder).state == "converted"
    assert not (folder / WORK).exists()


def test_nan_counts_as_diverging(copy: Made, calibrated: Callable[..., CalibrationReport]) -> None:
    folder = copy(**NOISY)
    before = tensors(folder)
    with pytest.raises(VerificationError, match="the loss is nan"):
        calibrated(folder, optimizer={"lr": 1e30}, max_steps=40)
    assert tensors(folder) == before


def test_early_stop_ends_a_run_that_no_longer_gets_better(
    copy: Made, calibrated: Callable[..., CalibrationReport]
) -> None:
    early = {"patience": 3, "min_delta": 1.0}
    report = calibrated(copy(**NOISY), early_stop=early, max_steps=50)
    assert report.stopped_early
    assert report.steps == 4


def test_a_missed_gate_keeps_the_result_and_marks_it(
    copy: Made, calibrated: Callable[..., CalibrationReport]
) -> None:
    folder = copy(**SPLIT)
    report = calibrated(folder, guards={"max_ppl_ratio": 0.01})
    assert "allowed 0.01" in report.failures[0]
    assert load_manifest(folder).state == "failed"
