"""Flex-OLMo for OLMo 2 bodies, and DBRX, whose LayerNorms and clipped q, k, v hold OLMo 1."""

from __future__ import annotations

from typing import Any

from moe_convert.families.body import Body, renamed
from moe_convert.ffn import Ffn, concatenated
from moe_convert.targets.base import (
    SILU,
    TRANSFORMERS,
    Engine,
    MoeShape,
    MoeTarget,
    Named,
    Trap,
    not_silu,
    same_bias,
)
from moe_convert.transforms import transposed

UNCLIPPED = 1e30
"""A bound that no projection reaches: DBRX clips always."""
TORCH_NORM_EPS = 1e-5


def _dbrx_experts(routed: tuple[Ffn, ...]) -> Named:
    """Stack all experts row by row; down is stored transposed."""
    for name, attribute in (("w1", "gate_FD"), ("v1", "up_FD")):
        parts = [getattr(expert, attribute) for expert in routed]
        yield f"ffn.experts.mlp.{name}", concatenated(parts, axis=0)
    down_FD = [transposed(expert.down_DF) for expert in routed]
    yield "ffn.experts.mlp.w2", concatenated(down_FD, axis=0)


def _dbrx_config(body: Body, shape: MoeShape) -> dict[str, Any]:
    attention = {
        "kv_n_heads": body.num_kv_heads,
        "clip_qkv": UNCLIPPED if body.clip_qkv is None else body.clip_qkv,
        "rope_theta": body.rope["rope_theta"],
    }
    ffn = {
        "hidden_size": body.hidden_size,
        "ffn_act_fn": {"name": body.act},
        "ffn_hidden_size": shape.expert_size,
        "moe_num_experts": shape.num_experts,
        "moe_top_k": shape.top_k,
        "moe_normalize_expert_weights": 1.0,
    }
    return {"attn_config": attention, "ffn_config": ffn}


def _torch_eps(body: Body) -> str | None:
    if body.norm_eps == TORCH_NORM_EPS:
        return None
    return f"its norms add {TORCH_NORM_EPS}, and these {body.norm_eps}"


def _even_heads(body: Body) -> str | None:
    if body.plain_head_dim:
        return None
    return f"its heads have hidden size / heads entries, and these {body.head_dim}"


ROWS = (
    MoeTarget(
        "flex_olmo",
        "FlexOlmoForCausalLM",
        shape_keys={
            "num_experts": "num_experts",
            "top_k": "num_experts_per_tok",
            "expert_size": "intermediate_size",
        },
        holds={"qkv_bias": "attention_bias", "o_bias": "attention_bias"},
        always={"block": "post", "qk_norm": "full"},
        constants={"norm_topk_prob": True, "output_router_logits": False},
        limits=(same_bias,),
        engines=(
            TRANSFORMERS,
            Engine("vLLM", True, (Trap(SILU, not_silu),)),
            Engine("SGLang", False),
            Engine("llama.cpp", False),
        ),
    ),
    MoeTarget(
        "dbrx",
        "DbrxForCausalLM",
        router="ffn.router.layer.weight",
        router_module="ffn.router.layer",
        routed=_dbrx_experts,
        shape_keys={},
        sizes={
            "hidden_size": "d_model",
            "num_layers": "n_layers",
            "num_heads": "n_heads",
            "max_positions": "max_seq_len",
        },
        always={"norm": "layer_nobias"},
        absorbs=frozenset({"clip_qkv"}),
        constants={"output_router_logits": False},
        computed=_dbrx_config,
        fuses={
            "norm_attn_norm.attn.Wqkv.weight": (
                "self_attn.q_proj.weight",
                "self_attn.k_proj.weight",
                "self_attn.v_proj.weight",
            )
        },
        places={
            "self_attn.o_proj.weight": renamed("norm_attn_norm.attn.out_proj.weight"),
            "input_layernorm.weight": renamed("norm_attn_norm.norm_1.weight"),
            "post_attention_layernorm.weight": renamed("norm_attn_norm.norm_2.weight"),
        },
        on_disk={
            "model.layers.": "transformer.blocks.",
            "model.embed_tokens.": "transformer.wte.",
            "model.norm.": "transformer.norm_f.",
        },
        ties=False,
        limits=(_torch_eps, _even_heads),
        engines=(
            TRANSFORMERS,
            Engine("vLLM", True),
            Engine("SGLang", True),
            Engine("llama.cpp", True),
        ),
    ),
)
