"""What a calibration leaves: after its last step, after a kill at any point, after a second run."""
# ruff: noqa: F811

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_convert.calibrate.guards import remedy
from moe_convert.calibrate.job import Request, prepare
from moe_convert.calibrate.measure import measure
from moe_convert.calibrate.models import load, target_of
from moe_convert.calibrate.report import Silent
from moe_convert.calibrate.run import run
from moe_convert.calibrate.watch import Watch
from moe_convert.calibration import Calibration
from moe_convert.card import CARD_NAME, PICTURE_NAME, measured, write_card
from moe_convert.card.facts import needed_options
from moe_convert.checkpoint import open_source
from moe_convert.checkpoint.replace import JOURNAL, WORK, recover
from moe_convert.data import Data
from moe_convert.errors import UsageError, VerificationError
from moe_convert.manifest import CalibrationReport, load_manifest
from moe_convert.reproduce import Places, reproduce
from moe_convert.training.state import TENSORS
from tests.calibration import (  # noqa: F401
    NOISY,
    SPLIT,
    Made,
    Stop,
    calibrated,
    copy,
    job_of,
    originals,
    text,
)
from tests.conftest import Dense
from tests.test_cli import invoke
from tests.tools import digest, edit_tensors, tensors

Calibrate = Callable[..., CalibrationReport]
HIDDEN: dict[str, Any] = {"objective": "hidden", "train": "router+experts"}


class KilledIn(Silent):
    """Kills the run when it comes to a phase for the second time, or by Ctrl-C."""

    def __init__(self, phase: str, count: int = 1, number: signal.Signals | None = None) -> None:
        self._phase, self._count, self._number = phase, count, number

    def phase(self, what: str) -> None:
        """Do it."""
        self._count -= what == self._phase
        if self._count == 0 and what == self._phase and self._number:
            os.kill(os.getpid(), self._number)
        elif self._count == 0 and what == self._phase:
            raise RuntimeError("killed")


@pytest.mark.parametrize("settings", [{"train": "all"}, HIDDEN], ids=["whole", "layers"])
@pytest.mark.parametrize("lr", [30.0, 1e30])
def test_a_last_step_that_wrecks_the_model_is_not_written(
    copy: Made, calibrated: Calibrate, lr: float, settings: dict[str, Any]
) -> None:
    """The loss of a step is that before it, so only what was measured afterwards can tell."""
    folder = copy(**SPLIT)
    before = tensors(folder)
    changes = {"max_steps": 1, "optimizer": {"lr": lr}, "guards": {"max_ppl_rise": 1.01}}
    with pytest.raises(VerificationError, match="diverged in") as found:
        calibrated(folder, **{**settings, **changes})
    assert "smaller --lr" in found.value.hint
    assert tensors(folder) == before
    assert load_manifest(folder).state == "converted"
    assert not (folder / WORK).exists()


def test_perplexity_may_rise_where_that_is_allowed(copy: Made, calibrated: Calibrate) -> None:
    folder = copy(**SPLIT)
    settings = {"train": "all", "max_steps": 1, "optimizer": {"lr": 30.0}}
    with pytest.raises(VerificationError, match=r"perplexity is .*, and it was .* before") as found:
        calibrated(folder, **settings, guards={"max_ppl_rise": 1.01})
    assert "calibration.guards.max_ppl_rise" in found.value.hint
    report = calibrated(folder, **settings, guards={"max_ppl_rise": 1e30})
    assert report.after.perplexity > 1.01 * report.before.perplexity


@pytest.mark.parametrize(
    ("settings", "remedies"),
    [
        ({"train": "router"}, "use a smaller --lr"),
        ({"train": "router", "mixed_precision": "fp16"}, "use bf16, or use a smaller --lr"),
        ({"train": [], "bias_update": 0.1}, "use a smaller --bias-update"),
        (
            {"train": "router", "bias_update": 0.1},
            "use a smaller --lr, or use a smaller --bias-update",
        ),
    ],
    ids=str,
)
def test_a_remedy_is_about_what_moved(settings: dict[str, Any], remedies: str) -> None:
    told = remedy(Calibration.model_validate(settings))
    assert told == f"The weights are those of the start; {remedies}."


@pytest.mark.parametrize("objective", ["none", "aux"])
def test_biases_that_wreck_a_model_are_named(
    copy: Made, calibrated: Calibrate, objective: str
) -> None:
    settings: dict[str, Any] = {"objective": objective, "bias_update": 1e39, "max_steps": 1}
    settings |= {"train": "router"} if objective == "aux" else {}
    with pytest.raises(VerificationError, match="diverged in its last steps") as found:
        calibrated(copy(target__architecture="glm4_moe", **NOISY), **settings)
    assert "a smaller --bias-update" in found.value.hint
    assert ("a smaller --lr" in found.value.hint) == (objective == "aux")


def test_weights_that_are_not_finite_are_not_written(
    copy: Made, calibrated: Calibrate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even those of an expert that no token of the measurement uses."""
    folder = copy(**SPLIT)
    before = tensors(folder)

    def spoiled(*args: Any) -> dict[str, torch.Tensor]:
        return {"model.layers.0.mlp.gate.weight": torch.tensor([1.0, math.inf])}

    monkeypatch.setattr("moe_convert.calibrate.run.named_tensors", spoiled)
    with pytest.raises(VerificationError, match="not finite"):
        calibrated(folder)
    assert tensors(folder) == before


def test_a_report_that_json_cannot_say_is_not_written(
    copy: Made, calibrated: Calibrate, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy(**SPLIT)
    before = tensors(folder)
    monkeypatch.setattr("moe_convert.calibrate.run.failures", lambda *args: [])

    def spoiled(job: Any, one: Any, *args: Any) -> None:
        one.kl = math.nan

    monkeypatch.setattr("moe_convert.calibrate.run.judge_result", spoiled)
    with pytest.raises(VerificationError, match=r"calibration\.before\.kl is not finite"):
        calibrated(folder)
    assert tensors(folder) == before
    assert load_manifest(folder).calibration is None


def test_divergence_that_is_not_finite_is_no_zero(originals: Made) -> None:
    folder = originals(**NOISY)
    model, row = load(folder, torch.float32), target_of(folder)
    model.lm_head.weight.data[3, 3] = math.nan
    found = measure(model, model, Watch(model, row, top_k=2), torch.arange(16)[None])
    assert math.isnan(found.kl)


@pytest.mark.parametrize(
    "setting",
    ["clip_norm", "optimizer.lr", "optimizer.weight_decay", "guards.max_loss_ratio", "bias_update"],
)
def test_settings_that_are_not_finite_are_refused(
    originals: Made, dense: Dense, setting: str
) -> None:
    few = ("--source", dense(), "--set", f"calibration.{setting}=inf")
    result = invoke("calibrate", originals(**NOISY), *few)
    assert result.exit_code == 2
    assert "finite" in result.stderr


@pytest.mark.parametrize(("phase", "count"), [("measuring", 2), ("writing", 1)])
def test_a_run_killed_after_its_last_step_only_measures_and_writes(
    copy: Made, calibrated: Calibrate, phase: str, count: int
) -> None:
    whole, cut = copy("whole", **NOISY), copy("cut", **NOISY)
    settings = {"max_steps": 5, "save_every": 100}
    expected = calibrated(whole, **settings)
    with pytest.raises(RuntimeError, match="killed"):
        calibrated(cut, KilledIn(phase, count), **settings)
    report = calibrated(cut, Stop(5), **settings)
    assert report.resumed_from == 5
    assert report.loss_last == expected.loss_last
    assert tensors(cut) == tensors(whole)
    assert load_manifest(cut).calibration == report


def test_an_interrupt_while_measuring_loses_no_step(copy: Made, calibrated: Calibrate) -> None:
    folder = copy(**NOISY)
    with pytest.raises(KeyboardInterrupt):
        calibrated(folder, KilledIn("measuring", 2, signal.SIGINT), max_steps=3, save_every=100)
    assert [path.name for path in (folder / WORK).iterdir()] == ["step-00000003"]


def test_a_checkpoint_is_due_after_some_time(
    copy: Made, calibrated: Calibrate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_convert.calibrate.saving.SAVE_S", 0.0)
    folder = copy(**NOISY)
    with pytest.raises(RuntimeError, match="killed"):
        calibrated(folder, Stop(4), save_every=100)
    assert calibrated(folder, save_every=100).resumed_from == 3


def test_a_run_that_stopped_early_does_not_go_on(copy: Made, calibrated: Calibrate) -> None:
    whole, cut = copy("whole", **NOISY), copy("cut", **NOISY)
    settings = {"early_stop": {"patience": 3, "min_delta": 1.0}, "max_steps": 50}
    calibrated(whole, **settings)
    with pytest.raises(RuntimeError, match="killed"):
        calibrated(cut, KilledIn("writing"), **settings)
    report = calibrated(cut, **settings)
    assert (report.steps, report.stopped_early) == (4, True)
    assert tensors(cut) == tensors(whole)


@pytest.mark.parametrize("damage", ["truncated", "a tensor is missing"])
def test_a_damaged_checkpoint_is_named(copy: Made, calibrated: Calibrate, damage: str) -> None:
    folder = copy(**NOISY)
    with pytest.raises(RuntimeError, match="killed"):
        calibrated(folder, Stop(3))
    path = folder / WORK / "step-00000002" / TENSORS
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-40])
    else:
        path.rename(path.with_name("model.safetensors"))
        edit_tensors(path.parent, lambda data: data.pop(next(n for n in data if "master" in n)))
        path.with_name("model.safetensors").rename(path)
    with pytest.raises(UsageError, match="step-00000002 is damaged"):
        calibrated(folder)


def test_a_checkpoint_of_another_teacher_is_not_taken_up(
    copy: Made, dense: Dense, text: Path, tmp_path: Path
) -> None:
    folder, other = copy(**SPLIT), tmp_path / "other"
    shutil.copytree(dense(), other)
    with pytest.raises(RuntimeError, match="killed"):
        run(*job_of(folder, dense(), text), Stop(3))
    moved = Path(shutil.copytree(other, tmp_path / "moved"))
    job, ids_BT = job_of(folder, moved, text)
    with pytest.raises(RuntimeError, match="killed"):
        run(job, ids_BT, Stop(5))
    edit_tensors(other, lambda data: data["model.norm.weight"].mul_(2))
    with pytest.raises(UsageError, match="other settings, data or weights"):
        run(*job_of(folder, other, text))


def options(dense: Dense, text: Path, *more: object) -> list[object]:
    few = ["--seq-len", 32, "--batch-size", 2, "--max-steps", 2]
    return ["--source", dense(), "--data", text, *few, *more]


def test_a_commit_that_was_cut_short_is_finished_and_not_trained_again(
    copy: Made, dense: Dense, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = copy("whole", **SPLIT), copy("cut", **SPLIT)
    assert invoke("calibrate", whole, *options(dense, text)).exit_code == 0

    def killed(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("killed")

    monkeypatch.setattr("moe_convert.checkpoint.replace._finish", killed)
    assert invoke("calibrate", cut, *options(dense, text)).exit_code == 1
    monkeypatch.undo()
    assert (cut / WORK / JOURNAL).is_file()
    spare = Path(shutil.copytree(cut, cut.with_name("spare")))
    result = invoke("calibrate", cut, *options(dense, text))
    assert result.exit_code == 0, result.stderr
    assert "an earlier run had trained it" in result.stderr
    assert "2 steps" in result.stdout
    assert tensors(cut) == tensors(whole)
    with pytest.raises(UsageError, match="was killed while it put the trained weights"):
        job_of(spare, dense(), text)
    assert tensors(spare) == tensors(whole)


def test_the_card_changes_with_the_weights(copy: Made, calibrated: Calibrate) -> None:
    """All of it is in place at once, so that none is that of before."""
    folder = copy(**SPLIT)
    write_card(folder, load_manifest(folder), name="me/mine")
    before = digest(folder)
    calibrated(folder)
    after, card = digest(folder), (folder / CARD_NAME).read_text("utf-8")
    assert before[PICTURE_NAME] != after[PICTURE_NAME]
    assert "Trained: experts" in card
    assert 'from_pretrained("me/mine")' in card
    assert load_manifest(folder).card_sha256 == after[CARD_NAME]


def test_the_card_of_a_commit_that_was_cut_short_is_finished_too(
    copy: Made, calibrated: Calibrate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without matplotlib a picture is left out, and the old one goes at that moment."""
    folder = copy(**SPLIT)
    write_card(folder, load_manifest(folder))
    before = digest(folder)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)

    def killed(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("killed")

    with monkeypatch.context() as cut:
        cut.setattr("moe_convert.checkpoint.replace._finish", killed)
        with pytest.raises(RuntimeError, match="killed"):
            calibrated(folder)
    now = digest(folder)
    assert {name: now[name] for name in before} == before
    assert recover(folder)
    assert not (folder / PICTURE_NAME).exists()
    assert load_manifest(folder).card_sha256 == digest(folder)[CARD_NAME] != before[CARD_NAME]


def test_a_card_that_was_edited_stays_as_it_is(copy: Made, calibrated: Calibrate) -> None:
    folder = copy(**SPLIT)
    path = write_card(folder, load_manifest(folder))
    path.write_text("My own words.", encoding="utf-8")
    before = digest(folder)
    calibrated(folder)
    after = digest(folder)
    assert {name: after[name] for name in (CARD_NAME, PICTURE_NAME)} == {
        name: before[name] for name in (CARD_NAME, PICTURE_NAME)
    }


def test_copies_stay_exact_where_only_their_routers_were_trained(
    copy: Made, calibrated: Calibrate
) -> None:
    folder = copy()
    calibrated(folder, train="router", objective="aux")
    assert load_manifest(folder).exact
    with pytest.raises(UsageError, match="exact copies"):
        calibrated(folder, train="router", objective="lm")
    calibrated(folder, train="experts", objective="lm")
    assert not load_manifest(folder).exact


def test_settings_do_not_stick_to_a_folder(copy: Made, dense: Dense, text: Path) -> None:
    folder = copy(**SPLIT)
    made = load_manifest(folder).recipe
    once = options(dense, text, "--objective", "lm", "--train", "router", "--max-ppl-ratio", 1e9)
    assert invoke("calibrate", folder, *once, "--mixed-precision", "no").exit_code == 0
    manifest = load_manifest(folder)
    assert manifest.recipe == made
    assert manifest.calibration is not None
    assert manifest.calibration.settings["calibration"]["train"] == ["router"]
    assert manifest.calibration.settings["data"]["train"] == "text.txt"
    assert invoke("calibrate", folder, *options(dense, text)).exit_code == 0
    again = load_manifest(folder)
    assert again.calibration is not None
    assert again.calibration.objective == {"distill": 1.0}
    assert again.calibration.trained == ["experts"]
    assert again.earlier == [manifest.calibration]


def test_two_calibrations_are_made_again(
    copy: Made, dense: Dense, text: Path, tmp_path: Path
) -> None:
    folder = copy(**SPLIT)
    for more in (("--objective", "lm"), ("--lr", 1e-4)):
        assert invoke("calibrate", folder, *options(dense, text, *more)).exit_code == 0
    manifest = load_manifest(folder)
    assert "; then experts (" in measured.trained(manifest)
    assert needed_options(manifest) == " --source PATH --data PATH"
    found = reproduce(folder, tmp_path / "new", Places(str(dense()), data=str(text)))
    assert (found.equal, found.notes) == (True, [])
    with pytest.raises(UsageError, match=r"text\.txt is recorded by its name only"):
        reproduce(folder, tmp_path / "other", Places(str(dense())))
    assert not (tmp_path / "other").exists()


def test_the_text_of_a_conversion_is_not_replaced_in_silence(
    originals: Made, dense: Dense, text: Path
) -> None:
    made = originals(**SPLIT, data__train=str(text))
    result = invoke("calibrate", made, "--source", dense())
    assert result.exit_code == 2
    assert "text.txt is recorded by its name only" in result.stderr
    assert "--data self" in result.stderr


def test_a_row_to_train_on_is_not_measured_on(
    originals: Made, dense: Dense, tmp_path: Path
) -> None:
    path = tmp_path / "short.txt"
    path.write_text("The river and the lower fields were under water by then.", encoding="utf-8")
    section, data = Calibration(max_steps=1), Data(train=str(path), seq_len=512)
    with pytest.raises(UsageError, match="one row of"):
        prepare(Request(originals(**SPLIT), open_source(str(dense())), section, data))


def test_a_step_has_no_row_twice(originals: Made, dense: Dense, text: Path) -> None:
    folder = originals(**SPLIT)
    job, ids_BT = job_of(folder, dense(), text, batch_size=None, max_tokens=1024)
    assert job.batch_size == len(ids_BT) - job.num_held == 28
    with pytest.raises(UsageError, match="A step would have 29 rows, and the data gives 28"):
        job_of(folder, dense(), text, batch_size=29, max_tokens=1024)


def test_the_step_that_diverged_is_in_the_log(copy: Made, calibrated: Calibrate) -> None:
    folder = copy(**NOISY)
    with pytest.raises(VerificationError, match="diverged at step 2"):
        calibrated(folder, optimizer={"lr": 1e30}, schedule={"warmup": 0.0})
    lines = (folder / "calibration.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
