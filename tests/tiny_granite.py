"""Tiny checkpoints of Phi, Gemma, Granite, OLMo and their likes: config and refusing targets."""

from __future__ import annotations

from typing import Any

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 256,
}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
BIAS = {"attention_bias": True}
SLIDING, FULL = "sliding_attention", "full_attention"


def longrope(rotary_dim: int) -> dict[str, Any]:
    """Return longrope parameters that change over to the long factors at 32 tokens."""
    pairs = range(rotary_dim // 2)
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": 32,
        "short_factor": [1.0 + 0.1 * i for i in pairs],
        "long_factor": [2.0 + 0.7 * i for i in pairs],
    }


PARTIAL = {"partial_rotary_factor": 0.75}
GEMMA3 = {
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 8,
    "layer_types": [SLIDING, SLIDING, FULL],
}
SCALED_ROPE = {
    SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
    FULL: {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
}
SCALES = {
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.15,
    "residual_multiplier": 0.22,
    "logits_scaling": 0.3,
}
GRANITE4 = {
    **SCALES,
    "num_local_experts": 0,
    "shared_intermediate_size": 96,
    "layer_types": ["attention"] * 3,
    "position_embedding_type": "rope",
}
MAMBA = {
    **GRANITE4,
    "layer_types": ["mamba", "attention", "mamba"],
    "position_embedding_type": None,
    "mamba_n_heads": 4,
    "mamba_d_state": 16,
    "mamba_chunk_size": 16,
}
SWASH = {
    **SCALES,
    "sliding_window": 8,
    "layer_types": [FULL, SLIDING, SLIDING],
    "layer_rope_theta": [0.0, 10000.0, 500.0],
}
OLMO3 = {"sliding_window": 1024, "layer_types": [SLIDING, FULL, SLIDING]}
NOPE = {"no_rope_layers": [1, 0, 1]}
PLAIN_GRANITE = ("granitemoe", "granitemoeshared")

BRANCHED: dict[str, dict[str, tuple[dict[str, Any], tuple[str, ...]]]] = {
    "phi3": {
        "plain": ({}, ()),
        "tied": (TIED, ()),
        "window": ({"sliding_window": 8}, ("glm4_moe",)),
        "longer_window": ({"sliding_window": 2048}, ()),
        "longrope": ({"rope_parameters": longrope(16)}, ()),
        "partial": ({"rope_parameters": {"rope_theta": 10000.0, **PARTIAL}}, ("mixtral",)),
        "partial_longrope": (
            {**TIED, "rope_parameters": {**longrope(12), **PARTIAL}},
            ("mixtral",),
        ),
    },
    "gemma": {
        "plain": ({"head_dim": 32}, ()),
        "untied": ({**UNTIED, "head_dim": 16}, ()),
        "narrow": ({"head_dim": 16, "hidden_size": 48}, ()),
        "bias": ({**BIAS, "head_dim": 16}, ("mixtral",)),
    },
    "gemma3_text": {
        "plain": (GEMMA3, ()),
        "untied_bias": ({**GEMMA3, **UNTIED, **BIAS}, ()),
        "scaled_queries": ({**GEMMA3, "query_pre_attn_scalar": 24, "hidden_size": 48}, ()),
        "scaled_rope": ({**GEMMA3, "rope_parameters": SCALED_ROPE}, ()),
        "all_sliding": ({**GEMMA3, "layer_types": [SLIDING] * 3}, ()),
        "all_full": ({**GEMMA3, "layer_types": [FULL] * 3}, ()),
        "softcap": ({**GEMMA3, "final_logit_softcapping": 2.0}, ()),
    },
    "granite": {
        "plain": (SCALES, ()),
        "tied_bias": ({**SCALES, **TIED, **BIAS}, ()),
        "yarn": ({**SCALES, "rope_parameters": YARN}, ()),
    },
    "hyperclovax": {
        "plain": ({**SCALES, "use_post_norm": False}, ()),
        "wide_heads": ({**TIED, **BIAS, "use_post_norm": False, "head_dim": 32}, ()),
    },
    "granitemoehybrid": {
        "plain": (GRANITE4, ()),
        "tied_bias": ({**GRANITE4, **TIED, **BIAS}, ()),
        "no_rope": ({**GRANITE4, "position_embedding_type": None}, PLAIN_GRANITE),
        "mamba": (MAMBA, PLAIN_GRANITE),
        "mamba_limited": ({**MAMBA, "time_step_limit": [0.5, 0.7]}, PLAIN_GRANITE),
    },
    "granite_swa": {
        "plain": (SWASH, ()),
        "untied_bias": ({**SWASH, **UNTIED, **BIAS}, ()),
        "one_theta": ({"sliding_window": 8}, ()),
    },
    "smollm3": {
        "plain": ({**NOPE, **UNTIED}, ()),
        "tied_bias": ({**NOPE, **BIAS}, ()),
        "windows": ({**NOPE, "use_sliding_window": True, "sliding_window": 8}, ()),
        "yarn": ({**NOPE, "rope_parameters": YARN}, ()),
    },
    "arcee": {
        "plain": ({}, ()),
        "tied": ({**TIED, "rope_parameters": YARN}, ()),
        "bias": (BIAS, ("mixtral",)),
    },
    "internlm3": {
        "plain": ({"head_dim": 16}, ()),
        "dynamic": (
            {
                "head_dim": 32,
                "max_position_embeddings": 32,
                "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 6.0},
            },
            (),
        ),
    },
    "iquestcoder": {
        "plain": ({"head_dim": 16}, ()),
        "tied_yarn": ({**TIED, "head_dim": 32, "rope_parameters": YARN}, ()),
    },
    "olmo": {
        "plain": ({}, ()),
        "clipped": ({"clip_qkv": 0.4}, ()),
        "tied_yarn": ({**TIED, "rope_parameters": YARN}, ()),
    },
    "olmo2": {
        "plain": ({}, ()),
        "tied_bias": ({**TIED, **BIAS}, ()),
        "yarn": ({"rope_parameters": YARN}, ()),
    },
    "olmo3": {
        "plain": (OLMO3, ()),
        "tied_bias": ({**OLMO3, **TIED, **BIAS}, ()),
        "all_full": ({**OLMO3, "sliding_window": 8, "layer_types": [FULL] * 3}, ()),
    },
}
"""Changes to `BASE` by model type and variant, with the targets of the family that refuse it."""
