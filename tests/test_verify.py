"""Negative controls: whatever is wrong with a written folder, verify finds it and fails."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_convert.checkpoint import open_source
from moe_convert.manifest import VerifyReport, load_manifest
from moe_convert.verify import verify
from moe_convert.workflow import upcycle, verify_folder
from tests.conftest import Dense
from tests.test_cli import invoke
from tests.tools import converted, edit_json, edit_tensors, planned

EXPERT = "model.layers.1.block_sparse_moe.experts.0"
GATE, UP, DOWN = (f"{EXPERT}.{part}.weight" for part in ("w1", "w3", "w2"))
ROUTER = "model.layers.1.block_sparse_moe.gate.weight"
Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """Return a copy of a good result that may be broken."""
    return Path(shutil.copytree(finished, tmp_path / "folder"))


def report_of(folder: Path, source: Path) -> VerifyReport:
    return verify(folder, open_source(str(source)))


def swap_halves(data: dict[str, Any]) -> None:
    """Exchange half of an expert's gate rows, and not the down columns that belong to them."""
    data[GATE] = data[GATE].roll(48, 0)


def swap_experts_halves(data: dict[str, Any]) -> None:
    """Give the expert the first half of its neurons twice."""
    data[GATE], data[UP] = (data[name][:48].repeat(2, 1) for name in (GATE, UP))
    data[DOWN] = data[DOWN][:, :48].repeat(1, 2)


def swap_gate_and_up(data: dict[str, Any]) -> None:
    data[GATE], data[UP] = data[UP], data[GATE]


def spoil(name: str, value: float) -> Change:
    def change(data: dict[str, Any]) -> None:
        data[name].view(-1)[0] = value

    return change


def test_a_good_folder_passes(dense: Dense, folder: Path) -> None:
    report = report_of(folder, dense())
    assert report.passed
    assert report.failures == report.missing_keys == report.unexpected_keys == []
    assert report.tokenizer_identical
    assert report.top1_agreement == 1.0
    assert report.kl is not None
    assert report.kl < 1e-6
    assert report.experts_exercised == 1.0
    assert len(report.router_logit_std) == 3
    assert len(report.generation) == 1


def test_moving_neurons_of_an_expert_consistently_is_fine(dense: Dense, folder: Path) -> None:
    """The control's control: the same shuffle of gate, up and down changes nothing."""

    def change(data: dict[str, Any]) -> None:
        data[GATE], data[UP] = data[GATE].roll(48, 0), data[UP].roll(48, 0)
        data[DOWN] = data[DOWN].roll(48, 1)

    edit_tensors(folder, change)
    assert report_of(folder, dense()).passed


def test_any_router_is_fine_for_clones(dense: Dense, folder: Path) -> None:
    edit_tensors(folder, lambda d: d[ROUTER].mul_(-3))
    assert report_of(folder, dense()).passed


LOGITS: dict[str, Change] = {
    "gate rows swapped": swap_halves,
    "half of the neurons twice": swap_experts_halves,
    "gate and up swapped": swap_gate_and_up,
    "one wrong number": spoil(DOWN, 3.0),
    "an expert of another layer": lambda d: d.update(
        {GATE: d[GATE.replace("layers.1", "layers.2")].clone()}
    ),
    "a norm left out": lambda d: d["model.layers.2.post_attention_layernorm.weight"].fill_(1.0),
    "an expert of zeros": lambda d: d[DOWN].zero_(),
}


@pytest.mark.parametrize("damage", list(LOGITS))
def test_wrong_values_show_in_the_logits(dense: Dense, folder: Path, damage: str) -> None:
    edit_tensors(folder, LOGITS[damage])
    report = report_of(folder, dense())
    assert not report.passed
    assert "logits differ" in " ".join(report.failures)
    assert report.max_abs_diff is not None
    assert report.max_abs_diff > 1e-3


def test_a_dropped_bias_shows(dense: Dense, tmp_path: Path) -> None:
    source, output = dense("qwen2"), tmp_path / "out"
    converted(source, output)
    assert report_of(output, source).passed
    edit_tensors(output, lambda d: d["model.layers.0.self_attn.v_proj.bias"].zero_())
    assert not report_of(output, source).passed


FILES: dict[str, tuple[Change, str]] = {
    "missing": (lambda d: d.pop(UP), f"1 missing tensors, first {UP}"),
    "extra": (lambda d: d.update(ghost=d[UP].clone()), "1 unexpected tensors, first ghost"),
    "nan": (spoil(UP, float("nan")), f"{UP} holds NaN"),
    "infinity in a router": (spoil(ROUTER, float("inf")), f"{ROUTER} holds NaN or infinity"),
    "dtype": (lambda d: d.update({UP: d[UP].bfloat16()}), f"{UP} is BF16.*float32|F32"),
    "shape": (lambda d: d.update({UP: d[UP][:90]}), f"{UP} has shape"),
}


@pytest.mark.parametrize("damage", list(FILES))
def test_wrong_files_are_found_before_anything_runs(
    dense: Dense, folder: Path, damage: str
) -> None:
    change, sentence = FILES[damage]
    edit_tensors(folder, change)
    report = report_of(folder, dense())
    assert not report.passed
    with pytest.raises(AssertionError, match=sentence):
        raise AssertionError("; ".join(report.failures))
    assert report.parity == []


NORM = "model.layers.0.input_layernorm.weight"


def test_only_what_the_source_holds_in_float32_may_be_so(dense: Dense, tmp_path: Path) -> None:
    source = Path(shutil.copytree(dense(dtype="bfloat16"), tmp_path / "dense-model"))
    edit_tensors(source, lambda d: d.update({NORM: d[NORM].float()}))
    manifest = upcycle(planned(source, tmp_path / "out"))
    assert manifest.state == "verified"
    assert manifest.target.float32 == [NORM]
    assert verify(tmp_path / "out", None, wide=[NORM]).passed
    assert verify(tmp_path / "out", None).failures == [f"{NORM} is F32, and config.json says BF16"]
    edit_tensors(tmp_path / "out", lambda d: d.update({UP: d[UP].float()}))
    report, _ = verify_folder(tmp_path / "out", str(source))
    assert report.failures == [f"{UP} is F32, and config.json says BF16"]


def test_a_selection_bias_may_be_float32(dense: Dense, tmp_path: Path) -> None:
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    converted(dense(dtype="bfloat16"), tmp_path / "out", target__architecture="glm4_moe")
    edit_tensors(tmp_path / "out", lambda d: d.update({bias: d[bias].float()}))
    assert verify(tmp_path / "out", None).passed


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_changed_or_lost_tokenizer_fails(dense: Dense, folder: Path, name: str) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes() + b" ")
    report = report_of(folder, dense())
    assert not report.passed
    assert report.tokenizer_identical is False
    assert any(name in failure for failure in report.failures)
    path.unlink()
    assert not report_of(folder, dense()).passed


def test_a_wrong_config_value_shows(dense: Dense, folder: Path) -> None:
    edit_json(folder / "config.json", lambda c: c.update(rope_theta=3.0, rope_parameters=None))
    assert not report_of(folder, dense()).passed


def test_without_a_source_the_files_are_still_checked(folder: Path) -> None:
    report = verify(folder, None)
    assert report.passed
    assert report.parity == []
    edit_tensors(folder, spoil(UP, float("nan")))
    assert not verify(folder, None).passed


def test_a_result_that_need_not_be_exact_is_only_measured(dense: Dense, folder: Path) -> None:
    edit_tensors(folder, LOGITS["an expert of zeros"])
    report = verify(folder, open_source(str(dense())), parity=False)
    assert report.passed
    assert report.max_abs_diff is not None
    assert report.max_abs_diff > 1e-3


def test_the_tolerance_is_what_decides(dense: Dense, folder: Path) -> None:
    edit_tensors(folder, LOGITS["an expert of zeros"])
    assert verify(folder, open_source(str(dense())), tolerance=1e9).max_abs_diff is not None
    assert not verify(folder, open_source(str(dense())), tolerance=1e-4).passed


def test_failing_through_the_command_marks_and_keeps_the_folder(dense: Dense, folder: Path) -> None:
    assert load_manifest(folder).state == "verified"
    edit_tensors(folder, swap_halves)
    result = invoke("verify", folder, "--source", dense())
    assert result.exit_code == 5
    assert "FAILED" in result.stdout
    assert "Verification of" in result.stderr
    assert load_manifest(folder).state == "failed"
    assert (folder / "model.safetensors").exists()
    assert invoke("verify", folder, "--source", dense(), "-q").stdout == "fail\n"
    edit_tensors(folder, swap_halves)
    assert invoke("verify", folder, "--source", dense()).exit_code == 0
    assert load_manifest(folder).state == "verified"


def test_upcycle_itself_fails_on_a_wrong_result(dense: Dense, tmp_path: Path) -> None:
    """A source with NaN converts, is named, and does not pass."""
    source, output = Path(shutil.copytree(dense(), tmp_path / "source")), tmp_path / "out"
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(source, spoil(name, float("nan")))
    result = invoke("upcycle", source, "-o", output, "-e", "4", "--no-measure")
    assert result.exit_code == 5
    assert f"tensor {name} holds NaN" in " ".join(result.stderr.split())
    assert load_manifest(output).state == "failed"
