"""Tiny checkpoints of the families that no stock architecture holds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

SIZES: Mapping[str, Any] = {
    "vocab_size": 272,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
OPT = {"ffn_dim": 96, "word_embed_proj_dim": 64, "dropout": 0.1, "init_std": 0.1}
GPT2 = {
    "vocab_size": 272,
    "n_embd": 64,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 1024,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
MIXED = {
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 256,
}

CUSTOM_TINY: dict[str, dict[str, Mapping[str, Any]]] = {
    "gemma2": {
        "window": {**SIZES, "sliding_window": 8, "attn_logit_softcapping": 5.0},
        "untied": {**SIZES, "tie_word_embeddings": False, "query_pre_attn_scalar": 32},
    },
    "glm4": {"plain": SIZES, "no_bias": {**SIZES, "attention_bias": False}},
    "exaone4": {
        "full": {**SIZES, "sliding_window": None, "layer_types": ["full_attention"] * 3},
        "window": {**SIZES, "sliding_window": 8, "sliding_window_pattern": 2},
    },
    "olmo3": {
        "window": {**SIZES, **MIXED},
        "yarn": {**SIZES, **MIXED, "rope_parameters": YARN},
    },
    "gpt_neox": {
        "parallel": SIZES,
        "sequential": {**SIZES, "use_parallel_residual": False, "attention_bias": False},
        "tied": {**SIZES, "tie_word_embeddings": True},
    },
    "gpt2": {
        "plain": GPT2,
        "narrow": {**GPT2, "n_inner": 96, "tie_word_embeddings": False},
    },
    "opt": {
        "pre_norm": {**SIZES, **OPT},
        "post_norm": {
            **{**SIZES, **OPT, "word_embed_proj_dim": 32},
            "do_layer_norm_before": False,
            "tie_word_embeddings": False,
        },
        "no_bias": {**SIZES, **OPT, "enable_bias": False, "layer_norm_elementwise_affine": False},
    },
    "starcoder2": {
        "window": {**SIZES, "sliding_window": 8},
        "no_bias": {**SIZES, "use_bias": False, "tie_word_embeddings": False},
    },
    "phi": {"plain": SIZES, "qk_norm": {**SIZES, "qk_layernorm": True}},
}
"""Config by model type and variant."""


def make_custom(model_type: str, variant: str, folder: Path, dtype: str = "float32") -> Path:
    """Save a random checkpoint with a tokenizer; norms and biases are random too."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    from tests.tiny import make_tokenizer

    config = CONFIG_MAPPING[model_type](**CUSTOM_TINY[model_type][variant])
    torch.manual_seed(11)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                norm = ("norm" in name or "ln_" in name) and name.endswith("weight")
                parameter.copy_(float(norm) + 0.1 * torch.randn_like(parameter))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    make_tokenizer(folder)
    return folder
