"""StableLM and Nemotron: LayerNorms with bias, rope on a part of each head."""

from __future__ import annotations

from typing import Any

from moe_convert.families.body import Config, DenseFamily, FfnNames, plus_one_as

NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight", "model.norm.weight")


def _nemotron(config: Config) -> dict[str, Any]:
    """Read relu(x)² as relu(x) · x, a gated FFN whose gate and up projections are the same."""
    bias = config["attention_bias"]
    return {"act": "relu", "qkv_bias": bias, "o_bias": bias}


ROWS = (
    DenseFamily(
        "stablelm",
        "StableLmForCausalLM",
        targets=("phimoe",),
        examples="StableLM 2 1.6B, StableLM 3B, Zephyr 3B",
        fields={"norm_eps": "layer_norm_eps", "qkv_bias": "use_qkv_bias"},
        fixed={"norm": "layer"},
        only={"qk_layernorm": (False,), "use_parallel_residual": (False,)},
        also_read=("partial_rotary_factor", "hidden_dropout"),
        rope_keys=("partial_rotary_factor",),
    ),
    DenseFamily(
        "nemotron",
        "NemotronForCausalLM",
        targets=("phimoe",),
        examples="Nemotron-4, Minitron 4B and 8B, Nemotron-Mini",
        fields={"norm_eps": "norm_eps", "mlp_bias": "mlp_bias"},
        fixed={"norm": "layer"},
        only={"hidden_act": ("relu2",)},
        also_read=("partial_rotary_factor", "attention_bias"),
        rope_keys=("partial_rotary_factor",),
        refine=_nemotron,
        tensors={name: plus_one_as(name) for name in NORMS},
        ffn_names=FfnNames("mlp.up_proj.weight", "mlp.up_proj.weight"),
    ),
)
