"""Beam: sandwich norms, query and key norms and a rope per layer type, as Gemma 3 has them.

Beam divides its residual stream by √n after n additions. The norms that read the stream undo that,
but for their epsilon, which counts n times as much beside the smaller variance. The variance of the
undivided stream grows with n as well, so what is left is about epsilon divided by the variance that
one addition brings, which comparing the logits shows.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    not_silu,
    same_bias,
    whole_correction,
    window_types,
)
from moe_convert.targets.glm import SELECTION_BIAS, neutral_bias

LARGEST_EPS = 1e-5
"""The largest epsilon whose different weight beside a divided stream stays below rounding."""
OPEN_GATE = 100.0
"""A gate's logit whose sigmoid is one in every dtype."""


def with_open_gate(weight: Weight, body: Body) -> Mapping[str, Weight]:
    """Keep q_proj, and add the gate of the attention's output so that it lets everything through.

    Its weights have the shape of q_proj.
    """
    return {
        "self_attn.q_proj.weight": weight,
        "self_attn.gate_proj.weight": Weight.filled(weight.shape, 0.0, weight.dtype),
        "self_attn.gate_bias": Weight.filled((body.num_heads,), OPEN_GATE, weight.dtype),
    }


def scaled_queries(weight: Weight, body: Body) -> Mapping[str, Weight]:
    """Fold what the attention's scale differs from 1/√C by into the query norm."""
    scale = body.attention_multiplier or body.head_dim**-0.5
    return {"self_attn.q_norm.weight": weight.scaled(scale * body.head_dim**0.5)}


def _small_eps(body: Body) -> str | None:
    """Refuse an epsilon that the division of the stream would make felt."""
    if body.norm_eps <= LARGEST_EPS:
        return None
    return f"it divides its residual stream, which is felt beside rms_norm_eps={body.norm_eps!r}"


def _beam(body: Body, shape: MoeShape) -> dict[str, Any]:
    """Write the rope of every kind of layer, and which layers stay dense."""
    local = body.rope if body.local_rope is None else body.local_rope
    return {
        "rope_parameters": {"full_attention": dict(body.rope), "sliding_attention": dict(local)},
        "layer_types": window_types(body),
        "sliding_window": body.sliding_window,
        "mlp_layer_types": mlp_types(shape),
    }


ROWS = (
    MoeTarget(
        "beam",
        "BeamForCausalLM",
        shape_keys={
            "num_experts": "num_experts",
            "top_k": "num_experts_per_tok",
            "expert_size": "moe_intermediate_size",
        },
        scoring="sigmoid",
        scale_key="routed_scaling_factor",
        extras=neutral_bias,
        selection_bias=SELECTION_BIAS,
        dense_layers="any",
        groups=True,
        holds={
            "qkv_bias": "attention_bias",
            "o_bias": "attention_bias",
            "final_softcap": "final_logit_softcapping",
        },
        always={"block": "sandwich", "qk_norm": "head"},
        absorbs=frozenset({"attention_multiplier", "sliding_window", "layer_types", "local_rope"}),
        constants={"norm_topk_prob": True, "output_router_logits": False},
        computed=_beam,
        places={
            "self_attn.q_proj.weight": with_open_gate,
            "self_attn.q_norm.weight": scaled_queries,
        },
        limits=(same_bias, whole_correction, _small_eps),
        stream_divisor=lambda layer: (2 * layer + 3) ** 0.5,
        engines=(
            TRANSFORMERS,
            Engine("vLLM", True, (Trap(SILU, not_silu),)),
            Engine("SGLang", True, (Trap(SILU, not_silu),)),
            Engine("llama.cpp", False),
        ),
    ),
)
