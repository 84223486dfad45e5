"""Qwen3.5-MoE: Qwen3.5's mixers with a softmax router and a gated shared expert."""

from __future__ import annotations

from typing import Any

from moe_convert.families.body import Body
from moe_convert.targets.base import TRANSFORMERS, Engine, MoeShape, MoeTarget, projections
from moe_convert.targets.qwen import SHAPE_KEYS, neutral_shared_gate


def _top_level_rotary(body: Body, shape: MoeShape) -> dict[str, Any]:
    """Repeat the rotary share outside `rope_parameters`, where older releases look for it."""
    return {"partial_rotary_factor": body.rope["partial_rotary_factor"]}


ROWS = (
    MoeTarget(
        "qwen3_5_moe_text",
        "Qwen3_5MoeForCausalLM",
        shape_keys={**SHAPE_KEYS, "shared_size": "shared_expert_intermediate_size"},
        shared="free",
        shared_as=projections("mlp.shared_expert"),
        shared_weight=0.5,
        extras=neutral_shared_gate,
        always={"native": "qwen3_5"},
        constants={"output_router_logits": False},
        computed=_top_level_rotary,
        engines=(
            TRANSFORMERS,
            Engine("vLLM", True),
            Engine("SGLang", True),
            Engine("llama.cpp", True),
        ),
    ),
)
