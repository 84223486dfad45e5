"""Phi-3 and Phi-4: Llama's decoder with q, k, v and gate, up stored as one matrix each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_convert.families.body import Body, Config, DenseFamily, FfnNames
from moe_convert.ffn import Weight
from moe_convert.transforms import split_rows


def split_qkv(weight: Weight, body: Body) -> Mapping[str, Weight]:
    """Cut a fused projection into q, k and v."""
    queries, keys = body.num_heads * body.head_dim, body.num_kv_heads * body.head_dim
    parts = split_rows(weight, (queries, keys, keys))
    return {f"self_attn.{n}_proj.weight": part for n, part in zip("qkv", parts, strict=True)}


def _phi3(config: Config) -> dict[str, Any]:
    """Say up to where a window cuts nothing off, if it is as long as the context."""
    window: int | None = config["sliding_window"]
    idle = window is not None and window >= config["max_position_embeddings"]
    return {"exact_below": window if idle else None}


ROWS = (
    DenseFamily(
        "phi3",
        "Phi3ForCausalLM",
        targets=("mixtral", "glm4_moe"),
        examples="Phi-3, Phi-3.5, Phi-4, Phi-4-mini",
        fields={"sliding_window": "sliding_window"},
        only={
            "attention_bias": (None, False),
            "mlp_bias": (None, False),
            "lm_head_bias": (None, False),
            "full_attn_mod": (None, 1),
            "interpolate_factor": (None, 1),
        },
        also_read=(
            "original_max_position_embeddings",
            "partial_rotary_factor",
            "resid_pdrop",
            "embd_pdrop",
        ),
        refine=_phi3,
        rope_keys=("partial_rotary_factor",),
        limit="a window as long as the context is left out where the target has none",
        tensors={"self_attn.qkv_proj.weight": split_qkv},
        ffn_names=FfnNames("mlp.gate_up_proj.weight", "mlp.gate_up_proj.weight", fused=True),
    ),
)
