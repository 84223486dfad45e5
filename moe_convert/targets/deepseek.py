"""DeepSeek-V3: latent attention with GLM-4-MoE's experts."""

from __future__ import annotations

from typing import Any

from moe_convert.families.body import Body
from moe_convert.targets.base import TRANSFORMERS, Engine, MoeShape, MoeTarget, projections
from moe_convert.targets.glm import SELECTION_BIAS, SHAPE_KEYS, neutral_bias


def _dense_prefix(body: Body, shape: MoeShape) -> dict[str, Any]:
    return {"first_k_dense_replace": len(shape.dense_layers)}


ROWS = (
    MoeTarget(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        shape_keys=SHAPE_KEYS,
        scoring="sigmoid",
        scale_key="routed_scaling_factor",
        shared="units",
        shared_as=projections("mlp.shared_experts"),
        extras=neutral_bias,
        selection_bias=SELECTION_BIAS,
        dense_layers="prefix",
        groups=True,
        always={"native": "mla"},
        constants={
            "norm_topk_prob": True,
            "num_nextn_predict_layers": 0,
            "output_router_logits": False,
        },
        computed=_dense_prefix,
        engines=(
            TRANSFORMERS,
            Engine("vLLM", True),
            Engine("SGLang", True),
            Engine("llama.cpp", True),
        ),
    ),
)
