"""GLM-4-MoE and its likes: sigmoid scores, a selection bias, ungated shared experts, groups."""

from __future__ import annotations

from typing import Any

from moe_convert.families.body import Body
from moe_convert.ffn import Weight
from moe_convert.targets.base import (
    SILU,
    TRANSFORMERS,
    Engine,
    MoeShape,
    MoeTarget,
    Trap,
    mlp_types,
    no_o_bias,
    not_silu,
    projections,
    same_bias,
    window_types,
)

SHAPE_KEYS = {
    "num_experts": "n_routed_experts",
    "top_k": "num_experts_per_tok",
    "expert_size": "moe_intermediate_size",
    "num_shared": "n_shared_experts",
}


SELECTION_BIAS = "mlp.gate.e_score_correction_bias"


def neutral_bias(body: Body, shape: MoeShape, dtype: str) -> dict[str, Weight]:
    """Add the selection bias as zeros; it is kept in fp32 whatever the weights are."""
    return {SELECTION_BIAS: Weight.filled((shape.num_experts,), 0.0, "F32")}


def head_norm_only(body: Body) -> str | None:
    """Refuse query and key norms other than per head."""
    if body.qk_norm in {None, "head"}:
        return None
    return f"it has no place for qk_norm={body.qk_norm!r}"


def _glm4_moe(body: Body, shape: MoeShape) -> dict[str, Any]:
    return {
        "rope_parameters": {**body.rope, "partial_rotary_factor": body.partial_rotary},
        "partial_rotary_factor": body.partial_rotary,
        "use_qk_norm": body.qk_norm == "head",
        "first_k_dense_replace": len(shape.dense_layers),
    }


def _dots1(body: Body, shape: MoeShape) -> dict[str, Any]:
    return {"layer_types": window_types(body), "first_k_dense_replace": len(shape.dense_layers)}


def _hy_v3(body: Body, shape: MoeShape) -> dict[str, Any]:
    """Count the shared expert of zeros that stands in where there is none."""
    return {
        "num_shared_experts": max(shape.num_shared, 1),
        "mlp_layer_types": mlp_types(shape),
    }


def _expert_bias(body: Body, shape: MoeShape, dtype: str) -> dict[str, Weight]:
    return {"mlp.expert_bias": Weight.filled((shape.num_experts,), 0.0, "F32")}


ROWS = (
    MoeTarget(
        "glm4_moe",
        "Glm4MoeForCausalLM",
        shape_keys=SHAPE_KEYS,
        scoring="sigmoid",
        scale_key="routed_scaling_factor",
        shared="units",
        shared_as=projections("mlp.shared_experts"),
        extras=neutral_bias,
        selection_bias=SELECTION_BIAS,
        dense_layers="prefix",
        groups=True,
        holds={
            "qkv_bias": "attention_bias",
            "qk_norm": "use_qk_norm",
            "partial_rotary": "partial_rotary_factor",
        },
        constants={"norm_topk_prob": True, "num_mtp_layers": 0, "output_router_logits": False},
        computed=_glm4_moe,
        limits=(no_o_bias, head_norm_only),
        engines=(
            TRANSFORMERS,
            Engine("vLLM", True, (Trap(SILU, not_silu),)),
            Engine("SGLang", True, (Trap(SILU, not_silu),)),
            Engine(
                "llama.cpp",
                True,
                (
                    Trap(
                        "always adds a shared expert: use --shared-experts 1 or more",
                        lambda b, s: s.shared_size == 0,
                        "there is none",
                    ),
                ),
            ),
        ),
    ),
    MoeTarget(
        "dots1",
        "Dots1ForCausalLM",
        shape_keys=SHAPE_KEYS,
        scoring="sigmoid",
        scale_key="routed_scaling_factor",
        shared="units",
        shared_as=projections("mlp.shared_experts"),
        extras=neutral_bias,
        selection_bias=SELECTION_BIAS,
        dense_layers="prefix",
        groups=True,
        holds={
            "qkv_bias": "attention_bias",
            "o_bias": "attention_bias",
            "sliding_window": "sliding_window",
            "layer_types": "layer_types",
        },
        always={"qk_norm": "head"},
        constants={"norm_topk_prob": True, "output_router_logits": False},
        computed=_dots1,
        limits=(same_bias,),
        engines=(
            TRANSFORMERS,
            Engine("vLLM", False),
            Engine("SGLang", False),
            Engine("llama.cpp", True),
        ),
    ),
    MoeTarget(
        "solar_open",
        "SolarOpenForCausalLM",
        shape_keys=SHAPE_KEYS,
        scoring="sigmoid",
        scale_key="routed_scaling_factor",
        shared="units",
        shared_as=projections("mlp.shared_experts"),
        extras=neutral_bias,
        selection_bias=SELECTION_BIAS,
        groups=True,
        holds={"qkv_bias": "attention_bias"},
        constants={"norm_topk_prob": True, "output_router_logits": False},
        limits=(no_o_bias,),
        engines=(
            TRANSFORMERS,
            Engine("vLLM", False),
            Engine("SGLang", False),
            Engine("llama.cpp", True),
        ),
    ),
    MoeTarget(
        "hy_v3",
        "HYV3ForCausalLM",
        router="mlp.router.gate.weight",
        shape_keys={
            "num_experts": "num_experts",
            "top_k": "num_experts_per_tok",
            "expert_size": "moe_intermediate_size",
        },
        scoring="sigmoid",
        scale_key="router_scaling_factor",
        shared="units",
        shared_required=True,
        shared_as=projections("mlp.shared_mlp"),
        extras=_expert_bias,
        selection_bias="mlp.expert_bias",
        dense_layers="any",
        holds={"qkv_bias": "attention_bias", "o_bias": "attention_bias"},
        always={"qk_norm": "head"},
        constants={
            "mlp_bias": False,
            "enable_moe_fp32_combine": True,
            "output_router_logits": False,
        },
        computed=_hy_v3,
        limits=(same_bias,),
        engines=(
            TRANSFORMERS,
            Engine("vLLM", True),
            Engine("SGLang", True),
            Engine("llama.cpp", True),
        ),
    ),
)
