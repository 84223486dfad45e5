"""Invariant 3: the plan announces what is written, to the byte, and reads no tensor for it."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

from moe_convert.checkpoint import read_folder
from moe_convert.errors import DoesNotFitError, UsageError
from moe_convert.plan import Plan, check_fits
from moe_convert.targets import TARGETS
from moe_convert.workflow import upcycle
from tests.conftest import Dense
from tests.tiny import pairs
from tests.tools import converted, hollow, planned

HEADER_ALLOWANCE_BYTES = 5_000_000
V, D, F, L, E, K = 272, 64, 96, 3, 4, 2
ATTENTION = 2 * D * 64 + 2 * D * 32
FFN = 3 * D * F
AROUND = 2 * V * D + D
LAYER = ATTENTION + 2 * D


def announced(plan: Plan) -> dict[str, tuple[tuple[int, ...], str]]:
    return {spec.name: (spec.shape, spec.dtype) for spec in plan.specs}


def codes(plan: Plan) -> set[str]:
    return {note.code for note in plan.warnings}


@pytest.mark.parametrize(("model_type", "variant", "target"), pairs())
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_plan_is_the_result(
    dense: Dense, tmp_path: Path, model_type: str, variant: str, target: str, dtype: str
) -> None:
    shared = 0 if TARGETS[target].shared == "none" else 1
    changes = {
        "target__architecture": target,
        "target__shared_experts": shared,
        "router__measure": False,
        "output__max_shard_size": "300KB",
    }
    source = dense(model_type, variant, dtype=dtype)
    plan = planned(source, tmp_path / "out", **changes)
    manifest = converted(source, tmp_path / "out", **changes)
    written = read_folder(tmp_path / "out")
    assert announced(plan) == {name: (ref.shape, ref.dtype) for name, ref in written.items()}
    assert {shard.file: shard.num_bytes for shard in plan.shards} == {
        path.name: path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")
    }
    assert manifest.target.params_total == plan.params_total
    assert plan.params_total == sum(ref.weight().num_params for ref in written.values())


def test_a_plan_needs_no_data(dense: Dense, tmp_path: Path) -> None:
    """The same headers over a hole give the same plan."""
    empty = Path(shutil.copytree(dense(), tmp_path / "dense-model"))
    path = empty / "model.safetensors"
    size = path.stat().st_size
    with path.open("r+b") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        file.truncate(8 + length)
        file.truncate(size)
    full, hole = planned(dense()), planned(empty)
    assert (hole.steps, hole.shards, hole.config) == (full.steps, full.shards, full.config)
    assert (hole.params_total, hole.params_active) == (full.params_total, full.params_active)


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="needs /proc to count reads")
def test_a_plan_reads_headers_only(dense: Dense, tmp_path: Path) -> None:
    def read_bytes() -> int:
        lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
        return int(dict(line.split(": ") for line in lines)["rchar"])

    planned(dense())
    large = hollow(tmp_path / "large", num_layers=4, hidden_size=2048, intermediate_size=8192)
    assert (large / "model.safetensors").stat().st_size > 500_000_000
    before = read_bytes()
    planned(large)
    assert read_bytes() - before < HEADER_ALLOWANCE_BYTES


def test_total_and_active_parameters_by_hand(dense: Dense) -> None:
    plan = planned(dense())
    assert plan.params_dense == AROUND + L * (LAYER + FFN)
    assert plan.params_total == AROUND + L * (LAYER + E * D + E * FFN)
    assert plan.params_active == AROUND + L * (LAYER + E * D + K * FFN)


def test_parameters_with_dense_layers(dense: Dense) -> None:
    plan = planned(
        dense(), target__architecture="qwen2_moe", target__layers="1", output__compat=False
    )
    gate = D
    assert plan.params_total == AROUND + L * LAYER + 2 * FFN + E * D + E * FFN + gate
    assert plan.params_active == AROUND + L * LAYER + 2 * FFN + E * D + K * FFN + gate


def test_parameters_with_shared_experts(dense: Dense) -> None:
    plan = planned(dense(), target__architecture="glm4_moe", target__shared_experts=1)
    assert plan.params_total == AROUND + L * (LAYER + E * D + E + (E + 1) * FFN)
    assert plan.params_active == AROUND + L * (LAYER + E * D + E + (K + 1) * FFN)


def test_a_tied_embedding_counts_once_unless_it_is_written_twice(dense: Dense) -> None:
    tied = planned(dense("llama", "tied"), output__compat=False)
    untied = planned(dense("llama", "tied"))
    assert tied.params_dense == tied.params_total - L * (E * D + (E - 1) * FFN)
    assert untied.params_total - tied.params_total == V * D


def test_the_estimate(dense: Dense, tmp_path: Path) -> None:
    estimate = planned(dense(), tmp_path / "a" / "b" / "out").estimate
    assert estimate.download_bytes == 0
    assert estimate.disk_bytes == sum(s.num_bytes for s in planned(dense()).shards)
    assert 0 <= estimate.time_s[0] <= estimate.time_s[1]
    assert estimate.fits
    assert estimate.verify_fits
    assert estimate.verify_ram_bytes >= 4 * planned(dense()).params_total
    disk = shutil.disk_usage(tmp_path)
    assert abs(estimate.free_disk_bytes - disk.free) < 0.2 * disk.total
    check_fits(planned(dense()), force=False)


def test_the_estimate_counts_start_up_data_and_the_check(dense: Dense, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("word " * 20_000, encoding="utf-8")
    weights_only: dict[str, Any] = {"router__measure": False, "verify__enabled": False}
    copied = planned(dense(), **weights_only).estimate.time_s
    checked = planned(dense(), router__measure=False).estimate.time_s
    assert copied == (1.0, 3.0)
    assert (checked[0], checked[1]) >= (4.0, 12.0)
    few, many = (
        planned(dense(), data__train=str(text), data__max_tokens=tokens).estimate.time_s
        for tokens in (1_000, 1_001_000)
    )
    params = planned(dense()).params_dense
    assert many[1] - few[1] == pytest.approx(2 * params * 1_000_000 / 2e10, abs=0.2)
    assert many[1] - few[1] > 1


def test_what_does_not_fit_is_announced_and_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8192, "intermediate_size": 28672}
    large = hollow(tmp_path / "large", num_layers=16, **sizes)
    plan = planned(large, tmp_path / "out", target__num_experts=256)
    assert not plan.estimate.fits
    assert {"does_not_fit", "verify_skipped"} <= codes(plan)
    with pytest.raises(DoesNotFitError, match="of disk"):
        upcycle(plan)
    check_fits(plan, force=True)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_warnings(dense: Dense) -> None:
    plain = codes(planned(dense()))
    assert not plain & {"top1_renormalized", "zero_router", "cast", "does_not_fit"}
    assert "top1_renormalized" in codes(planned(dense(), target__top_k=1))
    assert "zero_router" in codes(planned(dense(), router__init="zeros"))
    assert "cast" in codes(planned(dense(), target__dtype="fp16"))
    assert "cast" not in codes(planned(dense(), target__dtype="fp32"))


def test_engines_tell_their_traps(dense: Dense) -> None:
    assert planned(dense()).engines["transformers"] == ()
    wide = planned(dense("llama", "wide_heads")).engines
    assert any("head size" in trap for trap in wide["SGLang"])
    windows = planned(dense("mistral", "window")).engines
    assert any("window" in trap for trap in windows["llama.cpp"])
    assert not any("window" in t for t in planned(dense("mistral", "full")).engines["llama.cpp"])
    gelu = planned(dense("llama", "plain", hidden_act="gelu")).engines
    assert any("SiLU" in trap for trap in gelu["vLLM"])


def test_the_default_output_is_named_after_the_source(
    dense: Dense, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert str(planned(dense()).output) == "dense-model-moe-4x-k2"
    assert str(planned(dense(), target__top_k=3).output) == "dense-model-moe-4x-k3"


@pytest.mark.parametrize(
    ("dtype", "width", "fits"),
    [
        ("float32", 100, True),
        ("float32", 98, False),
        ("bfloat16", 104, True),
        ("bfloat16", 100, False),
    ],
)
def test_widths_that_grouped_products_need(
    dense: Dense, tmp_path: Path, dtype: str, width: int, fits: bool
) -> None:
    source = dense(dtype=dtype, intermediate_size=width)
    if fits:
        assert upcycle(planned(source, tmp_path / "out")).state == "verified"
    else:
        with pytest.raises(UsageError, match=f"{width} is not a multiple"):
            planned(source)
