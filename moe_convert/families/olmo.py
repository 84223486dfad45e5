"""OLMo 1 to 3: no norm weights and clipped q, k, v first, norms on the outputs only later."""

from __future__ import annotations

from typing import Any

from moe_convert.families.body import Config, DenseFamily

TORCH_NORM_EPS = 1e-5


def biases(config: Config) -> dict[str, Any]:
    """Return the one switch for the biases of all attention projections."""
    return {"qkv_bias": config["attention_bias"], "o_bias": config["attention_bias"]}


def _olmo3(config: Config) -> dict[str, Any]:
    """Describe the model up to its window's length, where the window cuts nothing off."""
    ropes, types = config["rope_parameters"], set(config["layer_types"])
    full = ropes["full_attention" if "full_attention" in types else "sliding_attention"]
    windowed = "sliding_attention" in types and config["sliding_window"] is not None
    local = ropes["sliding_attention"] if "sliding_attention" in types else full
    return {
        **biases(config),
        "rope": dict(full),
        "local_rope": dict(local) if local != full else None,
        "exact_below": config["sliding_window"] if windowed else None,
    }


ROWS = (
    DenseFamily(
        "olmo",
        "OlmoForCausalLM",
        targets=("dbrx",),
        examples="OLMo 1B and 7B",
        fields={"clip_qkv": "clip_qkv"},
        fixed={"norm": "layer_nobias", "norm_eps": TORCH_NORM_EPS},
        also_read=("attention_bias",),
        refine=biases,
        implied={
            "input_layernorm.weight": 1.0,
            "post_attention_layernorm.weight": 1.0,
            "model.norm.weight": 1.0,
        },
        ffn_norm=None,
    ),
    DenseFamily(
        "olmo2",
        "Olmo2ForCausalLM",
        targets=("flex_olmo",),
        examples="OLMo 2 1B to 32B",
        fixed={"block": "post", "qk_norm": "full"},
        also_read=("attention_bias",),
        refine=biases,
        ffn_norm=None,
    ),
    DenseFamily(
        "olmo3",
        "Olmo3ForCausalLM",
        targets=("flex_olmo",),
        examples="Olmo 3 7B and 32B, up to the length of their window",
        fixed={"block": "post", "qk_norm": "full"},
        also_read=("attention_bias", "layer_types", "sliding_window"),
        refine=_olmo3,
        limit="up to the sliding window (target.max_positions cuts a longer context)",
        ffn_norm=None,
    ),
)
