"""Youtu: multi-head latent attention, as DeepSeek-V3 has it."""

from __future__ import annotations

from moe_convert.families.body import DenseFamily

LATENT_ATTENTION = (
    "q_lora_rank",
    "kv_lora_rank",
    "qk_rope_head_dim",
    "qk_nope_head_dim",
    "v_head_dim",
    "rope_interleave",
    "attention_bias",
)

ROWS = (
    DenseFamily(
        "youtu",
        "YoutuForCausalLM",
        targets=("deepseek_v3",),
        examples="Youtu-LLM 2B",
        fixed={"native": "mla"},
        also_read=("qk_head_dim", "embedding_initializer_range"),
        refine=lambda c: {"rope": dict(c["rope_parameters"]), "partial_rotary": 1.0},
        carries=LATENT_ATTENTION,
    ),
)
