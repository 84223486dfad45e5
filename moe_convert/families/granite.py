"""Granite and HyperCLOVA X: Llama's decoder with four multipliers, some with other mixers."""

from __future__ import annotations

from typing import Any

from moe_convert.families.body import Config, DenseFamily, FfnNames

MULTIPLIERS = (
    "attention_bias",
    "attention_multiplier",
    "embedding_multiplier",
    "logits_scaling",
    "residual_multiplier",
)
MAMBA = (
    "layer_types", "mamba_n_heads", "mamba_n_groups", "mamba_d_state", "mamba_d_head",
    "mamba_d_conv", "mamba_expand", "mamba_chunk_size", "mamba_conv_bias", "mamba_proj_bias",
    "time_step_limit",
)  # fmt: skip
FUSED_SHARED = FfnNames(
    "shared_mlp.input_linear.weight",
    "shared_mlp.input_linear.weight",
    "shared_mlp.output_linear.weight",
    fused=True,
)


def multipliers(config: Config) -> dict[str, Any]:
    """Return the multipliers; an attention multiplier that changes nothing is left out."""
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    attention, bias = config["attention_multiplier"], config["attention_bias"]
    return {
        "attention_multiplier": None if attention == head_dim**-0.5 else attention,
        "embedding_multiplier": config["embedding_multiplier"],
        "residual_multiplier": config["residual_multiplier"],
        "logits_divisor": config["logits_scaling"],
        "qkv_bias": bias,
        "o_bias": bias,
    }


def _hyperclovax(config: Config) -> dict[str, Any]:
    """Turn the factor of the logits into the divisor that Granite has."""
    return {**multipliers(config), "logits_divisor": 1 / config["logits_scaling"]}


def _granite4(config: Config) -> dict[str, Any]:
    """Return the multipliers and which layers have no rope; Mamba layers go to the sibling only."""
    mixed = "linear_attention" in config["layer_types"]
    no_rope = config["position_embedding_type"] != "rope"
    limit = config["time_step_limit"]
    unlimited = limit is None or tuple(limit) == (0.0, float("inf"))
    kept = [name for name in MAMBA if name != "time_step_limit" or not unlimited]
    return {
        **multipliers(config),
        "nope_layers": tuple(range(config["num_hidden_layers"])) if no_rope else (),
        "native": "mamba" if mixed else None,
        "carried": {name: config[name] for name in kept} if mixed else {},
    }


ROWS = (
    DenseFamily(
        "granite",
        "GraniteForCausalLM",
        targets=("granitemoe", "granitemoeshared", "granitemoehybrid"),
        examples="Granite 3.0 to 3.3, 2B and 8B",
        fields={"mlp_bias": "mlp_bias"},
        also_read=MULTIPLIERS,
        refine=multipliers,
    ),
    DenseFamily(
        "hyperclovax",
        "HyperCLOVAXForCausalLM",
        targets=("granitemoe", "granitemoeshared"),
        examples="HyperCLOVA X SEED without post norms",
        fields={"mlp_bias": "mlp_bias"},
        only={"use_post_norm": (False,)},
        also_read=MULTIPLIERS,
        refine=_hyperclovax,
    ),
    DenseFamily(
        "granitemoehybrid",
        "GraniteMoeHybridForCausalLM",
        targets=("granitemoehybrid", "granitemoe", "granitemoeshared"),
        examples="Granite 4.0 350M, 1B, micro and their hybrids, which have no experts",
        fields={"ffn_size": "shared_intermediate_size"},
        only={"num_local_experts": (0,), "normalization_function": (None, "rmsnorm")},
        also_read=(
            *MULTIPLIERS,
            *MAMBA,
            "position_embedding_type",
            "intermediate_size",
            "num_experts_per_tok",
            "output_router_logits",
            "router_aux_loss_coef",
            "init_method",
            "layers_block_type",
        ),
        refine=_granite4,
        ffn_names=FUSED_SHARED,
        ffn_module="shared_mlp",
    ),
    DenseFamily(
        "granite_swa",
        "GraniteSWAForCausalLM",
        targets=("granitemoe_swa",),
        examples="Granite Swash",
        fields={"mlp_bias": "mlp_bias"},
        fixed={"native": "granite_swa"},
        also_read=MULTIPLIERS,
        refine=multipliers,
        carries=("layer_rope_theta", "layer_types", "sliding_window"),
    ),
)
