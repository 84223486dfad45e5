"""Families with Llama's decoder: pre-norm, RMSNorm, half-split rope, gated FFN."""

from __future__ import annotations

from moe_convert.families.body import DenseFamily, windows

QWEN_WINDOW = ("use_sliding_window", "max_window_layers", "layer_types", "sliding_window")

ROWS = (
    DenseFamily(
        "llama",
        "LlamaForCausalLM",
        targets=("mixtral", "glm4_moe", "qwen2_moe", "solar_open", "granitemoe"),
        examples="Llama 2 and 3, TinyLlama, SmolLM2, Falcon3, Yi",
        fields={"mlp_bias": "mlp_bias"},
        only={"rope_interleaved": (False, None)},
        also_read=("attention_bias", "is_llama_config"),
        refine=lambda c: {"qkv_bias": c["attention_bias"], "o_bias": c["attention_bias"]},
    ),
    DenseFamily(
        "mistral",
        "MistralForCausalLM",
        targets=("mixtral", "glm4_moe", "qwen2_moe"),
        examples="Mistral 7B, Nemo",
        fields={"sliding_window": "sliding_window"},
    ),
    DenseFamily(
        "qwen2",
        "Qwen2ForCausalLM",
        targets=("qwen2_moe", "glm4_moe"),
        examples="Qwen2, Qwen2.5",
        fixed={"qkv_bias": True},
        also_read=QWEN_WINDOW,
        refine=windows,
    ),
    DenseFamily(
        "qwen3",
        "Qwen3ForCausalLM",
        targets=("qwen3_moe", "glm4_moe", "mellum", "dots1", "hy_v3"),
        examples="Qwen3 0.6B to 32B",
        fixed={"qk_norm": "head"},
        also_read=(*QWEN_WINDOW, "attention_bias"),
        refine=lambda c: {
            **windows(c),
            "qkv_bias": c["attention_bias"],
            "o_bias": c["attention_bias"],
        },
    ),
)
