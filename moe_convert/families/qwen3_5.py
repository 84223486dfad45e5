"""Qwen3.5: linear and full attention in turns; only its own MoE sibling has these mixers."""

from __future__ import annotations

from moe_convert.families.body import Config, DenseFamily

LINEAR_ATTENTION = (
    "layer_types",
    "linear_conv_kernel_dim",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
)


def whole_rope(config: Config) -> dict[str, object]:
    """Keep `rope_parameters` in one piece: the sibling reads the same keys, multimodal ones too."""
    return {"rope": dict(config["rope_parameters"]), "partial_rotary": 1.0}


ROWS = (
    DenseFamily(
        "qwen3_5_text",
        "Qwen3_5ForCausalLM",
        targets=("qwen3_5_moe_text",),
        examples="the text part of Qwen3.5 and Qwen3.6, 0.8B to 27B",
        fixed={"native": "qwen3_5"},
        only={
            "attn_output_gate": (None, True),
            "output_gate_type": (None, "swish"),
            "mlp_only_layers": (None, []),
        },
        also_read=(
            "full_attention_interval",
            "partial_rotary_factor",
            "mamba_ssm_dtype",
            "mtp_num_hidden_layers",
            "mtp_use_dedicated_embeddings",
        ),
        refine=whole_rope,
        carries=(*LINEAR_ATTENTION, "attention_bias"),
        rope_keys=("partial_rotary_factor",),
        ffn_norm=None,
        unused=("mtp.",),
    ),
)
