"""Qwen's MoE types: softmax routers with a renormalisation flag, dense layers anywhere."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moe_convert.families.body import Body, Rule
from moe_convert.ffn import Weight
from moe_convert.targets.base import (
    HEAD_DIM,
    TRANSFORMERS,
    WINDOW,
    Engine,
    MoeShape,
    MoeTarget,
    Trap,
    no_o_bias,
    odd_head_dim,
    projections,
    same_bias,
    windowed,
)

SHAPE_KEYS = {
    "num_experts": "num_experts",
    "top_k": "num_experts_per_tok",
    "expert_size": "moe_intermediate_size",
}
CONSTANTS = {"norm_topk_prob": True, "decoder_sparse_step": 1, "output_router_logits": False}


def layer_types(body: Body, shape: MoeShape) -> dict[str, Any]:
    """Write the window of every layer, and the layers that stay dense."""
    kind = "full_attention" if body.sliding_window is None else "sliding_attention"
    types = list(body.layer_types or [kind] * body.num_layers)
    return {"layer_types": types, **uniform_window(body, shape)}


def uniform_window(body: Body, shape: MoeShape) -> dict[str, Any]:
    """Write whether every layer has the window, and the layers that stay dense."""
    return {
        "use_sliding_window": body.sliding_window is not None,
        "mlp_only_layers": list(shape.dense_layers),
    }


def neutral_shared_gate(body: Body, shape: MoeShape, dtype: str) -> dict[str, Weight]:
    """Add the shared expert's gate as zeros: its sigmoid is then one half for every token."""
    return {"mlp.shared_expert_gate.weight": Weight.filled((1, body.hidden_size), 0.0, dtype)}


def _beside_zeros(name: str) -> Rule:
    """Add a bias of zeros to a projection."""

    def place(weight: Weight, body: Body) -> dict[str, Weight]:
        zeros = Weight.filled(weight.shape[:1], 0.0, weight.dtype)
        return {f"{name}.weight": weight, f"{name}.bias": zeros}

    return place


def with_zero_biases(target: MoeTarget, body: Body) -> MoeTarget:
    """Return the target that writes the biases of q, k and v as zeros where the body has none."""
    if body.qkv_bias:
        return target
    names = [f"self_attn.{part}_proj" for part in "qkv"]
    engines = (
        replace(engine, traps=tuple(trap for trap in engine.traps if trap is not NO_BIASES))
        for engine in target.engines
    )
    return replace(
        target,
        places={**target.places, **{f"{name}.weight": _beside_zeros(name) for name in names}},
        computed=lambda body, shape: {**target.computed(body, shape), "qkv_bias": True},
        engines=tuple(engines),
    )


NO_BIASES = Trap(
    "expects biases of q, k and v, which are not written",
    lambda b, s: not b.qkv_bias,
    "the body has none, and output.compat, which writes zeros, is off",
)

ROWS = (
    MoeTarget(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        shape_keys={**SHAPE_KEYS, "shared_size": "shared_expert_intermediate_size"},
        shared="free",
        shared_as=projections("mlp.shared_expert"),
        shared_weight=0.5,
        extras=neutral_shared_gate,
        compatible=with_zero_biases,
        dense_layers="any",
        holds={
            "qkv_bias": "qkv_bias",
            "sliding_window": "sliding_window",
            "layer_types": "layer_types",
        },
        constants=CONSTANTS,
        computed=layer_types,
        limits=(no_o_bias,),
        engines=(
            TRANSFORMERS,
            Engine(
                "vLLM",
                True,
                (
                    NO_BIASES,
                    Trap(HEAD_DIM, odd_head_dim),
                    Trap(WINDOW, windowed),
                ),
            ),
            Engine("SGLang", True, (Trap(HEAD_DIM, odd_head_dim),)),
            Engine(
                "llama.cpp",
                True,
                (
                    Trap("ignores norm_topk_prob, so its output differs"),
                    Trap(
                        "needs shared-expert tensors",
                        lambda b, s: s.shared_size == 0,
                        "there are none",
                    ),
                    Trap(HEAD_DIM, odd_head_dim),
                ),
            ),
        ),
    ),
    MoeTarget(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        shape_keys=SHAPE_KEYS,
        dense_layers="any",
        holds={
            "qkv_bias": "attention_bias",
            "o_bias": "attention_bias",
            "sliding_window": "sliding_window",
        },
        always={"qk_norm": "head"},
        constants=CONSTANTS,
        computed=uniform_window,
        limits=(same_bias,),
        engines=(
            TRANSFORMERS,
            Engine(
                "vLLM",
                True,
                (Trap("drops the bias of o_proj", lambda b, s: b.o_bias, "there is one"),),
            ),
            Engine("SGLang", True),
            Engine("llama.cpp", True),
        ),
    ),
)
