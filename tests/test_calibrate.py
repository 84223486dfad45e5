"""Calibration on tiny checkpoints: what is trained, what stays, resuming, guards and refusals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_convert.calibrate.dense_experts import MOVING, widen_experts
from moe_convert.calibrate.job import Job, Request, prepare
from moe_convert.calibrate.memory import compute_twice, kept_bytes
from moe_convert.calibrate.models import (
    load,
    modules_of,
    prepare_student,
    share_weights,
    target_of,
)
from moe_convert.calibrate.report import Silent, StepRecord
from moe_convert.calibrate.run import run
from moe_convert.calibrate.step import Models
from moe_convert.calibrate.watch import Watch
from moe_convert.calibrate.write_back import named_tensors, stored_tensors
from moe_convert.calibration import Calibration, patterns, wanted
from moe_convert.checkpoint import open_source, read_folder
from moe_convert.checkpoint.replace import WORK, commit, recover, stage_tensors
from moe_convert.data import Data
from moe_convert.errors import MissingDependencyError, UsageError, VerificationError
from moe_convert.experts import Clone, Contribution
from moe_convert.manifest import CalibrationReport, load_manifest
from moe_convert.targets import TARGETS
from moe_convert.training.batches import order
from moe_convert.training.optimizer import Stepper, Trained, rate_at
from moe_convert.training.settings import Schedule
from tests.conftest import Dense
from tests.test_cli import invoke
from tests.tiny import pairs
from tests.tools import converted, digest, tensors
from tests.tools import load as load_strictly

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


@pytest.mark.parametrize(
    ("train", "mark"), [("router", ".gate."), ("experts", ".experts."), ("norms", "norm")]
)
def test_only_what_is_trained_changes(
    copy: Made, calibrated: Callable[..., CalibrationReport], train: str, mark: str
) -> None:
    folder = copy(**NOISY)
    before, files = tensors(folder), digest(folder)
    report = calibrated(folder, train=train)
    names = changed(before, folder)
    assert names
    assert names == {name for name in before if mark in name and names}
    after = digest(folder)
    assert {name for name in files if files[name] != after[name]} <= {
        "model.safetensors",
        "moe_convert.json",
    }
    assert after.keys() - files.keys() == {"calibration.jsonl"}
    load_strictly(folder)
    manifest = load_manifest(folder)
    assert manifest.state == "calibrated"
    assert manifest.calibration == report
    assert {file.path: file.sha256 for file in manifest.target.files}["model.safetensors"] == (
        after["model.safetensors"]
    )


def test_several_shards_of_bf16_keep_their_layout(
    copy: Made, calibrated: Callable[..., CalibrationReport]
) -> None:
    folder = copy(dtype="bfloat16", output__max_shard_size="100KB", **NOISY)
    before, refs = tensors(folder), read_folder(folder)
    calibrated(folder, train="router")
    assert {n.rsplit(".", 2)[-2] for n in changed(before, folder)} == {"gate"}
    found = read_folder(folder)
    assert {name: (r.path, r.dtype, r.shape, r.offset) for name, r in refs.items()} == {
        name: (r.path, r.dtype, r.shape, r.offset) for name, r in found.items()
    }


def test_a_split_gets_closer_to_the_dense_model(
    copy: Made, calibrated: Callable[..., CalibrationReport]
) -> None:
    report = calibrated(copy(**SPLIT), max_steps=60, optimizer={"lr": 1e-3})
    assert report.trained == ["router", "experts"]
    assert report.objective == {"distill": 1.0}
    assert report.after.kl < 0.7 * report.before.kl
    assert report.loss_last < 0.7 * report.loss_first


def test_noisy_clones_learn_the_text(
    copy: Made, calibrated: Callable[..., CalibrationReport]
) -> None:
    report = calibrated(copy(**NOISY), max_steps=20, optimizer={"lr": 1e-3})
    assert report.objective == {"lm": 1.0, "aux": 0.01, "z": 0.001}
    assert report.after.perplexity < 0.8 * report.before.perplexity
    assert report.before.routing_value != 0


def test_what_a_loaded_model_calls_its_parts() -> None:
    names = [
        "model.layers.0.mlp.gate.weight",
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.shared_experts.down_proj.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.self_attn.q_proj.weight",
    ]
    found = patterns(("router", "experts", "norms", "all"), TARGETS["glm4_moe"])
    parts = {part: [n for n in names if pattern.search(n)] for part, pattern in found.items()}
    assert parts == {
        "router": names[:1],
        "experts": names[1:3],
        "norms": names[3:4],
        "all": names,
    }


@pytest.mark.parametrize(("model_type", "variant", "target"), pairs(), ids=lambda value: str(value))
def test_every_target_has_its_parts_and_goes_back_to_the_same_bytes(
    dense: Dense, tmp_path: Path, model_type: str, variant: str, target: str
) -> None:
    """What memory calls trained tensors has a place on disk, and nothing is lost on the way."""
    folder = tmp_path / "out"
    converted(dense(model_type, variant), folder, target__architecture=target)
    refs = read_folder(folder)
    for part in ("router", "experts", "norms", "all"):
        model, row = load(folder, torch.float32), target_of(folder)
        rates = {"lr": 1e-3, "router_factor": 1}
        section = Calibration.model_validate({"train": part, "optimizer": rates})
        trained = prepare_student(model, row, section)
        watch = Watch(model, row, top_k=2)
        with torch.no_grad(), watch.recording():
            model(input_ids=torch.arange(24).view(2, 12), use_cache=False)
        assert (watch.num_layers, watch.num_experts) == (3, 4)
        assert watch.counts().sum(dim=1).tolist() == [48.0] * 3
        assert all(logits.shape == (24, 4) for logits in watch.logits)
        models = Models(model, model, None, watch, Stepper(trained, section, 1))
        stored = dict(stored_tensors(folder, model, named_tensors(models)))
        assert stored
        for name, tensor in stored.items():
            assert torch.equal(refs[name].read(), tensor.to(refs[name].read().dtype)), name
        if part == "router":
            assert len(stored) == 3


APART = {"dbrx"}
"""Targets whose experts are no plain ones of transformers."""


@pytest.mark.parametrize(("model_type", "variant", "target"), pairs(), ids=lambda value: str(value))
def test_experts_as_one_ffn_give_the_same_values_and_gradients(
    dense: Dense,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model_type: str,
    variant: str,
    target: str,
) -> None:
    """In every architecture whose experts can be run so; the others are left alone.

    Gradients of a model's scales are sums of large numbers that nearly cancel, which fp32 rounds.
    """
    monkeypatch.setitem(MOVING, "cpu", 10_000)
    folder = tmp_path / "out"
    converted(dense(model_type, variant), folder, target__architecture=target, **NOISY)
    found = []
    for wide in (False, True):
        model = load(folder, torch.float32)
        trained = prepare_student(model, target_of(folder), Calibration(train=("all",)))
        if wide and not widen_experts(model, 2, "cpu"):
            assert target in APART
            return
        ids_BT = torch.arange(24).view(2, 12)
        logits = model(input_ids=ids_BT, use_cache=False).logits
        logits.log_softmax(-1)[..., 3].sum().backward()
        found.append([logits.detach(), *(one.parameter.grad for one in trained)])
    for plain, made in zip(*found, strict=True):
        assert float((made - plain).abs().max()) <= 3e-5 * max(1.0, float(plain.abs().max()))


def test_experts_stay_apart_where_that_costs_less(originals: Made) -> None:
    """Two of four experts: all of them cost twice the chosen ones, which narrow ones may."""
    narrow, wide = (load(originals(**made), torch.float32) for made in (SPLIT, NOISY))
    shapes = [modules_of(model, "experts")[0][1].down_proj.shape for model in (narrow, wide)]
    assert [tuple(shape)[::2] for shape in shapes] == [(4, 24), (4, 96)]
    assert widen_experts(narrow, 2, "cpu")
    assert not widen_experts(wide, 2, "cpu")
    assert not widen_experts(narrow, 1, "cpu")


def test_exact_clones_give_their_routers_no_gradient_and_noisy_ones_do(originals: Made) -> None:
    def gradient(folder: Path) -> float:
        model, row = load(folder, torch.float32), target_of(folder)
        trained = prepare_student(model, row, Calibration(train=("router",)))
        ids_BT = torch.arange(64).view(2, 32)
        model(input_ids=ids_BT, labels=ids_BT).loss.backward()
        return max(float(one.parameter.grad.abs().max()) for one in trained)

    assert gradient(originals()) < 1e-6
    assert gradient(originals(**NOISY)) > 1e-4


def test_a_straight_through_router_hears_of_experts_that_were_not_chosen(
    originals: Made,
) -> None:
    def rows_with_gradient(dense_router: bool) -> torch.Tensor:
        folder = originals(**NOISY)
        model, row = load(folder, torch.float32), target_of(folder)
        trained = prepare_student(model, row, Calibration(train=("router",)))
        Watch(model, row, top_k=2, dense_router=dense_router)
        logits = model(input_ids=torch.tensor([[7]]), use_cache=False).logits
        logits.log_softmax(-1)[0, 0, 3].backward()
        last = trained[-1].parameter.grad
        assert last is not None
        return last.abs().amax(dim=1) > 1e-7

    assert int(rows_with_gradient(dense_router=False).sum()) == 2
    assert int(rows_with_gradient(dense_router=True).sum()) == 4


def test_the_value_of_a_straight_through_model_is_the_sparse_one(originals: Made) -> None:
    folder = originals(**NOISY)
    model, row = load(folder, torch.float32), target_of(folder)
    prepare_student(model, row, Calibration(train=("router",)))
    ids_BT = torch.arange(16).view(1, 16)
    plain = model(input_ids=ids_BT).logits
    Watch(model, row, top_k=2, dense_router=True)
    torch.testing.assert_close(model(input_ids=ids_BT).logits, plain, atol=1e-5, rtol=1e-5)


def test_frozen_weights_are_shared_with_the_teacher_and_have_no_state(
    originals: Made, dense: Dense
) -> None:
    student, row = load(originals(), torch.float32), target_of(originals())
    teacher = load(dense(), torch.float32)
    rates = {"lr": 1e-3, "router_factor": 1}
    section = Calibration.model_validate({"train": "router", "optimizer": rates})
    trained = prepare_student(student, row, section)
    assert [one.part for one in trained] == ["router"] * 3
    outside = sum(p.numel() for name, p in teacher.named_parameters() if ".mlp." not in name)
    assert share_weights(teacher, student) == 4 * outside
    assert teacher.model.embed_tokens.weight is student.model.embed_tokens.weight
    ids_BT = torch.arange(8).view(1, 8)
    student(input_ids=ids_BT, labels=ids_BT).loss.backward()
    stepper = Stepper(trained, section, steps=2)
    stepper.step(0)
    kept = sum(t.numel() for name, t in stepper.tensors().items() if name.startswith("exp_avg"))
    assert kept == 2 * sum(one.parameter.numel() for one in trained)


def test_router_steps_keep_to_the_size_of_the_rows() -> None:
    """Rows of a tenth of the size move by a tenth of the step."""
    rates = {"lr": 1e-4, "router_factor": 10}
    section = Calibration.model_validate({"optimizer": rates, "schedule": {"warmup": 0}})
    moved = []
    for spread in (0.02, 0.002):
        rows = torch.nn.Parameter(torch.full((4, 8), spread))
        rows.grad = torch.ones_like(rows)
        Stepper([Trained("r", "router", rows, rows)], section, steps=10).step(0)
        moved.append(float((rows.detach() - spread).abs().max()))
    assert moved[0] == pytest.approx(1e-3, rel=1e-3)
    assert moved[1] == pytest.approx(1e-4, rel=1e-3)


def test_schedule_warms_up_and_comes_down() -> None:
    rates = [rate_at(Schedule(warmup=0.2), step, 10) for step in range(10)]
    assert rates[:2] == pytest.approx([1 / 3, 2 / 3])
    assert rates[2] == 1.0
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[6] == pytest.approx(0.5)
    assert rate_at(Schedule(name="constant", warmup=0), 9, 10) == 1.0


def test_every_pass_takes_each_row_once_in_another_order() -> None:
    first, second = order(8, 0, 8, seed=3), order(8, 8, 8, seed=3)
    assert sorted(first) == sorted(second) == list(range(8))
    assert first != second
    assert order(8, 5, 6, seed=3) == first[5:] + second[:3]
    assert order(8, 0, 8, seed=4) != first


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


@pytest.mark.parametrize("killed_at", [1, 3, 5])
def test_a_killed_run_ends_with_the_same_bytes(
    copy: Made, calibrated: Callable[..., CalibrationReport], killed_at: int
) -> None:
    settings = {"objective": {"lm": 1.0, "aux": 0.1}, "train": "router+experts"}
    whole, cut = copy("whole", **NOISY), copy("cut", **NOISY)
    calibrated(whole, **settings)
    before = digest(cut)
    with pytest.raises(RuntimeError, match="killed"):
        calibrated(cut, Stop(killed_at), **settings)
    assert {name: value for name, value in digest(cut).items() if name in before} == before
    report = calibrated(cut, **settings)
    assert report.resumed_from == (killed_at // 2 * 2 or None)
    assert tensors(cut) == tensors(whole)
    log = (cut / "calibration.jsonl").read_text("utf-8").splitlines()
    steps = [json.loads(line)["step"] for line in log]
    assert steps == list(range(1, 7))
    assert not (cut / WORK).exists()


def test_an_interrupt_writes_a_checkpoint(
    copy: Made, calibrated: Callable[..., CalibrationReport]
) -> None:
    whole, cut = copy("whole", **NOISY), copy("cut", **NOISY)
    calibrated(whole)
    with pytest.raises(KeyboardInterrupt):
        calibrated(cut, Stop(3, signal.SIGINT))
    assert sorted(path.name for path in (cut / WORK).iterdir()) == [
        "step-00000002",
        "step-00000003",
    ]
    assert calibrated(cut).resumed_from == 3
    assert tensors(cut) == tensors(whole)


def test_a_process_killed_at_random_ends_with_the_same_bytes(
    copy: Made, calibrated: Callable[..., CalibrationReport], dense: Dense, text: Path
) -> None:
    """A real SIGKILL, wherever it hits."""
    whole, cut = copy("whole", **NOISY), copy("cut", **NOISY)
    settings: dict[str, Any] = {"max_steps": 60, "save_every": 3, "keep": 1}
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


def test_loss_free_balancing_moves_the_stored_bias(
    copy: Made, calibrated: Callable[..., CalibrationReport]
) -> None:
    folder = copy(target__architecture="glm4_moe", **NOISY)
    before = tensors(folder)
    settings = {"objective": "aux", "train": "router", "bias_update": 0.01, "max_steps": 4}
    report = calibrated(folder, **settings)
    names = {n for n in changed(before, folder) if n.endswith("e_score_correction_bias")}
    assert len(names) == 3
    assert report.after.max_violation < report.before.max_violation


def test_balance_evens_out_the_load(
    copy: Made, calibrated: Callable[..., CalibrationReport]
) -> None:
    folder = copy()
    settings = {"objective": "aux", "train": "router", "optimizer": {"lr": 1e-3}}
    report = calibrated(folder, max_steps=60, **settings)
    assert report.after.max_violation < 0.6 * report.before.max_violation
    assert report.after.perplexity == pytest.approx(report.before.perplexity, rel=1e-4)


@pytest.mark.parametrize("settings", [{"gradient_checkpointing": True}, {"grad_accum": 2}])
def test_checkpointing_and_accumulation_change_nothing(
    copy: Made, calibrated: Callable[..., CalibrationReport], settings: dict[str, Any]
) -> None:
    one, other = copy("one", **NOISY), copy("other", **NOISY)
    objective = {"objective": {"distill": 1.0, "lm": 1.0, "aux": 0.0, "z": 0.1}}
    calibrated(one, **objective)
    calibrated(other, **objective, **settings)
    mine, theirs = read_folder(one), read_folder(other)
    for name in mine:
        torch.testing.assert_close(mine[name].read(), theirs[name].read(), atol=1e-5, rtol=1e-4)


def test_a_batch_in_parts_has_the_gradient_of_the_whole(
    copy: Made, calibrated: Callable[..., CalibrationReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Balance too: every part sees the counts of all of them."""
    step, seen = Stepper.step, []

    def keep(stepper: Stepper, number: int) -> torch.Tensor:
        seen.append([one.parameter.grad.clone() for one in stepper.trained])
        return step(stepper, number)

    monkeypatch.setattr(Stepper, "step", keep)
    objective = {"distill": 1.0, "lm": 1.0, "aux": 10.0, "z": 0.1}
    reports = [
        calibrated(copy(f"out{parts}", **NOISY), objective=objective, max_steps=1, grad_accum=parts)
        for parts in (1, 2, 4)
    ]
    for parts, report in zip(seen[1:], reports[1:], strict=True):
        assert report.loss_first == pytest.approx(reports[0].loss_first, rel=1e-6)
        for whole, found in zip(seen[0], parts, strict=True):
            torch.testing.assert_close(found, whole, atol=1e-6, rtol=1e-5)


class Phases(Silent):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def phase(self, what: str) -> None:
        """Keep it."""
        self.found.append(what)


def test_layers_are_computed_twice_if_a_step_does_not_fit(
    copy: Made, calibrated: Callable[..., CalibrationReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result is the same, so that a run may go on either way."""
    one, other, small, large = copy("one"), copy("other"), Phases(), Phases()
    calibrated(one, large)
    monkeypatch.setattr("moe_convert.calibrate.memory.free_bytes", lambda *args: 1_000)
    with pytest.raises(RuntimeError, match="killed"):
        calibrated(other, Stop(3))
    calibrated(other, small, gradient_checkpointing="auto")
    assert not [what for what in large.found if "twice" in what]
    assert [what for what in small.found if "of 1e-06 GB, so layers are computed twice" in what]
    mine, theirs = read_folder(one), read_folder(other)
    for name in mine:
        torch.testing.assert_close(mine[name].read(), theirs[name].read(), atol=1e-5, rtol=1e-4)


def test_what_a_pass_keeps_is_counted(originals: Made) -> None:
    """The input of 12 numbers and what ReLU gives, 24, which the next layer needs as well."""
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    assert kept_bytes(net, input=torch.ones(3, 4)) == 4 * (12 + 24)
    model = load(originals(), torch.float32)
    prepare_student(model, target_of(originals()), Calibration(train=("experts",)))
    ids_BT = torch.arange(64).view(1, 64)
    all_of_it = kept_bytes(model, input_ids=ids_BT, use_cache=False)
    compute_twice(model)
    assert kept_bytes(model, input_ids=ids_BT, use_cache=False) < 0.5 * all_of_it


def test_fp16_scales_its_losses_and_resumes_to_the_same_bytes(
    copy: Made, calibrated: Callable[..., CalibrationReport]
) -> None:
    whole, cut, full = copy("whole", **SPLIT), copy("cut", **SPLIT), copy("full", **SPLIT)
    report = calibrated(whole, mixed_precision="fp16")
    assert report.loss_last == pytest.approx(calibrated(full).loss_last, rel=0.02)
    with pytest.raises(RuntimeError, match="killed"):
        calibrated(cut, Stop(3), mixed_precision="fp16")
    assert calibrated(cut, mixed_precision="fp16").resumed_from == 2
    assert tensors(cut) == tensors(whole)


def test_a_step_that_overflows_is_left_out() -> None:
    """The factor halves, is kept in checkpoints, and the next step moves."""

    def stepper() -> tuple[Stepper, torch.nn.Parameter]:
        rows = torch.nn.Parameter(torch.ones(4, 8))
        rates = {"lr": 1e-2, "router_factor": 1}
        section = Calibration.model_validate({"optimizer": rates, "schedule": {"warmup": 0}})
        return Stepper([Trained("r", "experts", rows, rows)], section, 10, scaled=True), rows

    one, rows = stepper()
    one.backward(rows.sum() * 1e36)
    assert not one.step(0).isfinite()
    assert rows.eq(1).all()
    assert float(one.tensors()["scaler/scale"]) == 2.0**15
    other, again = stepper()
    other.restore(one.tensors())
    other.backward(again.sum())
    assert float(other.step(1)) == pytest.approx(32**0.5)
    assert again.lt(1).all()
    assert float(other.tensors()["scaler/scale"]) == 2.0**15


def test_checkpointing_keeps_the_balance_gradient(
    copy: Made, calibrated: Callable[..., CalibrationReport]
) -> None:
    """Counts of the recomputation must not count, and the loss must reach the router."""
    one, other = copy("one"), copy("other")
    settings = {"objective": "aux", "train": "router"}
    calibrated(one, **settings)
    calibrated(other, gradient_checkpointing=True, **settings)
    assert tensors(one) == tensors(other)


def test_bf16_has_fp32_routers_and_masters(
    copy: Made, calibrated: Callable[..., CalibrationReport]
) -> None:
    """Steps too small for bf16 add up in the masters and reach the fp32 file."""
    folder = copy(**NOISY)
    before = read_folder(folder)
    start = {name: ref.read() for name, ref in before.items()}
    report = calibrated(folder, mixed_precision="bf16", optimizer={"lr": 1e-6}, max_steps=3)
    assert report.loss_last > 0
    name = next(n for n in start if ".experts." in n)
    moved = (read_folder(folder)[name].read() - start[name]).abs().max()
    assert 0 < float(moved) < 1e-5


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


HIDDEN: dict[str, Any] = {"objective": "hidden", "train": "router+experts", "max_steps": 4}


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


@pytest.mark.parametrize(
    ("killed_at", "kept"), [(2, None), (4, 2), (5, 4), (7, 6), (8, 6)], ids=str
)
def test_a_killed_layer_wise_run_ends_with_the_same_bytes(
    copy: Made, calibrated: Callable[..., CalibrationReport], killed_at: int, kept: int | None
) -> None:
    """It goes on inside a layer, at the last checkpoint, and both runs report the same."""
    whole, cut = copy("whole", **SPLIT), copy("cut", **SPLIT)
    expected = calibrated(whole, **HIDDEN)
    with pytest.raises(RuntimeError, match="killed"):
        calibrated(cut, Stop(killed_at), **HIDDEN)
    report = calibrated(cut, **HIDDEN)
    assert report == expected.model_copy(update={"resumed_from": kept})
    assert tensors(cut) == tensors(whole)
    log = (cut / "calibration.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["step"] for line in log] == list(range(1, 13))


@pytest.mark.parametrize("stopped_at", [5, 8], ids=["inside a layer", "at its end"])
def test_an_interrupted_layer_loses_no_step(
    copy: Made, calibrated: Callable[..., CalibrationReport], stopped_at: int
) -> None:
    whole, cut = copy("whole", **SPLIT), copy("cut", **SPLIT)
    settings = {**HIDDEN, "save_every": 100}
    calibrated(whole, **settings)
    with pytest.raises(KeyboardInterrupt):
        calibrated(cut, Stop(stopped_at, signal.SIGINT), **settings)
    names = ["layer-00000.safetensors", f"step-{stopped_at:08d}"]
    assert sorted(path.name for path in (cut / WORK).iterdir()) == names
    assert calibrated(cut, **settings).resumed_from == stopped_at
    assert tensors(cut) == tensors(whole)


def test_a_layer_outlives_its_checkpoints(
    copy: Made, calibrated: Callable[..., CalibrationReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run killed after it had kept a layer, and before that layer's checkpoints were gone."""
    whole, cut = copy("whole", **SPLIT), copy("cut", **SPLIT)
    calibrated(whole, **HIDDEN)

    def killed(folder: Path) -> None:
        raise RuntimeError("killed")

    monkeypatch.setattr("moe_convert.training.state.discard_steps", killed)
    with pytest.raises(RuntimeError, match="killed"):
        calibrated(cut, **HIDDEN)
    monkeypatch.undo()
    assert (cut / WORK / "step-00000004").is_dir()
    assert calibrated(cut, **HIDDEN).resumed_from == 4
    assert tensors(cut) == tensors(whole)


def test_layer_wise_training_is_for_routers_and_experts(
    copy: Made, calibrated: Callable[..., CalibrationReport]
) -> None:
    with pytest.raises(UsageError, match="routers and experts, and nothing else"):
        calibrated(copy(**SPLIT), **{**HIDDEN, "train": "norms"})


def test_an_offloaded_teacher_teaches_the_same(
    copy: Made, calibrated: Callable[..., CalibrationReport]
) -> None:
    one, other = copy("one", **SPLIT), copy("other", **SPLIT)
    calibrated(one)
    calibrated(other, teacher="offload")
    assert tensors(one) == tensors(other)


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
