"""Mixtral: the plainest target, for Llama and Mistral bodies."""

from __future__ import annotations

from moe_convert.targets.base import (
    HEAD_DIM,
    SILU,
    TRANSFORMERS,
    WINDOW,
    Engine,
    MoeTarget,
    Trap,
    not_silu,
    odd_head_dim,
    per_expert,
    windowed,
)

ROWS = (
    MoeTarget(
        "mixtral",
        "MixtralForCausalLM",
        router="block_sparse_moe.gate.weight",
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
        holds={"sliding_window": "sliding_window"},
        constants={"output_router_logits": False, "router_jitter_noise": 0.0},
        engines=(
            TRANSFORMERS,
            Engine("vLLM", True, (Trap(SILU, not_silu),)),
            Engine("SGLang", True, (Trap(HEAD_DIM, odd_head_dim),)),
            Engine("llama.cpp", True, (Trap(SILU, not_silu), Trap(WINDOW, windowed))),
        ),
    ),
)
