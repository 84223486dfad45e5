"""Gemma 1 and 3: norms applied as `1 + w`, embeddings scaled by √D, GELU-gated FFNs."""

from __future__ import annotations

from typing import Any

from moe_convert.families.body import Config, DenseFamily, Rule, plus_one_as, windows

CAUSAL = {"use_bidirectional_attention": (None, False)}


def _shifted(*names: str) -> dict[str, Rule]:
    return {name: plus_one_as(name) for name in names}


def _gemma(config: Config) -> dict[str, Any]:
    bias = config["attention_bias"]
    return {
        "embedding_multiplier": config["hidden_size"] ** 0.5,
        "qkv_bias": bias,
        "o_bias": bias,
    }


def _gemma3(config: Config) -> dict[str, Any]:
    """Return what differs from Gemma 1: windows with a rope of their own, scaled queries."""
    ropes, scalar = config["rope_parameters"], config["query_pre_attn_scalar"]
    found = windows(config)
    everywhere = found["sliding_window"] is not None and found["layer_types"] is None
    local = ropes["sliding_attention"] if found["sliding_window"] is not None else None
    rope = ropes["sliding_attention" if everywhere else "full_attention"]
    return {
        **_gemma(config),
        **found,
        "rope": dict(rope),
        "local_rope": dict(local) if local is not None and local != rope else None,
        "attention_multiplier": None if scalar == config["head_dim"] else scalar**-0.5,
    }


ROWS = (
    DenseFamily(
        "gemma",
        "GemmaForCausalLM",
        targets=("granitemoe", "mixtral"),
        examples="Gemma 2B and 7B, CodeGemma",
        only=CAUSAL,
        also_read=("hidden_activation", "attention_bias"),
        refine=_gemma,
        tensors=_shifted(
            "input_layernorm.weight", "post_attention_layernorm.weight", "model.norm.weight"
        ),
    ),
    DenseFamily(
        "gemma3_text",
        "Gemma3ForCausalLM",
        targets=("beam",),
        examples="Gemma 3 270M and 1B",
        fields={"act": "hidden_activation", "final_softcap": "final_logit_softcapping"},
        fixed={"block": "sandwich", "qk_norm": "head"},
        only={**CAUSAL, "attn_logit_softcapping": (None,)},
        also_read=(
            "attention_bias",
            "cache_implementation",
            "layer_types",
            "query_pre_attn_scalar",
            "rope_local_base_freq",
            "sliding_window",
            "sliding_window_pattern",
        ),
        refine=_gemma3,
        tensors=_shifted(
            "input_layernorm.weight",
            "post_attention_layernorm.weight",
            "pre_feedforward_layernorm.weight",
            "post_feedforward_layernorm.weight",
            "self_attn.q_norm.weight",
            "self_attn.k_norm.weight",
            "model.norm.weight",
        ),
        limit="up to rounding, with rms_norm_eps of at most 1e-5",
        ffn_norm="pre_feedforward_layernorm.weight",
    ),
)
