"""Cohere's decoders: attention and FFN read one LayerNorm, interleaved rope, scaled logits."""

from __future__ import annotations

from typing import Any

from moe_convert.families.body import Config, DenseFamily, windows

ONLY = {
    "position_embedding_type": ("rope_gptj", None),
    "rotary_pct": (1.0, None),
    "use_gated_activation": (True, None),
    "use_parallel_block": (True, None),
    "use_qk_norm": (False, None),
}
FIXED = {"block": "parallel", "norm": "layer_nobias", "interleaved_rope": True}
FIELDS = {"norm_eps": "layer_norm_eps"}


def _cohere(config: Config) -> dict[str, Any]:
    bias = config["attention_bias"]
    return {"logits_divisor": 1 / config["logit_scale"], "qkv_bias": bias, "o_bias": bias}


def _cohere2(config: Config) -> dict[str, Any]:
    """Only layers with a window rotate queries and keys."""
    types = config["layer_types"]
    turning = [t == "sliding_attention" and config["sliding_window"] is not None for t in types]
    nope = tuple(layer for layer, turns in enumerate(turning) if not turns)
    return {**_cohere(config), **windows(config), "nope_layers": nope}


ROWS = (
    DenseFamily(
        "cohere",
        "CohereForCausalLM",
        targets=("cohere2_moe",),
        examples="Command R, Aya",
        fields=FIELDS,
        fixed=FIXED,
        only=ONLY,
        also_read=("logit_scale", "attention_bias", "model_max_length"),
        refine=_cohere,
        ffn_norm="input_layernorm.weight",
    ),
    DenseFamily(
        "cohere2",
        "Cohere2ForCausalLM",
        targets=("cohere2_moe",),
        examples="Command R7B, Command A",
        fields=FIELDS,
        fixed=FIXED,
        only=ONLY,
        also_read=(
            "logit_scale",
            "attention_bias",
            "sliding_window",
            "layer_types",
            "sliding_window_pattern",
            "layer_switch",
            "order_of_interleaved_layers",
            "use_embedding_sharing",
            "use_parallel_embedding",
            "cache_implementation",
        ),
        refine=_cohere2,
        ffn_norm="input_layernorm.weight",
    ),
)
