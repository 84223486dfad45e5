"""What the tests of calibration share: a text, conversions, a run in one line, a kill."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from moe_convert.calibrate.job import Job, Request, prepare
from moe_convert.calibrate.report import Silent, StepRecord
from moe_convert.calibrate.run import run
from moe_convert.calibration import Calibration
from moe_convert.checkpoint import open_source
from moe_convert.data import Data
from moe_convert.manifest import CalibrationReport
from tests.conftest import Dense
from tests.tools import converted, tensors

if TYPE_CHECKING:
    import torch

TEXT = "The river and the lower fields were under water; {} hens sat in a basket.\n"
NOISY: dict[str, Any] = {"experts__edits": [{"edit": "noise", "std": 0.1}]}
SPLIT: dict[str, Any] = {"experts__method": "split", "experts__strategy": "random"}
Made = Callable[..., Path]
SETTINGS: dict[str, Any] = {"max_steps": 6, "batch_size": 4, "save_every": 2}


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file of a few thousand tokens."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(TEXT.format(n) for n in range(200)), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def originals(dense: Dense, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Make conversions, each once; nobody may write into them."""
    made: dict[str, Path] = {}

    def make(dtype: str = "float32", **changes: Any) -> Path:
        key = repr((dtype, sorted(changes.items())))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("original") / "out"
            converted(dense(dtype=dtype), made[key], **changes)
        return made[key]

    return make


@pytest.fixture
def copy(originals: Made, tmp_path: Path) -> Made:
    """Return a copy of a conversion that may be trained."""

    def make(name: str = "out", **changes: Any) -> Path:
        return Path(shutil.copytree(originals(**changes), tmp_path / name))

    return make


@pytest.fixture
def calibrated(dense: Dense, text: Path) -> Callable[..., CalibrationReport]:
    """Calibrate a folder with a few settings; the text is the same for all."""

    def calibrate(folder: Path, watcher: Any = None, **settings: Any) -> CalibrationReport:
        return run(*job_of(folder, dense(), text, **settings), watcher)

    return calibrate


def job_of(
    folder: Path, dense: Path, text: Path, *, resume: bool = True, **settings: Any
) -> tuple[Job, torch.Tensor]:
    section = Calibration.model_validate({**SETTINGS, **settings})
    data = Data(train=str(text), seq_len=32)
    return prepare(Request(folder, open_source(str(dense)), section, data, resume=resume))


def changed(before: dict[str, bytes], folder: Path) -> set[str]:
    after = tensors(folder)
    assert after.keys() == before.keys()
    return {name for name in before if before[name] != after[name]}


class Stop(Silent):
    """Kills the run, the hard way or by Ctrl-C, after a step."""

    def __init__(self, step: int, number: signal.Signals | None = None) -> None:
        self._step, self._number = step, number

    def step(self, record: StepRecord) -> None:
        """Do it."""
        if record.step == self._step and self._number:
            os.kill(os.getpid(), self._number)
        elif record.step == self._step:
            raise RuntimeError("killed")
