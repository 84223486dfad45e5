"""Llama's decoder with one change each: layers without rope, or a squared ReLU."""

from __future__ import annotations

from typing import Any

from moe_convert.families.body import Config, DenseFamily, FfnNames, windows
from moe_convert.families.olmo import biases


def _smollm3(config: Config) -> dict[str, Any]:
    ropeless = enumerate(config["no_rope_layers"][: config["num_hidden_layers"]])
    return {
        **biases(config),
        **windows(config),
        "nope_layers": tuple(layer for layer, rotates in ropeless if not rotates),
    }


ROWS = (
    DenseFamily(
        "smollm3",
        "SmolLM3ForCausalLM",
        targets=("granitemoe_swa",),
        examples="SmolLM3 3B",
        fields={"mlp_bias": "mlp_bias"},
        also_read=(
            "attention_bias",
            "layer_types",
            "max_window_layers",
            "no_rope_layer_interval",
            "no_rope_layers",
            "sliding_window",
            "use_sliding_window",
        ),
        refine=_smollm3,
    ),
    DenseFamily(
        "arcee",
        "ArceeForCausalLM",
        targets=("mixtral", "granitemoe"),
        examples="AFM 4.5B",
        fields={"mlp_bias": "mlp_bias"},
        fixed={"act": "relu"},
        only={"hidden_act": ("relu2",)},
        also_read=("attention_bias",),
        refine=biases,
        ffn_names=FfnNames(gate="mlp.up_proj.weight"),
    ),
    DenseFamily(
        "iquestcoder",
        "LlamaForCausalLM",
        targets=("mixtral", "glm4_moe"),
        examples="IQuest-Coder V1 40B",
        fields={"mlp_bias": "mlp_bias"},
        only={"clip_qkv": (None,), "use_sliding_window": (None, False)},
        also_read=("attention_bias",),
        refine=biases,
    ),
    DenseFamily(
        "internlm3",
        "LlamaForCausalLM",
        targets=("mixtral", "glm4_moe"),
        examples="InternLM3 8B",
        fields={"mlp_bias": "mlp_bias"},
        also_read=("attention_bias", "bias", "qkv_bias"),
        refine=biases,
    ),
)
