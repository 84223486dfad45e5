"""Phi-3.5-MoE: LayerNorms with bias, and SparseMixer, which gives its two experts a weight of one.

Without jitter each of the two softmaxes sees the best remaining expert alone, hence the weights.
"""

from __future__ import annotations

from typing import Any

from moe_convert.families.body import Body, Rule
from moe_convert.ffn import Weight
from moe_convert.targets.base import (
    SILU,
    Engine,
    MoeShape,
    MoeTarget,
    Trap,
    not_silu,
    per_expert,
)
from moe_convert.transforms import spread_rotary, spread_wavelengths

ENGINE_NAME = Trap("knows the class as PhiMoEForCausalLM: rename it in config.json")


def _default_rope(body: Body) -> str | None:
    kind = body.rope.get("rope_type", "default")
    return None if kind == "default" else f"it has no place for rope_type={kind!r}"


def _rotary_dim(body: Body) -> int:
    return int(body.head_dim * body.partial_rotary)


def _phimoe(body: Body, shape: MoeShape) -> dict[str, Any]:
    """Write a partial rotation as a full one in which most pairs do not turn.

    The base is one, so that the factors alone are the wavelengths.
    """
    bias = {"attention_bias": body.qkv_bias or body.o_bias}
    if body.partial_rotary == 1.0:
        return bias
    wavelengths = spread_wavelengths(body.rope["rope_theta"], body.head_dim, _rotary_dim(body))
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1.0,
        "short_factor": wavelengths,
        "long_factor": wavelengths,
        "short_mscale": 1.0,
        "long_mscale": 1.0,
        "attention_factor": 1.0,
        "factor": 1.0,
        "original_max_position_embeddings": body.max_positions,
    }
    return {**bias, "rope_parameters": rope}


def _zero_biases(body: Body, shape: MoeShape, dtype: str) -> dict[str, Weight]:
    """Add the biases that the one switch for all of them brings along."""
    if body.qkv_bias == body.o_bias:
        return {}
    sizes = {"o": body.hidden_size}
    if body.o_bias:
        keys = body.num_kv_heads * body.head_dim
        sizes = {"q": body.num_heads * body.head_dim, "k": keys, "v": keys}
    return {
        f"self_attn.{name}_proj.bias": Weight.filled((size,), 0.0, dtype)
        for name, size in sizes.items()
    }


def _spread(name: str) -> Rule:
    def rule(weight: Weight, body: Body) -> dict[str, Weight]:
        heads = body.num_heads if ".q_proj." in name else body.num_kv_heads
        partial = body.partial_rotary != 1.0
        return {name: spread_rotary(weight, heads, _rotary_dim(body)) if partial else weight}

    return rule


TURNED = (
    "self_attn.q_proj.weight",
    "self_attn.q_proj.bias",
    "self_attn.k_proj.weight",
    "self_attn.k_proj.bias",
)

ROWS = (
    MoeTarget(
        "phimoe",
        "PhimoeForCausalLM",
        router="block_sparse_moe.gate.weight",
        router_module="mlp.router",
        routed=per_expert(
            gate="block_sparse_moe.experts.{expert}.w1.weight",
            up="block_sparse_moe.experts.{expert}.w3.weight",
            down="block_sparse_moe.experts.{expert}.w2.weight",
        ),
        shape_keys={
            "num_experts": "num_local_experts",
            "top_k": "num_experts_per_tok",
            "expert_size": "intermediate_size",
        },
        weights_sum=2.0,
        fixed_top_k=2,
        holds={"qkv_bias": "attention_bias", "o_bias": "attention_bias"},
        absorbs=frozenset({"partial_rotary"}),
        always={"norm": "layer"},
        constants={
            "router_jitter_noise": 0.0,
            "input_jitter_noise": 0.0,
            "lm_head_bias": False,
            "output_router_logits": False,
        },
        computed=_phimoe,
        limits=(_default_rope,),
        places={name: _spread(name) for name in TURNED},
        extras=_zero_biases,
        engines=(
            Engine(
                "transformers", True, (Trap("halves a weight where router logits tie in bf16"),)
            ),
            Engine(
                "vLLM",
                True,
                (
                    ENGINE_NAME,
                    Trap("routes with a jitter of 0.01 whatever the config says"),
                    Trap("expects biases in attention and head, which may not be written"),
                    Trap(SILU, not_silu),
                ),
            ),
            Engine("SGLang", True, (ENGINE_NAME, Trap(SILU, not_silu))),
            Engine(
                "llama.cpp",
                True,
                (
                    ENGINE_NAME,
                    Trap("weighs experts by a plain softmax, so its output differs"),
                    Trap(SILU, not_silu),
                ),
            ),
        ),
    ),
)
