"""LFM2: short convolutions and attention in turns; only its own MoE sibling has them."""

from __future__ import annotations

from typing import Any

from moe_convert.families.body import Config, DenseFamily, FfnNames

IN_OTHER_KEYS = (
    "tie_embedding", "block_ff_dim", "full_attn_idxs", "block_dim", "block_norm_eps", "conv_dim",
    "conv_dim_out", "num_heads", "theta", "block_use_swiglu", "block_use_xavier_init",
    "block_mlp_init_scale", "block_out_init_scale", "conv_use_xavier_init", "use_pos_enc",
)  # fmt: skip
"""Older spellings that transformers resolves, and attributes of the training code only."""


def _mixers(config: Config) -> dict[str, Any]:
    return {"rope": dict(config["rope_parameters"]), "ffn_size": _ffn_size(config)}


def _ffn_size(config: Config) -> int:
    """Return the width that the model class makes of `intermediate_size`: 2/3 of it, rounded up."""
    size: int = config["intermediate_size"]
    if not config["block_auto_adjust_ff_dim"]:
        return size
    size = int(2 * size / 3)
    if config["block_ffn_dim_multiplier"] is None:
        return size
    multiple: int = config["block_multiple_of"]
    return -(-int(config["block_ffn_dim_multiplier"] * size) // multiple) * multiple


ROWS = (
    DenseFamily(
        "lfm2",
        "Lfm2ForCausalLM",
        targets=("lfm2_moe",),
        examples="LFM2 350M to 2.6B",
        fields={"norm_eps": "norm_eps"},
        fixed={"native": "lfm2", "act": "silu"},
        also_read=(
            *IN_OTHER_KEYS,
            "block_auto_adjust_ff_dim",
            "block_ffn_dim_multiplier",
            "block_multiple_of",
        ),
        refine=_mixers,
        carries=("layer_types", "conv_bias", "conv_L_cache"),
        ffn_names=FfnNames(
            "feed_forward.w1.weight", "feed_forward.w3.weight", "feed_forward.w2.weight"
        ),
        ffn_norm="ffn_norm.weight",
        ffn_module="feed_forward",
    ),
)
