"""Gemma 4 with its MoE block: a dense branch and a routed one, each with norms, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_convert.families.body import Body
from moe_convert.ffn import Weight
from moe_convert.targets.base import TRANSFORMERS, Engine, MoeShape, MoeTarget, stacked
from moe_convert.transforms import root_scaled, transparent_norm

BRANCH_SIZE = 64
"""Neurons of the dense branch, which must exist: all zero, and divisible for tensor parallelism."""
DAMPING = 2.0**-12


def _router_norm(weight: Weight, body: Body) -> Mapping[str, Weight]:
    """Give both branches the norm before the FFN, and the router the same input as the experts.

    The router has a plain RMSNorm, a scale per channel and a factor hidden size ** -0.5.
    """
    return {
        "pre_feedforward_layernorm.weight": weight,
        "pre_feedforward_layernorm_2.weight": weight,
        "router.scale": root_scaled(weight),
    }


def _transparent_norm(body: Body, shape: MoeShape, dtype: str) -> dict[str, Weight]:
    """Add the zero branch, and make the norm behind the experts one that the next one undoes."""
    hidden, wide = body.hidden_size, (BRANCH_SIZE, body.hidden_size)
    ones = Weight.filled((hidden,), 1.0, dtype)
    return {
        "mlp.gate_proj.weight": Weight.filled(wide, 0.0, dtype),
        "mlp.up_proj.weight": Weight.filled(wide, 0.0, dtype),
        "mlp.down_proj.weight": Weight.filled((hidden, BRANCH_SIZE), 0.0, dtype),
        "post_feedforward_layernorm_1.weight": ones,
        "post_feedforward_layernorm_2.weight": Weight.filled(
            (hidden,), transparent_norm(body.norm_eps, DAMPING), dtype
        ),
        "router.per_expert_scale": Weight.filled((shape.num_experts,), DAMPING, dtype),
    }


def _moe_block(body: Body, shape: MoeShape) -> dict[str, Any]:
    return {"enable_moe_block": True, "intermediate_size": BRANCH_SIZE}


ROWS = (
    MoeTarget(
        "gemma4_text",
        "Gemma4ForCausalLM",
        shape_keys={
            "num_experts": "num_experts",
            "top_k": "top_k_experts",
            "expert_size": "moe_intermediate_size",
        },
        router="router.proj.weight",
        router_module="router",
        router_gives="shares",
        routed=stacked("experts.gate_up_proj", "experts.down_proj"),
        always={"native": "gemma4"},
        sizes={"act": "hidden_activation"},
        constants={"use_double_wide_mlp": False},
        computed=_moe_block,
        places={"pre_feedforward_layernorm.weight": _router_norm},
        extras=_transparent_norm,
        engines=(
            TRANSFORMERS,
            Engine("vLLM", True),
            Engine("SGLang", True),
            Engine("llama.cpp", True),
        ),
    ),
)
