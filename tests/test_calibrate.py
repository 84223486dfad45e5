"""Calibration on tiny checkpoints: what is trained, what it is worth, and what stays."""

# ruff: noqa: F401, F811 - fixtures of another file

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_convert.calibrate.dense_experts import widen_experts
from moe_convert.calibrate.models import (
    load,
    modules_of,
    prepare_student,
    target_of,
)
from moe_convert.calibrate.step import Models
from moe_convert.calibrate.watch import Watch
from moe_convert.calibrate.write_back import named_tensors, stored_tensors
from moe_convert.calibration import MOVING, Calibration, patterns
from moe_convert.checkpoint import read_folder
from moe_convert.manifest import CalibrationReport, load_manifest
from moe_convert.targets import TARGETS
from moe_convert.training.optimizer import Stepper
from tests.calibration import NOISY, SPLIT, Made, calibrated, changed, copy, originals, text
from tests.conftest import Dense
from tests.tiny import pairs
from tests.tools import converted, digest, tensors
from tests.tools import load as load_strictly


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
    assert report.trained == ["experts"]
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
    refs, model, row = read_folder(folder), load(folder, torch.float32), target_of(folder)
    watch = Watch(model, row, top_k=2)
    with torch.no_grad(), watch.recording():
        model(input_ids=torch.arange(24).view(2, 12), use_cache=False)
    assert (watch.num_layers, watch.num_experts) == (3, 4)
    assert watch.counts().sum(dim=1).tolist() == [48.0] * 3
    assert all(logits.shape == (24, 4) for logits in watch.logits)
    for part in ("router", "experts", "norms", "all"):
        rates = {"lr": 1e-3, "router_factor": 1}
        section = Calibration.model_validate({"train": part, "optimizer": rates})
        trained = prepare_student(model, row, section)
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


@pytest.mark.parametrize("made", [SPLIT, NOISY], ids=["split", "clone"])
def test_a_wide_ffn_tells_a_straight_through_router_what_the_experts_do(
    originals: Made, made: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gradients(wide: bool) -> list[torch.Tensor]:
        model, row = load(originals(**made), torch.float32), target_of(originals(**made))
        trained = prepare_student(model, row, Calibration(train=("router", "experts")))
        monkeypatch.setitem(MOVING, "cpu", 10_000)
        assert not wide or widen_experts(model, 2, "cpu")
        watch = Watch(model, row, top_k=2, dense_router=True, wide=wide)
        ids_BT = torch.arange(32).view(2, 16)
        with torch.no_grad(), watch.permuted(32, torch.Generator().manual_seed(0)):
            model(input_ids=ids_BT)
        model(input_ids=ids_BT, labels=ids_BT).loss.backward()
        return [one.parameter.grad for one in trained]

    experts = gradients(wide=False)
    assert max(float(grad.abs().max()) for grad in experts) > 1e-4
    for found, expected in zip(gradients(wide=True), experts, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-4)


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
