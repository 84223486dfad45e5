"""Calibration on two processes: the same result as on one, and no silent mistakes of launchers."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_convert.calibrate.launch import answer_of, asked_for, failure, launched
from moe_convert.calibrate.run import run
from moe_convert.checkpoint import read_folder
from moe_convert.errors import MoeConvertError, UsageError
from tests.calibration import Stop, job_of
from tests.conftest import Dense
from tests.test_cli import invoke
from tests.tools import converted

NOISY: dict[str, Any] = {"experts__edits": [{"edit": "noise", "std": 0.1}]}
OBJECTIVE = {"distill": 1.0, "lm": 1.0, "aux": 0.1, "z": 0.01}
TORCHRUN = ("--standalone", "--nproc_per_node", "2")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"The river had risen {n} times.\n" for n in range(300)), "utf-8")
    return path


@pytest.fixture(scope="module")
def original(dense: Dense, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original") / "out"
    shared = {"target__architecture": "glm4_moe", "target__shared_experts": 1}
    converted(dense(), folder, **shared, **NOISY)
    return folder


@pytest.fixture(autouse=True)
def _on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.mark.parametrize("parallel", ["replicate", "fsdp", "experts"])
def test_two_processes_equal_one(
    parallel: str, original: Path, dense: Dense, text: Path, tmp_path: Path
) -> None:
    """The same global batch of four rows; balance terms and biases see all of it.

    The last one goes on where a run on one process was cut short.
    """
    one, two = (Path(shutil.copytree(original, tmp_path / name)) for name in ("one", "two"))
    settings: dict[str, Any] = {"objective": OBJECTIVE, "bias_update": 0.01}
    expected = run(*job_of(one, dense(), text, **settings))
    if parallel == "experts":
        with pytest.raises(RuntimeError, match="killed"):
            run(*job_of(two, dense(), text, **settings), Stop(3))
    job, ids_BT = job_of(two, dense(), text, **settings)
    section = job.section.model_copy(update={"parallel": parallel})
    job = job.model_copy(update={"world_size": 2, "section": section})
    report = launched(job.save(ids_BT), "torchrun", TORCHRUN, "hide")
    assert report.num_processes == 2
    assert report.resumed_from == (2 if parallel == "experts" else None)
    assert report.loss_last == pytest.approx(expected.loss_last, abs=1e-5)
    mine, theirs = read_folder(one), read_folder(two)
    for name in mine:
        torch.testing.assert_close(mine[name].read(), theirs[name].read(), atol=1e-5, rtol=0)
    lines = (two / "calibration.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 7))


def test_two_processes_train_layers_like_one(
    original: Path, dense: Dense, text: Path, tmp_path: Path
) -> None:
    """Each streams a part of the rows, an odd number, and learns from a part of every batch."""
    one, two = (Path(shutil.copytree(original, tmp_path / name)) for name in ("one", "two"))
    objective = {"hidden": 1.0, "aux": 0.1, "z": 0.01, "lm": 0.0, "distill": 0.0}
    settings: dict[str, Any] = {"objective": objective, "train": "router+experts"}
    job, ids_BT = job_of(one, dense(), text, **settings)
    ids_BT = ids_BT[(len(ids_BT) - job.num_held + 1) % 2 :]
    expected = run(job, ids_BT)
    job, _ = job_of(two, dense(), text, **settings)
    job = job.model_copy(update={"world_size": 2})
    report = launched(job.save(ids_BT), "torchrun", TORCHRUN, "hide")
    assert report.num_processes == 2
    assert report.loss_last == pytest.approx(expected.loss_last, abs=1e-5)
    assert report.after.kl == pytest.approx(expected.after.kl, abs=1e-5)
    mine, theirs = read_folder(one), read_folder(two)
    for name in mine:
        torch.testing.assert_close(mine[name].read(), theirs[name].read(), atol=1e-5, rtol=0)


def test_fewer_processes_than_asked_for_are_an_error(
    original: Path, dense: Dense, text: Path, tmp_path: Path
) -> None:
    """`accelerate launch --cpu --num_processes 2` silently runs one."""
    folder = Path(shutil.copytree(original, tmp_path / "out"))
    result = invoke(
        "calibrate", folder, "--source", dense(), "--data", text, "--launcher", "accelerate",
        "--", "--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
        "--dynamo_backend", "no",
    )  # fmt: skip
    assert result.exit_code == 1
    assert "2 processes were asked for, and 1 run" in result.stderr


def test_the_command_runs_under_a_launcher_that_a_user_started(
    original: Path, dense: Dense, text: Path, tmp_path: Path
) -> None:
    """Both processes prepare, one prints and writes."""
    folder = Path(shutil.copytree(original, tmp_path / "out"))
    launcher = [sys.executable, "-m", "torch.distributed.run", *TORCHRUN, "-m", "moe_convert"]
    options = ["--seq-len", "32", "--max-steps", "2", "--batch-size", "2", "--json"]
    source = ["--source", str(dense()), "--data", str(text)]
    done = subprocess.run(
        [*launcher, "calibrate", str(folder), *source, *options],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["calibration"]["num_processes"] == 2


ACCELERATE = ("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--cpu")


@pytest.mark.parametrize(
    ("launcher", "arguments"),
    [("torchrun", TORCHRUN), ("accelerate", ("--num_processes", "1", *ACCELERATE))],
)
def test_an_error_in_a_worker_is_the_command_s_own(
    launcher: str,
    arguments: tuple[str, ...],
    original: Path,
    dense: Dense,
    text: Path,
    tmp_path: Path,
) -> None:
    """Its code, and its one line as the last; that a launcher's process failed is no news."""
    folder = Path(shutil.copytree(original, tmp_path / "out"))
    options = ["--seq-len", "32", "--batch-size", "2", "--lr", "1e30", "--max-steps", "4"]
    source = ["--source", str(dense()), "--data", str(text), "--launcher", launcher]
    command = [sys.executable, "-m", "moe_convert", "calibrate", str(folder), *source, *options]
    done = subprocess.run([*command, "--", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 5, done.stderr
    told = done.stderr[done.stderr.index("error: ") :]
    assert told.startswith("error: Calibration diverged at step")
    assert told.rstrip().endswith("a smaller --lr.")
    for word in ("Traceback", "ChildFailedError", "CalledProcessError", "exitcode"):
        assert word not in done.stderr


def test_an_unforeseen_error_in_a_worker_is_one_line_too(
    original: Path,
    dense: Dense,
    text: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With MOE_CONVERT_DEBUG=1 it is shown where it came from."""
    folder = Path(shutil.copytree(original, tmp_path / "out"))
    job, ids_BT = job_of(folder, dense(), text)
    path = job.model_copy(update={"num_held": 0}).save(ids_BT)
    one = ("--standalone", "--nproc_per_node", "1")
    for debug in ("0", "1"):
        monkeypatch.setenv("MOE_CONVERT_DEBUG", debug)
        with pytest.raises(
            MoeConvertError, match=r"^RuntimeError: .*MOE_CONVERT_DEBUG=1 shows where"
        ):
            launched(path, "torchrun", one, "hide")
        assert ("Traceback" in capfd.readouterr().err) == (debug == "1")


def test_a_worker_that_was_killed_gives_its_signal(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "moe_convert.calibrate.launcher", "torchrun", *TORCHRUN]
    script = tmp_path / "script.py"
    script.write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", encoding="utf-8")
    done = subprocess.run([*words, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 128 + signal.SIGKILL
    assert "Traceback" not in done.stderr


def test_what_a_launcher_failed_of_is_what_is_told() -> None:
    """A process that died is the reason, whatever the others say that cannot reach it."""
    foreseen, other = (
        {
            "code": "usage",
            "message": message,
            "hint": "",
            "foreseen": message == "The data is empty.",
        }
        for message in ("The data is empty.", "RuntimeError: connection closed by peer")
    )
    killed = 128 + signal.SIGKILL
    assert failure("torchrun", killed, foreseen).message == "The data is empty."
    for told in (other, None):
        error = failure("torchrun", killed, told)
        assert error.message == "A process was killed by signal 9, often for want of memory."
        assert error.hint == "The same command goes on at the last checkpoint."
    assert failure("torchrun", 1, other).message == other["message"]
    assert failure("torchrun", 3, None).message.startswith("torchrun ended with code 3 before")


def test_the_first_worker_to_fail_tells_why(tmp_path: Path) -> None:
    """Others fail because it did; a report means that the work was done nevertheless."""
    assert answer_of(tmp_path) == {}
    answers = [{"at": 3.5, "interrupted": True}, {"at": 2.5, "error": {}}, {"at": 9.0, "report": 1}]
    for rank, answer in enumerate(answers[:2]):
        (tmp_path / f"{rank}.json").write_text(json.dumps(answer), encoding="utf-8")
    assert answer_of(tmp_path) == answers[1]
    (tmp_path / "0.json").write_text(json.dumps(answers[2]), encoding="utf-8")
    assert answer_of(tmp_path) == answers[2]


@pytest.mark.parametrize(
    ("launcher", "arguments", "count"),
    [
        ("torchrun", ("--nproc_per_node", "2"), 2),
        ("torchrun", ("--nnodes=2", "--nproc-per-node=4"), 8),
        ("accelerate", ("--num_processes=3", "--config_file", "f.yaml"), 3),
    ],
)
def test_launchers_are_read(launcher: str, arguments: tuple[str, ...], count: int) -> None:
    assert asked_for(launcher, arguments) == count


@pytest.mark.parametrize(
    ("launcher", "arguments", "reason"),
    [
        ("torchrun", (), "do not say how many"),
        ("torchrun", ("--nproc_per_node", "gpu"), "do not say how many"),
        ("mpirun", ("-n", "2"), "is not one of auto, none, accelerate, torchrun"),
    ],
)
def test_launchers_that_cannot_be_read_are_refused(
    launcher: str, arguments: tuple[str, ...], reason: str
) -> None:
    with pytest.raises(UsageError, match=reason):
        asked_for(launcher, arguments)


def test_arguments_without_a_launcher_are_refused(original: Path) -> None:
    result = invoke("calibrate", original, "--", "--num_processes", "2")
    assert result.exit_code == 2
    assert "Add --launcher" in result.stderr
