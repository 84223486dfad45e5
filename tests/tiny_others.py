"""Tiny checkpoints of Ministral, Cohere, GLM, ERNIE, Hunyuan, StableLM and their likes.

By model type and variant: what it adds to `BASE`, and the targets that have no place for it.
"""

from __future__ import annotations

from typing import Any

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 256,
}
MINISTRAL3_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1000000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 1024,
    "max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.5,
    "llama_4_scaling_beta": 0.1,
}
MIXED = {
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
FULL = {"sliding_window": 8, "layer_types": ["full_attention"] * 3}
FIXED_ALPHA = {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 1000.0, "factor": 1.0}
UNTIED = {"tie_word_embeddings": False}
TIED = {"tie_word_embeddings": True}
ROTARY_THIRD = {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.375}
ROTARY_ALL = {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 1.0}

Variants = dict[str, tuple[dict[str, Any], tuple[str, ...]]]

OTHERS: dict[str, Variants] = {
    "ministral": {
        "window": ({"sliding_window": 8, "head_dim": 16}, ()),
        "mixed": ({**MIXED, **TIED, "head_dim": 32}, ("mixtral",)),
        "full": ({**FULL, "head_dim": 16, "rope_parameters": YARN_ROPE}, ()),
    },
    "ministral3": {
        "short": ({"head_dim": 32, "rope_parameters": MINISTRAL3_ROPE}, ()),
        "tied_window": (
            {"head_dim": 16, "rope_parameters": MINISTRAL3_ROPE, "sliding_window": 8, **TIED},
            ("glm4_moe",),
        ),
    },
    "cwm": {
        "mixed": ({**MIXED, "head_dim": 32}, ()),
        "tied_llama3_rope": ({"head_dim": 16, "rope_parameters": LLAMA3_ROPE, **TIED}, ()),
    },
    "seed_oss": {
        "plain": ({"head_dim": 32}, ()),
        "tied_without_bias": ({"head_dim": 16, "attention_bias": False, **TIED}, ()),
    },
    "cohere": {
        "plain": ({}, ()),
        "bias_untied": ({"attention_bias": True, "logit_scale": 0.3, **UNTIED}, ()),
        "linear": (
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
            (),
        ),
    },
    "cohere2": {
        "mixed": (MIXED, ()),
        "bias_untied": (
            {**MIXED, "attention_bias": True, "logit_scale": 0.3, **UNTIED},
            (),
        ),
        "windows": ({**MIXED, "layer_types": ["sliding_attention"] * 3}, ()),
        "without_rope": (FULL, ()),
    },
    "glm": {
        "plain": ({"head_dim": 16}, ()),
        "tied_without_bias": ({"head_dim": 32, "attention_bias": False, **TIED}, ()),
        "rotary_all": ({"head_dim": 16, "rope_parameters": ROTARY_ALL}, ()),
    },
    "ernie4_5": {
        "plain": ({"head_dim": 32}, ()),
        "untied": ({"head_dim": 16, **UNTIED}, ()),
        "yarn": ({"head_dim": 16, "rope_parameters": YARN_ROPE}, ()),
    },
    "helium": {
        "plain": ({"head_dim": 16}, ()),
        "tied_bias": ({"head_dim": 16, "attention_bias": True, **TIED}, ("mixtral",)),
    },
    "hunyuan_v1_dense": {
        "plain": ({"head_dim": 32, "rope_parameters": FIXED_ALPHA}, ()),
        "tied_bias": ({"head_dim": 16, "attention_bias": True, **TIED}, ()),
    },
    "stablelm": {
        "bias": ({"use_qkv_bias": True}, ()),
        "tied": (TIED, ()),
        "rotary_third": ({"rope_parameters": ROTARY_THIRD}, ()),
        "rotary_all": ({"rope_parameters": ROTARY_ALL}, ()),
    },
    "nemotron": {
        "plain": ({}, ()),
        "tied_bias": ({"attention_bias": True, "head_dim": 32, **TIED}, ()),
    },
}
