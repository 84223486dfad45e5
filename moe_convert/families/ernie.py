"""ERNIE 4.5 and Helium: Llama's decoder with interleaved rope."""

from __future__ import annotations

from typing import Any

from moe_convert.families.body import Config, DenseFamily


def _ernie(config: Config) -> dict[str, Any]:
    """Read the one switch for all biases; there is no dropout to configure."""
    biases = dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias"), bool(config["use_bias"]))
    return {**biases, "carried": {"attention_dropout": 0.0}}


ROWS = (
    DenseFamily(
        "ernie4_5",
        "Ernie4_5ForCausalLM",
        targets=("ernie4_5_moe", "mixtral", "glm4_moe"),
        examples="ERNIE 4.5 0.3B",
        fixed={"interleaved_rope": True},
        also_read=("use_bias",),
        refine=_ernie,
    ),
    DenseFamily(
        "helium",
        "HeliumForCausalLM",
        targets=("mixtral", "glm4_moe"),
        examples="Helium 1 2B",
        fields={"qkv_bias": "attention_bias", "mlp_bias": "mlp_bias"},
        fixed={"interleaved_rope": True},
    ),
)
