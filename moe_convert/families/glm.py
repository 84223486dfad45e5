"""GLM-4 9B, the pre-norm one: interleaved rope on half of each head, gate and up in one matrix."""

from __future__ import annotations

from moe_convert.families.body import DenseFamily, FfnNames

ROWS = (
    DenseFamily(
        "glm",
        "GlmForCausalLM",
        targets=("glm4_moe",),
        examples="GLM-4 9B Chat, GLM-Edge",
        fields={"qkv_bias": "attention_bias"},
        fixed={"interleaved_rope": True},
        also_read=("partial_rotary_factor",),
        rope_keys=("partial_rotary_factor",),
        ffn_names=FfnNames("mlp.gate_up_proj.weight", "mlp.gate_up_proj.weight", fused=True),
    ),
)
