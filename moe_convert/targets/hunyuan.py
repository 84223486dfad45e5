"""Hunyuan MoE: query and key norms behind the rope, exactly one ungated shared expert."""

from __future__ import annotations

from moe_convert.families.body import renamed
from moe_convert.targets.base import TRANSFORMERS, Engine, MoeTarget, projections, same_bias

ROWS = (
    MoeTarget(
        "hunyuan_v1_moe",
        "HunYuanMoEV1ForCausalLM",
        router="mlp.gate.wg.weight",
        shape_keys={
            "num_experts": "num_experts",
            "top_k": "moe_topk",
            "expert_size": "intermediate_size",
        },
        shared="one",
        shared_required=True,
        shared_as=projections("mlp.shared_mlp"),
        holds={"qkv_bias": "attention_bias", "o_bias": "attention_bias"},
        always={"qk_norm": "head_after_rope"},
        constants={"output_router_logits": False},
        limits=(same_bias,),
        places={
            "self_attn.q_norm.weight": renamed("self_attn.query_layernorm.weight"),
            "self_attn.k_norm.weight": renamed("self_attn.key_layernorm.weight"),
        },
        engines=(
            TRANSFORMERS,
            Engine("vLLM", True),
            Engine("SGLang", True),
            Engine("llama.cpp", True),
        ),
    ),
)
