"""LFM2-MoE: LFM2's mixers with sigmoid scores and a selection bias."""

from __future__ import annotations

from typing import Any

from moe_convert.families.body import Body
from moe_convert.ffn import Weight
from moe_convert.targets.base import (
    TRANSFORMERS,
    Engine,
    MoeShape,
    MoeTarget,
    per_expert,
    projections,
)
from moe_convert.targets.qwen import SHAPE_KEYS


def _neutral_bias(body: Body, shape: MoeShape, dtype: str) -> dict[str, Weight]:
    """Add the selection bias as zeros; it is kept in fp32 whatever the weights are."""
    return {"feed_forward.expert_bias": Weight.filled((shape.num_experts,), 0.0, "F32")}


def _dense_prefix(body: Body, shape: MoeShape) -> dict[str, Any]:
    return {"num_dense_layers": len(shape.dense_layers)}


ROWS = (
    MoeTarget(
        "lfm2_moe",
        "Lfm2MoeForCausalLM",
        shape_keys=SHAPE_KEYS,
        router="feed_forward.gate.weight",
        router_module="feed_forward.gate",
        routed=per_expert(
            "feed_forward.experts.{expert}.w1.weight",
            "feed_forward.experts.{expert}.w3.weight",
            "feed_forward.experts.{expert}.w2.weight",
        ),
        dense_as=projections("feed_forward", "w1", "w3", "w2"),
        scoring="sigmoid",
        scale_key="routed_scaling_factor",
        extras=_neutral_bias,
        dense_layers="prefix",
        always={"native": "lfm2"},
        sizes={"norm_eps": "norm_eps"},
        constants={"norm_topk_prob": True, "use_expert_bias": True, "output_router_logits": False},
        computed=_dense_prefix,
        engines=(
            TRANSFORMERS,
            Engine("vLLM", True),
            Engine("SGLang", True),
            Engine("llama.cpp", True),
        ),
    ),
)
