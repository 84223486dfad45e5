"""Tiny checkpoints of families whose token mixer only their own sibling has: config by variant."""

from __future__ import annotations

from typing import Any

LINEAR = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "head_dim": 32,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
CONVOLUTION = {
    "layer_types": ["conv", "full_attention", "conv"],
    "block_auto_adjust_ff_dim": False,
    "tie_word_embeddings": False,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "tie_word_embeddings": False,
}
KINDS = ["sliding_attention", "full_attention"]
GEMMA = {
    "head_dim": 16,
    "global_head_dim": 32,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
    "sliding_window": 8,
    "hidden_size_per_layer_input": 0,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 256,
}

NATIVE: dict[str, dict[str, dict[str, Any]]] = {
    "qwen3_5_text": {
        "plain": LINEAR,
        "tied_bias": {**LINEAR, "tie_word_embeddings": True, "attention_bias": True},
        "multimodal_rope": {
            **LINEAR,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 500000.0,
                "partial_rotary_factor": 0.5,
                "mrope_section": [3, 3, 2],
                "mrope_interleaved": True,
            },
        },
        "yarn": {**LINEAR, "rope_parameters": {**YARN, "partial_rotary_factor": 0.5}},
    },
    "lfm2": {
        "plain": CONVOLUTION,
        "tied_bias": {**CONVOLUTION, "tie_word_embeddings": True, "conv_bias": True},
        "adjusted_width": {
            **CONVOLUTION,
            "block_auto_adjust_ff_dim": True,
            "block_multiple_of": 16,
            "block_ffn_dim_multiplier": 1.6,
        },
        "yarn": {**CONVOLUTION, "rope_parameters": YARN},
    },
    "youtu": {
        "plain": LATENT,
        "tied_bias": {**LATENT, "tie_word_embeddings": True, "attention_bias": True},
        "one_query": {**LATENT, "q_lora_rank": None, "rope_interleave": False},
        "yarn": {**LATENT, "rope_parameters": {**YARN, "mscale_all_dim": 0.7}},
    },
    "gemma4_text": {
        "plain": {**GEMMA, "tie_word_embeddings": False},
        "tied_bias": {**GEMMA, "tie_word_embeddings": True, "attention_bias": True},
        "softcap": {**GEMMA, "final_logit_softcapping": 5.0},
        "per_layer_inputs": {
            **GEMMA,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 272,
        },
        "shared_keys": {
            **GEMMA,
            "num_hidden_layers": 4,
            "layer_types": [*KINDS, *KINDS],
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 272,
        },
        "keys_as_values": {**GEMMA, "attention_k_eq_v": True, "num_global_key_value_heads": 1},
    },
}
"""Changes to `BASE` by model type and variant."""
