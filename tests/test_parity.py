"""Invariant 1: what `AutoModelForCausalLM` loads from the written folder is the dense function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moe_convert.errors import UnsupportedError, UsageError
from moe_convert.families import FAMILIES
from moe_convert.plan import plan_source
from moe_convert.targets import TARGETS
from moe_convert.workflow import upcycle
from tests.conftest import Dense
from tests.tiny import NUM_LAYERS, TINY, cases, pairs
from tests.tools import converted, difference, load, logits, planned

FP32_TOLERANCE = 1e-4
WITH_SHARED = [case for case in pairs() if TARGETS[case[2]].shared != "none"]
WITHOUT_SHARED = [case for case in pairs() if TARGETS[case[2]].shared == "none"]
PLACES = {"prefix": "1:", "any": "::2"}
WITH_DENSE = [
    (*case, layers)
    for case in pairs()
    for kind, layers in PLACES.items()
    if TARGETS[case[2]].dense_layers in {kind, "any"}
]
WITHOUT_DENSE = [
    (*case, layers)
    for case in pairs()
    for kind, layers in PLACES.items()
    if TARGETS[case[2]].dense_layers not in {kind, "any"}
]


def test_every_row_has_a_tiny_checkpoint() -> None:
    assert set(TINY) == set(FAMILIES)
    assert {(m, t) for m, _, t in pairs()} == {
        (m, t) for m in FAMILIES for t in FAMILIES[m].targets
    }
    assert {target for _, _, target in pairs()} == set(TARGETS)


@pytest.mark.parametrize(("model_type", "variant", "target"), cases())
def test_clones_compute_the_dense_function(
    dense: Dense, tmp_path: Path, model_type: str, variant: str, target: str
) -> None:
    source = dense(model_type, variant)
    converted(source, tmp_path / "out", target__architecture=target)
    assert difference(logits(tmp_path / "out"), logits(source)) <= FP32_TOLERANCE


@pytest.mark.parametrize(("model_type", "variant", "target"), pairs())
def test_splits_compute_it_when_every_expert_is_chosen(
    dense: Dense, tmp_path: Path, model_type: str, variant: str, target: str
) -> None:
    source, fixed = dense(model_type, variant), TARGETS[target].fixed_top_k
    changes: dict[str, Any] = {"target__top_k": 4, "router__init": "zeros"}
    if fixed is not None:
        changes = {"target__top_k": fixed, "target__num_experts": fixed}
    changes |= {"experts__method": "split", "experts__strategy": "contiguous"}
    output = tmp_path / "out"
    manifest = converted(source, output, target__architecture=target, **changes)
    assert manifest.exact
    assert difference(logits(output), logits(source)) <= FP32_TOLERANCE


@pytest.mark.parametrize(("model_type", "variant", "target"), cases(refused=True))
def test_a_body_without_a_place_is_refused(
    dense: Dense, model_type: str, variant: str, target: str
) -> None:
    with pytest.raises(UnsupportedError, match=rf"{target}: it "):
        planned(dense(model_type, variant), target__architecture=target)


@pytest.mark.parametrize(("model_type", "variant"), [(m, v) for m in TINY for v in TINY[m]])
def test_auto_takes_the_first_target_that_fits(dense: Dense, model_type: str, variant: str) -> None:
    refused = TINY[model_type][variant].refused_by
    fitting = [target for target in FAMILIES[model_type].targets if target not in refused]
    plan = planned(dense(model_type, variant))
    assert plan.target.model_type == fitting[0]
    assert sorted(plan.refused) == sorted(refused)


@pytest.mark.parametrize(("model_type", "variant", "target"), WITH_SHARED)
def test_shared_experts_keep_the_function(
    dense: Dense, tmp_path: Path, model_type: str, variant: str, target: str
) -> None:
    source = dense(model_type, variant)
    for shared in (1,) if TARGETS[target].shared == "one" else (1, 2):
        output = tmp_path / str(shared)
        manifest = converted(
            source, output, target__architecture=target, target__shared_experts=shared
        )
        assert manifest.target.shared_experts == shared
        assert difference(logits(output), logits(source)) <= FP32_TOLERANCE


@pytest.mark.parametrize(("model_type", "variant", "target"), WITHOUT_SHARED)
def test_a_target_without_shared_experts_says_so(
    dense: Dense, model_type: str, variant: str, target: str
) -> None:
    with pytest.raises(UsageError, match=rf"{target} has no shared experts"):
        planned(dense(model_type, variant), target__architecture=target, target__shared_experts=1)


@pytest.mark.parametrize(("model_type", "variant", "target", "layers"), WITH_DENSE)
def test_some_layers_may_stay_dense(
    dense: Dense, tmp_path: Path, model_type: str, variant: str, target: str, layers: str
) -> None:
    source, output = dense(model_type, variant), tmp_path / "out"
    manifest = converted(source, output, target__architecture=target, target__layers=layers)
    start, _, step = layers.partition(":")
    assert manifest.target.moe_layers == list(
        range(int(start or 0), NUM_LAYERS, int(step.strip(":") or 1))
    )
    assert difference(logits(output), logits(source)) <= FP32_TOLERANCE


@pytest.mark.parametrize(("model_type", "variant", "target", "layers"), WITHOUT_DENSE)
def test_a_target_that_cannot_keep_layers_dense_says_so(
    dense: Dense, model_type: str, variant: str, target: str, layers: str
) -> None:
    with pytest.raises(UsageError, match=rf"{target} cannot keep layers .* dense"):
        planned(dense(model_type, variant), target__architecture=target, target__layers=layers)


@pytest.mark.parametrize(("model_type", "variant", "target"), pairs())
def test_bf16_reports_parity_for_both_dtypes(
    dense: Dense, tmp_path: Path, model_type: str, variant: str, target: str
) -> None:
    source = dense(model_type, variant, dtype="bfloat16")
    plan = planned(source, tmp_path / "out", target__architecture=target)
    manifest = upcycle(plan)
    assert manifest.state == "verified"
    assert manifest.verify is not None
    if plan.dtype == "F32":
        assert "widened" in {note.code for note in manifest.warnings}
        assert manifest.verify.parity[0].max_abs_diff <= FP32_TOLERANCE
        return
    fp32, bf16 = manifest.verify.parity
    assert (fp32.dtype, bf16.dtype) == ("float32", "bfloat16")
    assert fp32.max_abs_diff <= FP32_TOLERANCE
    assert fp32.top1_agreement == 1.0
    if TARGETS[target].fixed_top_k is None:
        assert bf16.max_abs_diff < 0.2
    assert bf16.top1_agreement > 0.9


def test_a_cast_is_held_against_the_rounded_model(dense: Dense, tmp_path: Path) -> None:
    manifest = upcycle(planned(dense(), tmp_path / "out", target__dtype="bf16"))
    assert manifest.state == "verified"
    assert "cast" in {note.code for note in manifest.warnings}
    assert load(tmp_path / "out", "bfloat16").dtype is not None


def test_one_expert_per_token_and_all_of_them(dense: Dense, tmp_path: Path) -> None:
    for top_k in (1, 4):
        output = tmp_path / str(top_k)
        converted(dense(), output, target__top_k=top_k)
        assert difference(logits(output), logits(dense())) <= FP32_TOLERANCE


def test_an_opened_source_gives_the_same_plan(dense: Dense) -> None:
    plan = planned(dense())
    assert plan_source(plan.recipe, plan.source).specs == plan.specs
