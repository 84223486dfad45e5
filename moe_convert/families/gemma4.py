"""Gemma 4: sandwich norms, per-layer inputs, shared keys; its MoE form is a switch of its own."""

from __future__ import annotations

from moe_convert.families.body import DenseFamily

ATTENTION = (
    "layer_types",
    "sliding_window",
    "attention_bias",
    "attention_k_eq_v",
    "num_kv_shared_layers",
    "per_layer_config",
    "use_bidirectional_attention",
)
PER_LAYER_INPUTS = ("hidden_size_per_layer_input", "vocab_size_per_layer_input")

ROWS = (
    DenseFamily(
        "gemma4_text",
        "Gemma4ForCausalLM",
        targets=("gemma4_text",),
        examples="the text part of Gemma 4 31B and others without a double-wide FFN",
        fields={"act": "hidden_activation"},
        fixed={"native": "gemma4"},
        only={"enable_moe_block": (False,), "use_double_wide_mlp": (False,)},
        also_read=(
            "num_experts",
            "top_k_experts",
            "moe_intermediate_size",
            "global_head_dim",
            "num_global_key_value_heads",
        ),
        refine=lambda c: {"rope": dict(c["rope_parameters"])},
        carries=(*ATTENTION, *PER_LAYER_INPUTS, "final_logit_softcapping"),
        rope_keys=("partial_rotary_factor",),
        ffn_norm="pre_feedforward_layernorm.weight",
        token_tables=("model.embed_tokens_per_layer.weight",),
    ),
)
