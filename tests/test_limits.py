"""What a family can say and no stock architecture can hold is refused by name, not approximated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moe_convert.errors import UnsupportedError, UsageError
from tests.conftest import Dense
from tests.tools import converted, difference, logits, planned

YARN_AND_PLAIN = {
    "full_attention": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 256,
    },
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
LAYERS = ["full_attention", "sliding_attention", "full_attention"]
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
    ("phi3", {"lm_head_bias": True}, "lm_head_bias=True"),
    ("granite", {"mlp_bias": True}, "mlp_bias=True"),
    ("granite_swa", {"mlp_bias": True}, "mlp_bias=True"),
    ("hyperclovax", {"use_post_norm": True}, "use_post_norm=True"),
    ("granitemoehybrid", {"num_local_experts": 4, "num_experts_per_tok": 2}, "num_local_experts=4"),
    ("smollm3", {"mlp_bias": True}, "mlp_bias=True"),
    ("arcee", {"mlp_bias": True}, "mlp_bias=True"),
    ("arcee", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ("internlm3", {"attention_bias": True, "mlp_bias": True}, "mlp_bias=True"),
    ("iquestcoder", {"mlp_bias": True}, "mlp_bias=True"),
    ("olmo", {"attention_bias": True}, "qkv_bias=True"),
    ("olmo3", {"sliding_window": 64}, "exact only up to 64 tokens"),
    ("olmo3", {"layer_types": LAYERS, "rope_parameters": YARN_AND_PLAIN}, "local_rope="),
]


@pytest.mark.parametrize(("model_type", "changes", "reason"), REFUSED)
def test_a_value_without_a_place_is_refused_by_name(
    dense: Dense, model_type: str, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UnsupportedError) as caught:
        planned(dense(model_type, "plain", **changes))
    assert reason in caught.value.message


def test_a_window_may_be_left_out_up_to_its_length(dense: Dense, tmp_path: Path) -> None:
    source = dense("olmo3", "plain", sliding_window=64)
    converted(source, tmp_path / "out", target__max_positions=64)
    assert difference(logits(tmp_path / "out"), logits(source)) <= 1e-4


def test_longrope_keeps_its_scale_when_the_context_is_cut(dense: Dense, tmp_path: Path) -> None:
    source = dense("phi3", "longrope")
    converted(source, tmp_path / "out", target__max_positions=64)
    assert difference(logits(tmp_path / "out"), logits(source)) <= 1e-4


@pytest.mark.parametrize(("model_type", "variant"), [("gemma", "plain"), ("gemma", "narrow")])
def test_values_that_bf16_would_round_are_not_stored_in_it(
    dense: Dense, model_type: str, variant: str
) -> None:
    source = dense(model_type, variant, dtype="bfloat16")
    assert planned(source).dtype == "F32"
    with pytest.raises(UsageError, match=r"layernorm.*--dtype fp32"):
        planned(source, target__dtype="bf16")
