"""A step of calibration: rates, rows, parts of a batch, precision and what it keeps in memory."""

# ruff: noqa: F401, F811 - fixtures of another file

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from moe_convert.calibrate.compiling import _unhooked
from moe_convert.calibrate.memory import compute_twice, kept_bytes
from moe_convert.calibrate.models import (
    load,
    prepare_student,
    share_weights,
    target_of,
)
from moe_convert.calibrate.report import Silent
from moe_convert.calibration import Calibration
from moe_convert.checkpoint import read_folder
from moe_convert.errors import MissingDependencyError
from moe_convert.manifest import CalibrationReport
from moe_convert.training.batches import order
from moe_convert.training.optimizer import Stepper, Trained, rate_at
from moe_convert.training.settings import Schedule
from tests.calibration import NOISY, SPLIT, Made, Stop, calibrated, copy, originals, text
from tests.conftest import Dense
from tests.tools import tensors


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


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled_layers_learn_the_same(
    copy: Made, calibrated: Callable[..., CalibrationReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here they are traced, and run as they were: what a compiler makes of them needs a GPU."""
    monkeypatch.setattr("moe_convert.calibrate.compiling.BACKEND", "aot_eager")
    compile_, found = torch.nn.Module.compile, list[torch.nn.Module]()

    def note(module: torch.nn.Module, **options: Any) -> None:
        found.append(module)
        compile_(module, **options)

    monkeypatch.setattr(torch.nn.Module, "compile", note)
    one, other = copy("one", **NOISY), copy("other", **NOISY)
    objective = {"objective": {"distill": 1.0, "lm": 0.0, "aux": 0.0, "z": 0.0}}
    calibrated(one, **objective)
    assert not found
    calibrated(other, compile=True, **objective)
    names = Counter(type(module).__name__ for module in found)
    assert names == {
        "LlamaDecoderLayer": 3,
        "MixtralAttention": 3,
        "MixtralExperts": 3,
        "MixtralRMSNorm": 6,
    }
    assert not any(module._compiled_call_impl for module in found)
    mine, theirs = read_folder(one), read_folder(other)
    for name in mine:
        torch.testing.assert_close(mine[name].read(), theirs[name].read(), atol=1e-5, rtol=1e-4)


def test_experts_that_may_loop_over_tokens_are_not_compiled() -> None:
    """Nor is a router that is watched; what stands beside them is."""
    names = ("gate", "experts", "norm")
    layer = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2) for name in names})
    layer["gate"].register_forward_hook(lambda *args: None)
    assert list(_unhooked(layer)) == [layer["norm"]]
    layer["experts"].has_gate = True
    assert list(_unhooked(layer)) == [layer["experts"], layer["norm"]]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_compiler_that_fails_is_told(
    copy: Made, calibrated: Callable[..., CalibrationReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(graph: Any, inputs: Any) -> None:
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr("moe_convert.calibrate.compiling.BACKEND", fail)
    reason = r"cannot be compiled here: .*no C\+\+ compiler.*leave --compile out"
    with pytest.raises(MissingDependencyError, match=reason):
        calibrated(copy("out", **NOISY), compile=True)


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


def test_an_offloaded_teacher_teaches_the_same(
    copy: Made, calibrated: Callable[..., CalibrationReport]
) -> None:
    one, other = copy("one", **SPLIT), copy("other", **SPLIT)
    calibrated(one)
    calibrated(other, teacher="offload")
    assert tensors(one) == tensors(other)
