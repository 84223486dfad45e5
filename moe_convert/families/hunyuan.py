"""Hunyuan dense: Llama's decoder with query and key norms behind the rope."""

from __future__ import annotations

from moe_convert.families.body import DenseFamily, renamed

OWN_CODE = (
    "attention_head_dim", "cla_share_factor", "class_num", "dense_list", "enable_lm_head_fp32",
    "enable_attention_fp32_softmax", "im_end_id", "im_newline_id", "im_start_id", "mask_init_id",
    "org_vocab_size", "pad_id", "pool_type", "text_end_id", "text_start_id",
)  # fmt: skip
"""Attributes for the code beside the published weights, which transformers does not read."""

ROWS = (
    DenseFamily(
        "hunyuan_v1_dense",
        "HunYuanDenseV1ForCausalLM",
        targets=("hunyuan_v1_moe",),
        examples="Hunyuan 0.5B to 7B",
        fixed={"qk_norm": "head_after_rope"},
        only={
            "add_classification_head": (False, None),
            "mlp_bias": (False, None),
            "norm_type": ("rms", "hf_rms", None),
            "position_embedding_xdrope": (False, None),
            "use_cla": (False, None),
            "use_mla": (False, None),
            "use_qk_norm": (True, None),
        },
        also_read=("attention_bias", *OWN_CODE),
        refine=lambda c: {"qkv_bias": c["attention_bias"], "o_bias": c["attention_bias"]},
        carries=("eod_token_id",),
        rope_keys=("alpha",),
        tensors={
            "self_attn.query_layernorm.weight": renamed("self_attn.q_norm.weight"),
            "self_attn.key_layernorm.weight": renamed("self_attn.k_norm.weight"),
        },
    ),
)
