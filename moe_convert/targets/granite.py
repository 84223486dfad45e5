"""Granite's MoE types: the best logits are chosen before the softmax, experts lie in one tensor.

Every multiplier of a Granite body has a key here, and so have the biases of the attention.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from moe_convert.families.body import Body
from moe_convert.ffn import Ffn, Weight
from moe_convert.targets.base import (
    HEAD_DIM,
    SILU,
    TRANSFORMERS,
    Engine,
    MoeShape,
    MoeTarget,
    Named,
    Trap,
    fused_projections,
    not_silu,
    odd_head_dim,
    same_bias,
    stacked,
    window_types,
)

MOE = "block_sparse_moe"
SHARED_MLP = fused_projections("shared_mlp.input_linear.weight", "shared_mlp.output_linear.weight")
NO_BIAS = "drops the biases of the attention"
LOWEST_SINK = {"F16": -6e4}
"""Sinks that no softmax notices; fp16 does not reach as low as -1e30."""


def biased(body: Body, shape: MoeShape) -> bool:
    """Whether the attention has biases."""
    return body.qkv_bias or body.o_bias


def if_any(write: Callable[[Ffn], Named]) -> Callable[[Ffn], Named]:
    """Store a shared expert only where it has neurons: without, the module does not exist."""
    return lambda ffn: write(ffn) if ffn.num_neurons else iter(())


def attention_scale(body: Body, shape: MoeShape) -> dict[str, Any]:
    """Write the usual scale of the attention out: the default of Granite is one."""
    return {"attention_multiplier": body.attention_multiplier or body.head_dim**-0.5}


def _hybrid(body: Body, shape: MoeShape) -> dict[str, Any]:
    types = body.carried.get("layer_types", ["full_attention"] * body.num_layers)
    rope = None if body.nope_layers else "rope"
    return {
        **attention_scale(body, shape),
        "layer_types": types,
        "position_embedding_type": rope,
    }


def _rope_everywhere_or_nowhere(body: Body) -> str | None:
    if len(body.nope_layers) in {0, body.num_layers}:
        return None
    return f"it has rope in every layer or in none, and layers {list(body.nope_layers)} have none"


def _mamba_or_attention(body: Body) -> str | None:
    if body.native in {None, "mamba"}:
        return None
    return f"it has no place for native={body.native!r}"


def _swa(body: Body, shape: MoeShape) -> dict[str, Any]:
    """Write window and base frequency of every layer; zero stands for no rope."""
    if body.native is not None:
        return attention_scale(body, shape)
    theta = body.rope["rope_theta"]
    thetas = [0.0 if n in body.nope_layers else theta for n in range(body.num_layers)]
    return {
        **attention_scale(body, shape),
        "layer_types": window_types(body),
        "layer_rope_theta": thetas,
        "sliding_window": body.sliding_window or body.max_positions,
    }


def _own_sinks(body: Body) -> str | None:
    if body.native in {None, "granite_swa"}:
        return None
    return f"it has no place for native={body.native!r}"


def with_sinks(weight: Weight, body: Body) -> Mapping[str, Weight]:
    """Keep o_proj; a body without attention sinks gets some that draw nothing."""
    named = {"self_attn.o_proj.weight": weight}
    if body.native is None:
        value = LOWEST_SINK.get(weight.dtype, -1e30)
        named["self_attn.sinks"] = Weight.filled((body.num_heads,), value, weight.dtype)
    return named


NARROW = (
    Trap(NO_BIAS, biased, "there are any"),
    Trap(HEAD_DIM, odd_head_dim),
    Trap(SILU, not_silu),
)
ENGINES = (
    TRANSFORMERS,
    Engine("vLLM", True, NARROW),
    Engine(
        "SGLang",
        True,
        (
            Trap(NO_BIAS, biased, "there are any"),
            Trap(HEAD_DIM, odd_head_dim),
            Trap("refuses all but SiLU", not_silu),
        ),
    ),
    Engine("llama.cpp", True, (Trap(HEAD_DIM, odd_head_dim), Trap(SILU, not_silu))),
)
GRANITEMOE = MoeTarget(
    "granitemoe",
    "GraniteMoeForCausalLM",
    router=f"{MOE}.router.layer.weight",
    router_module=f"{MOE}.router",
    routed=stacked(f"{MOE}.input_linear.weight", f"{MOE}.output_linear.weight"),
    routed_marks=(f"{MOE}.input_linear", f"{MOE}.output_linear"),
    shape_keys={
        "num_experts": "num_local_experts",
        "top_k": "num_experts_per_tok",
        "expert_size": "intermediate_size",
    },
    holds={
        "attention_multiplier": "attention_multiplier",
        "embedding_multiplier": "embedding_multiplier",
        "residual_multiplier": "residual_multiplier",
        "logits_divisor": "logits_scaling",
        "qkv_bias": "attention_bias",
        "o_bias": "attention_bias",
    },
    constants={"output_router_logits": False},
    computed=attention_scale,
    limits=(same_bias,),
    engines=ENGINES,
)
SHARED = replace(
    GRANITEMOE,
    model_type="granitemoeshared",
    architecture="GraniteMoeSharedForCausalLM",
    shape_keys={**GRANITEMOE.shape_keys, "shared_size": "shared_intermediate_size"},
    shared="free",
    shared_as=if_any(SHARED_MLP),
)
ROWS = (
    GRANITEMOE,
    SHARED,
    replace(
        SHARED,
        model_type="granitemoehybrid",
        architecture="GraniteMoeHybridForCausalLM",
        shared_as=SHARED_MLP,
        absorbs=frozenset({"native", "nope_layers"}),
        computed=_hybrid,
        limits=(same_bias, _rope_everywhere_or_nowhere, _mamba_or_attention),
        engines=(
            TRANSFORMERS,
            Engine("vLLM", True, (Trap(HEAD_DIM, odd_head_dim),)),
            Engine("SGLang", True),
            Engine("llama.cpp", True, (Trap("refuses all but SiLU", not_silu),)),
        ),
    ),
    replace(
        SHARED,
        model_type="granitemoe_swa",
        architecture="GraniteMoeSWAForCausalLM",
        router=f"{MOE}.router.weight",
        routed=stacked(f"{MOE}.experts.gate_up_proj", f"{MOE}.experts.down_proj"),
        routed_marks=(f"{MOE}.experts.",),
        absorbs=frozenset({"native", "nope_layers", "sliding_window", "layer_types"}),
        computed=_swa,
        places={"self_attn.o_proj.weight": with_sinks},
        limits=(same_bias, _own_sinks),
        engines=(
            TRANSFORMERS,
            Engine("vLLM", True, NARROW),
            Engine("SGLang", True, NARROW),
            Engine("llama.cpp", True, (Trap(SILU, not_silu),)),
        ),
    ),
)
