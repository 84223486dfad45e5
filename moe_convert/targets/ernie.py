"""ERNIE 4.5 MoE: softmax scores, a selection bias, ungated shared experts, interleaved rope."""

from __future__ import annotations

from typing import Any

from moe_convert.families.body import Body
from moe_convert.ffn import Weight
from moe_convert.targets.base import (
    TRANSFORMERS,
    Engine,
    MoeShape,
    MoeTarget,
    Trap,
    if_any,
    projections,
)

SELECTION_BIAS = "mlp.moe_statics.e_score_correction_bias"


def _neutral_bias(body: Body, shape: MoeShape, dtype: str) -> dict[str, Weight]:
    bias_1E = Weight.filled((1, shape.num_experts), 0.0, "F32")
    return {SELECTION_BIAS: bias_1E}


def _layers(body: Body, shape: MoeShape) -> dict[str, Any]:
    return {"moe_layer_start_index": len(shape.dense_layers)}


ROWS = (
    MoeTarget(
        "ernie4_5_moe",
        "Ernie4_5_MoeForCausalLM",
        shape_keys={
            "num_experts": "moe_num_experts",
            "top_k": "moe_k",
            "expert_size": "moe_intermediate_size",
            "num_shared": "moe_num_shared_experts",
        },
        shared="units",
        shared_as=if_any(projections("mlp.shared_experts")),
        extras=_neutral_bias,
        selection_bias=SELECTION_BIAS,
        dense_layers="prefix",
        rope="interleaved",
        constants={
            "use_bias": False,
            "moe_layer_end_index": -1,
            "moe_layer_interval": 1,
            "output_router_logits": False,
        },
        computed=_layers,
        engines=(
            TRANSFORMERS,
            Engine("vLLM", True),
            Engine("SGLang", True),
            Engine(
                "llama.cpp",
                True,
                (
                    Trap(
                        "derives the width of the shared expert from other sizes",
                        lambda b, s: s.shared_size > 0,
                        "there is one",
                    ),
                ),
            ),
        ),
    ),
)
