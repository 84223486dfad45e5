"""Mellum: Qwen3-MoE with a window and dense layers wherever wanted, for mixed windows."""

from __future__ import annotations

from typing import Any

from moe_convert.families.body import Body
from moe_convert.targets.base import (
    TRANSFORMERS,
    Engine,
    MoeShape,
    MoeTarget,
    mlp_types,
    same_bias,
    whole_correction,
    window_types,
)


def _mellum(body: Body, shape: MoeShape) -> dict[str, Any]:
    """Write the rope for each kind of layer, as this type wants it."""
    kinds = ("full_attention", "sliding_attention")
    return {
        "rope_parameters": {kind: dict(body.rope) for kind in kinds},
        "layer_types": window_types(body),
        "mlp_layer_types": mlp_types(shape),
    }


ROWS = (
    MoeTarget(
        "mellum",
        "MellumForCausalLM",
        shape_keys={
            "num_experts": "num_experts",
            "top_k": "num_experts_per_tok",
            "expert_size": "moe_intermediate_size",
        },
        dense_layers="any",
        holds={
            "qkv_bias": "attention_bias",
            "o_bias": "attention_bias",
            "sliding_window": "sliding_window",
            "layer_types": "layer_types",
        },
        always={"qk_norm": "head"},
        constants={"norm_topk_prob": True, "output_router_logits": False},
        computed=_mellum,
        limits=(same_bias, whole_correction),
        engines=(
            TRANSFORMERS,
            Engine("vLLM", True),
            Engine("SGLang", True),
            Engine("llama.cpp", True),
        ),
    ),
)
