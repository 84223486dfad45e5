"""Llama's decoder with windows of its own: Ministral, Ministral 3, Code World Model, Seed-OSS."""

from __future__ import annotations

from typing import Any

from moe_convert.families.body import Config, DenseFamily, windows


def _ministral3(config: Config) -> dict[str, Any]:
    """Leave out the query scale, which is one below the original length and grows beyond it."""
    rope = dict(config["rope_parameters"])
    grows = rope.pop("llama_4_scaling_beta", None)
    rope.pop("max_position_embeddings", None)
    limit = rope["original_max_position_embeddings"] if grows else None
    return {"rope": rope, "exact_below": limit}


ROWS = (
    DenseFamily(
        "ministral",
        "MinistralForCausalLM",
        targets=("mixtral", "qwen2_moe"),
        examples="Ministral 8B",
        also_read=("sliding_window", "layer_types"),
        refine=windows,
    ),
    DenseFamily(
        "ministral3",
        "Ministral3ForCausalLM",
        targets=("mixtral", "glm4_moe"),
        examples="text checkpoints of Ministral 3, up to their original context length",
        fields={"sliding_window": "sliding_window"},
        refine=_ministral3,
        rope_keys=("llama_4_scaling_beta", "max_position_embeddings"),
        limit="up to original_max_position_embeddings (target.max_positions cuts a longer context)",
    ),
    DenseFamily(
        "cwm",
        "CwmForCausalLM",
        targets=("qwen2_moe",),
        examples="Code World Model 32B",
        fields={"mlp_bias": "mlp_bias"},
        only={"attention_bias": (False, None)},
        also_read=("sliding_window", "layer_types"),
        refine=windows,
    ),
    DenseFamily(
        "seed_oss",
        "SeedOssForCausalLM",
        targets=("qwen2_moe", "glm4_moe"),
        examples="Seed-OSS 36B",
        fields={
            "qkv_bias": "attention_bias",
            "o_bias": "attention_out_bias",
            "mlp_bias": "mlp_bias",
        },
        also_read=("residual_dropout",),
    ),
)
