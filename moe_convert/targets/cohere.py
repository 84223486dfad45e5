"""Cohere 2 MoE: parallel blocks, windows with rope and full attention without, shared experts."""

from __future__ import annotations

from typing import Any

from moe_convert.families.body import Body
from moe_convert.targets.base import (
    TRANSFORMERS,
    Engine,
    MoeShape,
    MoeTarget,
    Trap,
    if_any,
    mlp_types,
    projections,
    same_bias,
    window_types,
)

ENDLESS = 2**30
"""A window that no sequence fills."""


def _turns_in_windows(body: Body) -> str | None:
    """Refuse layers that have rope or a window, but not both."""
    if body.sliding_window is None:
        return None
    full = [n for n, kind in enumerate(window_types(body)) if kind == "full_attention"]
    if full == list(body.nope_layers):
        return None
    return f"it rotates in layers with a window only, and nope_layers={body.nope_layers!r}"


def _cohere2_moe(body: Body, shape: MoeShape) -> dict[str, Any]:
    """Write the layers that rotate as windowed; the window of a model without one never acts."""
    still = set(body.nope_layers)
    return {
        "logit_scale": 1 / body.logits_divisor,
        "sliding_window": body.sliding_window or ENDLESS,
        "layer_types": [
            "full_attention" if layer in still else "sliding_attention"
            for layer in range(body.num_layers)
        ],
        "mlp_layer_types": mlp_types(shape),
    }


ROWS = (
    MoeTarget(
        "cohere2_moe",
        "Cohere2MoeForCausalLM",
        shape_keys={
            "num_experts": "num_experts",
            "top_k": "num_experts_per_tok",
            "expert_size": "intermediate_size",
            "num_shared": "num_shared_experts",
            "dense_size": "prefix_dense_intermediate_size",
        },
        sizes={"norm_eps": "layer_norm_eps"},
        shared="units",
        shared_as=if_any(projections("mlp.shared_experts")),
        dense_layers="any",
        rope="interleaved",
        holds={
            "qkv_bias": "attention_bias",
            "o_bias": "attention_bias",
            "sliding_window": "sliding_window",
            "layer_types": "layer_types",
        },
        absorbs=frozenset({"nope_layers", "logits_divisor"}),
        always={"block": "parallel", "norm": "layer_nobias"},
        constants={
            "expert_selection_fn": "softmax",
            "norm_topk_prob": True,
            "shared_expert_combination_strategy": "sum",
            "prefix_dense_sliding_window_pattern": 4,
            "output_router_logits": False,
        },
        computed=_cohere2_moe,
        limits=(same_bias, _turns_in_windows),
        engines=(
            TRANSFORMERS,
            Engine(
                "vLLM",
                True,
                (
                    Trap(
                        "lets windows reach one token further",
                        lambda b, s: b.sliding_window is not None,
                        "there are any",
                    ),
                ),
            ),
            Engine("SGLang", True),
            Engine(
                "llama.cpp",
                True,
                (
                    Trap(
                        "averages shared and routed experts, whose sum is meant",
                        lambda b, s: s.shared_size > 0,
                        "there are both",
                    ),
                ),
            ),
        ),
    ),
)
