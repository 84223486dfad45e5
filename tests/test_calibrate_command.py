"""The calibrate command: what it refuses, says, draws and tells trackers, and upcycle after it."""

# ruff: noqa: F401, F811 - fixtures of another file

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from moe_convert.calibrate.report import StepRecord
from moe_convert.calibration import Calibration, wanted
from moe_convert.errors import MissingDependencyError, UsageError
from moe_convert.experts import Clone, Contribution
from moe_convert.manifest import CalibrationReport, load_manifest
from tests.calibration import NOISY, SPLIT, Made, calibrated, copy, job_of, originals, text
from tests.conftest import Dense
from tests.test_cli import invoke

REFUSED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"train": "router"}, "exact copies"),
    ({"target__top_k": 1, **NOISY}, {"train": "router"}, "same weight whatever the router says"),
    (NOISY, {"bias_update": 0.1}, "stores no selection bias"),
    (NOISY, {"objective": "hidden+lm"}, "cannot be mixed"),
    (NOISY, {"objective": "aux"}, "says nothing to experts"),
    (NOISY, {"objective": {"lm": 0, "aux": 0, "z": 0}}, "no term that counts"),
    (NOISY, {"batch_size": 3, "grad_accum": 2}, "cannot be cut"),
    (NOISY, {"mixed_precision": "fp16", "parallel": "fsdp"}, "needs its losses scaled"),
    (SPLIT, {"objective": "hidden", "grad_accum": 2}, "calibration.grad_accum cannot take effect"),
    (SPLIT, {"objective": "hidden", "early_stop": {"patience": 2}}, "calibration.early_stop"),
]


@pytest.mark.parametrize(("made", "settings", "reason"), REFUSED, ids=lambda v: str(v)[:40])
def test_what_cannot_work_is_refused(
    originals: Made,
    dense: Dense,
    text: Path,
    made: dict[str, Any],
    settings: dict[str, Any],
    reason: str,
) -> None:
    with pytest.raises(UsageError, match=reason):
        job_of(originals(**made), dense(), text, **settings)


def test_a_tracker_that_is_not_installed_is_named(
    copy: Made, calibrated: Callable[..., CalibrationReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="wandb") as found:
        calibrated(copy(**NOISY), trackers=("wandb",))
    assert found.value.hint == "pip install 'moe-convert[wandb]'"


def test_trackers_get_every_step_and_say_nothing_on_stdout(
    copy: Made, dense: Dense, text: Path, tmp_path: Path
) -> None:
    """Read back from what they wrote, without a network."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    pytest.importorskip("trackio")
    folder = copy(**SPLIT)
    options = ["--source", dense(), "--data", text, "--seq-len", 32, "--batch-size", 2]
    options += ["--max-steps", 3, "--tracker", "trackio", "--tracker", "tensorboard", "--json"]
    command = [sys.executable, "-m", "moe_convert", "calibrate", folder, *options]
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio")}
    done = subprocess.run(
        [*map(str, command)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["calibration"]["steps"] == 3
    log = (folder / "calibration.jsonl").read_text("utf-8").splitlines()
    losses = [(line["step"], line["loss"]) for line in map(json.loads, log)]
    events = accumulator.EventAccumulator(str(tmp_path / "out.logs" / "moe-convert"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    assert found == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in losses]
    assert {"loss/distill", "tokens_per_s", "max_violation"} <= set(events.Tags()["scalars"])
    with sqlite3.connect(tmp_path / "trackio" / "moe-convert.db") as database:
        rows = database.execute("SELECT step, metrics FROM metrics ORDER BY step").fetchall()
    assert [(step, json.loads(metrics)["loss"]) for step, metrics in rows] == losses


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "is empty"), (b"ab", "at least 16"), (b"caf\xe9 " * 50, "is not UTF-8")],
)
def test_text_that_cannot_be_used_is_refused(
    originals: Made, dense: Dense, tmp_path: Path, content: bytes, reason: str
) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=reason):
        job_of(originals(**NOISY), dense(), path)


def test_calibration_needs_no_network(
    copy: Made, dense: Dense, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file is enough; a data set of the Hub is refused in a line if the Hub cannot be reached."""
    pytest.importorskip("datasets")

    def unreachable(*args: Any) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr("socket.socket.connect", unreachable)
    options = ("--source", dense(), "--seq-len", 32, "--batch-size", 2, "--max-steps", 1)
    assert invoke("calibrate", copy("one", **SPLIT), "--data", text, *options).exit_code == 0
    result = invoke("calibrate", copy("two", **SPLIT), "--data", "org/name", *options, "--json")
    assert result.exit_code == 6
    assert "org/name" in json.loads(result.stdout)["error"]["message"]


def test_splits_are_calibrated_by_default_where_there_is_a_gpu() -> None:
    asked, split = Calibration(), Contribution()
    assert wanted(asked, split, exact=False, gpu=True)
    assert not wanted(asked, split, exact=False, gpu=False)
    assert not wanted(asked, split, exact=True, gpu=True)
    assert not wanted(asked, Clone(), exact=False, gpu=True)
    assert wanted(Calibration(enabled=True), split, exact=True, gpu=False)


def test_the_command_prints_a_table_and_json(
    copy: Made, dense: Dense, text: Path, tmp_path: Path
) -> None:
    options = ("--data", text, "--seq-len", 32, "--max-steps", 2, "--batch-size", 2)
    result = invoke("calibrate", copy("one", **SPLIT), "--source", dense(), *options)
    assert result.exit_code == 0, result.output
    assert "routing value" in result.stdout
    assert "calibrate: step 2/2, loss" in result.stderr
    result = invoke("calibrate", copy("two", **SPLIT), "--source", dense(), *options, "--json")
    found = json.loads(result.stdout)
    assert found["calibration"]["steps"] == 2
    assert found["calibration"]["after"]["perplexity"] > 1


def test_the_command_needs_the_dense_source(copy: Made, text: Path) -> None:
    result = invoke("calibrate", copy(**SPLIT), "--data", text)
    assert result.exit_code == 2
    assert "Give it with --source." in result.stderr


def test_upcycle_goes_on_to_calibrate(dense: Dense, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    words = ("--method", "split", "--strategy", "random", "-o", output, "--calibrate", "--data")
    steps = ("--max-steps", 2, "--batch-size", 2, "--seq-len", 32)
    result = invoke("upcycle", dense(), *words, text, *steps, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["calibration"]["steps"] == 2
    manifest = load_manifest(output)
    assert manifest.state == "calibrated"
    assert manifest.recipe["calibration"]["enabled"] is True
    assert invoke("verify", output, "--source", dense()).exit_code == 0


def test_a_plan_refuses_a_calibration_that_cannot_work(dense: Dense) -> None:
    result = invoke("plan", dense(), "--calibrate", "--train", "router")
    assert result.exit_code == 2
    assert "the routers get no gradient from lm" in result.stderr


def test_a_gate_on_the_command_line_exits_with_5(copy: Made, dense: Dense, text: Path) -> None:
    options = ("--data", text, "--seq-len", 32, "--max-steps", 1, "--max-ppl-ratio", 0.01)
    result = invoke("calibrate", copy(**SPLIT), "--source", dense(), *options, "--json")
    assert result.exit_code == 5
    assert json.loads(result.stdout)["status"] == "gate_failed"


def test_the_panel_shows_losses_speed_and_load() -> None:
    from rich.console import Console
    from rich.live import Live

    from moe_convert.calibrate.panel import LivePanel, heat

    console = Console(width=110, record=True, force_terminal=True, file=StringIO())
    record = StepRecord(
        step=3,
        steps=9,
        tokens=1234,
        loss=0.5,
        terms={"distill": 0.25},
        lr=1e-3,
        grad_norm=0.7,
        tokens_per_s=4321.0,
        max_violation=1.5,
        dead_experts=2,
        load=((0.0, 0.5, 0.5), (0.9, 0.05, 0.05)),
    )
    panel = LivePanel(Live(console=console))
    panel.phase("loading")
    panel.step(record)
    console.print(panel._panel(record))
    shown = console.export_text()
    for part in ("3 of 9", "distill 0.2500", "4,321 tokens/s", "2 dead experts", "1 ███"):
        assert part in shown
    colours = {str(span.style) for span in heat(record.load).spans}
    assert "grey23" in colours
    assert len(colours) >= 4


def test_lines_come_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    from moe_convert.calibrate.panel import watcher

    with watcher(Console(), show=True) as watching:
        watching.phase("loading")
    with watcher(Console(), show=False) as watching:
        watching.phase("never")
    assert capsys.readouterr().out == "calibrate: loading\n"
