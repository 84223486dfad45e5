"""Layer-wise calibration: what it learns, and that a killed run goes on inside a layer."""

# ruff: noqa: F401, F811 - fixtures of another file

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_convert.calibrate.run import run
from moe_convert.checkpoint.replace import WORK
from moe_convert.errors import UsageError
from moe_convert.manifest import CalibrationReport
from tests.calibration import SPLIT, Made, Stop, calibrated, changed, copy, job_of, originals, text
from tests.conftest import Dense
from tests.tools import load as load_strictly
from tests.tools import tensors

HIDDEN: dict[str, Any] = {"objective": "hidden", "train": "router+experts", "max_steps": 4}
Whole = tuple[CalibrationReport, dict[str, bytes]]


@pytest.mark.parametrize("target", ["mixtral", "glm4_moe", "granitemoe"])
def test_layers_learn_the_dense_output_by_themselves(
    copy: Made, calibrated: Callable[..., CalibrationReport], target: str
) -> None:
    folder = copy(target__architecture=target, **SPLIT)
    before = tensors(folder)
    report = calibrated(folder, **{**HIDDEN, "max_steps": 20})
    assert report.loss_last < 0.9 * report.loss_first
    assert report.after.kl < report.before.kl
    assert report.steps == 60
    names = changed(before, folder)
    assert names
    assert not [name for name in names if "self_attn" in name or "norm" in name]
    load_strictly(folder)


@pytest.fixture(scope="module")
def whole(
    originals: Made, dense: Dense, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> Whole:
    """Return report and tensors of a run that nothing cut short."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    shutil.copytree(originals(**SPLIT), folder)
    return run(*job_of(folder, dense(), text, **HIDDEN)), tensors(folder)


@pytest.mark.parametrize(
    ("killed_at", "kept"), [(2, None), (4, 2), (5, 4), (7, 6), (8, 6)], ids=str
)
def test_a_killed_layer_wise_run_ends_with_the_same_bytes(
    copy: Made,
    calibrated: Callable[..., CalibrationReport],
    whole: Whole,
    killed_at: int,
    kept: int | None,
) -> None:
    """It goes on inside a layer, at the last checkpoint, and both runs report the same."""
    cut = copy("cut", **SPLIT)
    with pytest.raises(RuntimeError, match="killed"):
        calibrated(cut, Stop(killed_at), **HIDDEN)
    report = calibrated(cut, **HIDDEN)
    assert report == whole[0].model_copy(update={"resumed_from": kept})
    assert tensors(cut) == whole[1]
    log = (cut / "calibration.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["step"] for line in log] == list(range(1, 13))


@pytest.mark.parametrize("stopped_at", [5, 8], ids=["inside a layer", "at its end"])
def test_an_interrupted_layer_loses_no_step(
    copy: Made, calibrated: Callable[..., CalibrationReport], whole: Whole, stopped_at: int
) -> None:
    cut, settings = copy("cut", **SPLIT), {**HIDDEN, "save_every": 100}
    with pytest.raises(KeyboardInterrupt):
        calibrated(cut, Stop(stopped_at, signal.SIGINT), **settings)
    names = ["layer-00000.safetensors", f"step-{stopped_at:08d}"]
    assert sorted(path.name for path in (cut / WORK).iterdir()) == names
    assert calibrated(cut, **settings).resumed_from == stopped_at
    assert tensors(cut) == whole[1]


def test_a_layer_outlives_its_checkpoints(
    copy: Made,
    calibrated: Callable[..., CalibrationReport],
    whole: Whole,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run killed after it had kept a layer, and before that layer's checkpoints were gone."""
    cut = copy("cut", **SPLIT)

    def killed(folder: Path) -> None:
        raise RuntimeError("killed")

    monkeypatch.setattr("moe_convert.training.state.discard_steps", killed)
    with pytest.raises(RuntimeError, match="killed"):
        calibrated(cut, **HIDDEN)
    monkeypatch.undo()
    assert (cut / WORK / "step-00000004").is_dir()
    assert calibrated(cut, **HIDDEN).resumed_from == 4
    assert tensors(cut) == whole[1]


def test_layer_wise_training_is_for_routers_and_experts(
    copy: Made, calibrated: Callable[..., CalibrationReport]
) -> None:
    with pytest.raises(UsageError, match="routers and experts, and nothing else"):
        calibrated(copy(**SPLIT), **{**HIDDEN, "train": "norms"})
