"""Limits of Ministral, Cohere, GLM, ERNIE, Hunyuan, StableLM and of the targets they bring."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moe_convert.errors import UnsupportedError, UsageError
from tests.conftest import Dense
from tests.tiny_others import MINISTRAL3_ROPE, OTHERS, ROTARY_THIRD
from tests.tools import converted, difference, logits, planned

GROWING = {**MINISTRAL3_ROPE, "original_max_position_embeddings": 64}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("ministral3", {"rope_parameters": GROWING}, "exact only up to 64 tokens"),
    ("cwm", {"mlp_bias": True}, "mlp_bias=True"),
    ("seed_oss", {"attention_out_bias": True}, "no bias on o_proj"),
    ("seed_oss", {"mlp_bias": True}, "mlp_bias=True"),
    ("cohere", {"use_qk_norm": True}, "use_qk_norm=True"),
    ("ernie4_5", {"use_bias": True}, "mlp_bias=True"),
    ("helium", {"mlp_bias": True}, "mlp_bias=True"),
    ("stablelm", {"qk_layernorm": True}, "qk_layernorm=True"),
    ("stablelm", {"use_parallel_residual": True}, "use_parallel_residual=True"),
    (
        "stablelm",
        {"rope_parameters": {**ROTARY_THIRD, "rope_type": "linear", "factor": 2.0}},
        "rope_type='linear'",
    ),
    ("nemotron", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ("nemotron", {"mlp_bias": True}, "mlp_bias=True"),
]


@pytest.mark.parametrize(("model_type", "changes", "reason"), REFUSED)
def test_a_value_without_a_place_is_refused_by_name(
    dense: Dense, model_type: str, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UnsupportedError) as caught:
        planned(dense(model_type, next(iter(OTHERS[model_type])), **changes))
    assert reason in caught.value.message


def test_ministral3_is_exact_up_to_its_original_length(dense: Dense, tmp_path: Path) -> None:
    source = dense("ministral3", "short", rope_parameters=GROWING)
    converted(source, tmp_path / "out", target__max_positions=64)
    assert difference(logits(tmp_path / "out"), logits(source)) <= 1e-4


@pytest.mark.parametrize("top_k", [1, 4])
def test_phimoe_has_two_experts_per_token(dense: Dense, top_k: int) -> None:
    with pytest.raises(UsageError, match=rf"phimoe always uses 2 experts.*got --top-k {top_k}"):
        planned(dense("stablelm", "bias"), target__top_k=top_k)


def test_phimoe_cannot_start_from_a_zero_router(dense: Dense) -> None:
    with pytest.raises(UsageError, match="logits tie"):
        planned(dense("stablelm", "bias"), router__init="zeros")


def test_hunyuan_has_one_shared_expert(dense: Dense) -> None:
    with pytest.raises(UsageError, match="one shared expert, got --shared-experts 2"):
        planned(dense("hunyuan_v1_dense", "plain"), target__shared_experts=2)
