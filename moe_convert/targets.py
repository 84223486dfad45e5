"""MoE targets: the stock architectures, what each can hold, and its names on disk.

A row is data: which Body features have a place in its config, how its router weighs experts, how
its expert tensors are called on disk (the hub's names, which every engine reads) and what serving
engines do differently with the same files.

D hidden size · E routed experts · N neurons per expert
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from moe_convert.families import FEATURES, SIZES, Body, DenseFamily, layer_name
from moe_convert.ffn import Experts, Ffn, Weight


@dataclass(frozen=True)
class MoeShape:
    """How many experts of which size, and in which layers.

    `routed_scale` multiplies the combined output of the routed experts where a target has a config
    key for it.
    """

    num_experts: int
    top_k: int
    expert_size: int
    shared_size: int
    dense_size: int
    num_layers: int
    moe_layers: tuple[int, ...]
    routed_scale: float = 1.0

    @property
    def dense_layers(self) -> tuple[int, ...]:
        """Layers that keep their dense FFN."""
        return tuple(n for n in range(self.num_layers) if n not in self.moe_layers)

    @property
    def num_shared(self) -> int:
        """Shared width in units of the expert size."""
        return self.shared_size // self.expert_size


@dataclass(frozen=True)
class Trap:
    """What an engine does differently, and for which bodies and shapes."""

    text: str
    when: Callable[[Body, MoeShape], bool] = lambda body, shape: True


@dataclass(frozen=True)
class Engine:
    """What is known of one engine: whether it registers the architecture, and its traps."""

    name: str
    registered: bool
    traps: tuple[Trap, ...] = ()

    def notes(self, body: Body, shape: MoeShape) -> tuple[str, ...]:
        """Return the traps that this body and shape fall into."""
        if not self.registered:
            return ("does not register this architecture",)
        return tuple(trap.text for trap in self.traps if trap.when(body, shape))


@dataclass(frozen=True)
class ExpertNames:
    """Tensor names inside a layer; `{expert}` stands for the routed expert's number."""

    router: str = "mlp.gate.weight"
    gate: str = "mlp.experts.{expert}.gate_proj.weight"
    up: str = "mlp.experts.{expert}.up_proj.weight"
    down: str = "mlp.experts.{expert}.down_proj.weight"
    shared: str | None = None
    shared_gate: str | None = None
    selection_bias: str | None = None


@dataclass(frozen=True)
class MoeTarget:
    """One stock MoE model type of transformers.

    `holds` maps Body features to config keys; `shape_keys` does so for `MoeShape`; `constants` are
    config values that never change; `limits` name further bodies it cannot hold, with the reason.
    `weights_sum` is True when the weights of the selected experts add up to `routed_scale` whatever
    the router says, which makes clones exact.
    """

    model_type: str
    architecture: str
    names: ExpertNames
    shape_keys: Mapping[str, str]
    engines: tuple[Engine, ...]
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    weights_sum: bool = True
    scale_key: str | None = None
    shared: Literal["none", "free", "units"] = "none"
    shared_weight: float = 1.0
    dense_layers: Literal["none", "prefix", "any"] = "none"
    holds: Mapping[str, str] = field(default_factory=dict)
    always: Mapping[str, Any] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    computed: Callable[[Body, MoeShape], Mapping[str, Any]] = lambda body, shape: {}
    limits: tuple[Callable[[Body], str | None], ...] = ()
    router_module: str = "mlp.gate"

    def misfits(self, body: Body) -> list[str]:
        """Return why this target cannot hold the body; empty when it can."""
        reasons = []
        defaults = {f.name: f.default for f in fields(Body)}
        for feature in FEATURES:
            value = getattr(body, feature)
            if feature in self.always:
                if value != self.always[feature]:
                    reasons.append(f"it always has {feature}={self.always[feature]!r}")
            elif feature not in self.holds and value != defaults[feature]:
                reasons.append(f"it has no place for {feature}={value!r}")
        return reasons + [reason for limit in self.limits if (reason := limit(body))]

    def config(self, body: Body, shape: MoeShape, untie: bool) -> dict[str, Any]:
        """Return config.json's architecture part, in the keys of transformers 5."""
        sizes = {**SIZES, "head_dim": "head_dim", **self.holds}
        config = {key: _plain(getattr(body, name)) for name, key in sizes.items()}
        config |= {key: getattr(shape, name) for name, key in self.shape_keys.items()}
        config |= dict(body.carried) | dict(self.constants)
        config["rope_parameters"] = dict(body.rope)
        config["tie_word_embeddings"] = body.tied and not untie
        if self.scale_key:
            config[self.scale_key] = shape.routed_scale
        return config | dict(self.computed(body, shape))

    def tensors(
        self, layer: int, experts: Experts, router_ED: Weight
    ) -> Iterator[tuple[str, Weight]]:
        """Yield name and weight of everything that replaces one dense FFN."""
        names = self.names
        yield layer_name(layer, names.router), router_ED
        if names.selection_bias:
            bias_E = Weight.filled((len(experts.routed),), 0.0, "F32")
            yield layer_name(layer, names.selection_bias), bias_E
        for attribute in ("gate", "up", "down"):
            template = layer_name(layer, getattr(names, attribute))
            for number, expert in enumerate(experts.routed):
                yield template.format(expert=number), _part(expert, attribute)
        if names.shared and experts.shared:
            for attribute in ("gate", "up", "down"):
                name = layer_name(layer, f"{names.shared}.{attribute}_proj.weight")
                yield name, _part(experts.shared, attribute)
            if names.shared_gate:
                gate_1D = Weight.filled((1, router_ED.shape[1]), 0.0, router_ED.dtype)
                yield layer_name(layer, names.shared_gate), gate_1D

    def dense_tensors(self, layer: int, ffn: Ffn) -> Iterator[tuple[str, Weight]]:
        """Yield name and weight of an FFN that stays dense."""
        for attribute in ("gate", "up", "down"):
            yield layer_name(layer, f"mlp.{attribute}_proj.weight"), _part(ffn, attribute)

    def allows_dense(self, shape: MoeShape) -> bool:
        """Whether the layers that stay dense have a place in the config."""
        dense = shape.dense_layers
        if self.dense_layers == "prefix":
            return dense == tuple(range(len(dense)))
        return not dense or self.dense_layers == "any"


def _part(ffn: Ffn, attribute: str) -> Weight:
    return {"gate": ffn.gate_FD, "up": ffn.up_FD, "down": ffn.down_DF}[attribute]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _odd_head_dim(body: Body, shape: MoeShape) -> bool:
    return not body.plain_head_dim


def _not_silu(body: Body, shape: MoeShape) -> bool:
    return body.act != "silu"


def _tied(body: Body, shape: MoeShape) -> bool:
    return body.tied


HEAD_DIM = "takes the head size for hidden size / heads, and this one differs"
SILU = "runs SiLU whatever hidden_act says"
TRANSFORMERS = Engine("transformers", True)


def _qwen2_moe_windows(body: Body, shape: MoeShape) -> dict[str, Any]:
    kind = "full_attention" if body.sliding_window is None else "sliding_attention"
    return {
        "use_sliding_window": body.sliding_window is not None,
        "layer_types": list(body.layer_types or [kind] * body.num_layers),
        "mlp_only_layers": list(shape.dense_layers),
    }


def _qwen3_moe_windows(body: Body, shape: MoeShape) -> dict[str, Any]:
    return {
        "use_sliding_window": body.sliding_window is not None,
        "mlp_only_layers": list(shape.dense_layers),
    }


def _attention_bias(name: str) -> Callable[[Body, MoeShape], dict[str, Any]]:
    def computed(body: Body, shape: MoeShape) -> dict[str, Any]:
        return {name: body.qkv_bias}

    return computed


def _glm4_moe(body: Body, shape: MoeShape) -> dict[str, Any]:
    rope = {**body.rope, "partial_rotary_factor": body.partial_rotary}
    return {
        "rope_parameters": rope,
        "partial_rotary_factor": body.partial_rotary,
        "use_qk_norm": body.qk_norm == "head",
        "first_k_dense_replace": len(shape.dense_layers),
    }


def _same_bias(body: Body) -> str | None:
    if body.qkv_bias != body.o_bias:
        return (
            f"it has one switch for all biases, and qkv_bias={body.qkv_bias}, o_bias={body.o_bias}"
        )
    return None


def _no_o_bias(body: Body) -> str | None:
    return "it has no bias on o_proj" if body.o_bias else None


def _head_norm_only(body: Body) -> str | None:
    return (
        None if body.qk_norm in {None, "head"} else f"it has no place for qk_norm={body.qk_norm!r}"
    )


TARGETS = {
    row.model_type: row
    for row in (
        MoeTarget(
            "mixtral",
            "MixtralForCausalLM",
            names=ExpertNames(
                router="block_sparse_moe.gate.weight",
                gate="block_sparse_moe.experts.{expert}.w1.weight",
                up="block_sparse_moe.experts.{expert}.w3.weight",
                down="block_sparse_moe.experts.{expert}.w2.weight",
            ),
            shape_keys={
                "num_experts": "num_local_experts",
                "top_k": "num_experts_per_tok",
                "expert_size": "intermediate_size",
            },
            holds={"sliding_window": "sliding_window"},
            constants={"output_router_logits": False, "router_jitter_noise": 0.0},
            engines=(
                TRANSFORMERS,
                Engine("vLLM", True, (Trap(SILU, _not_silu),)),
                Engine("SGLang", True, (Trap(HEAD_DIM, _odd_head_dim),)),
                Engine(
                    "llama.cpp",
                    True,
                    (
                        Trap(SILU, _not_silu),
                        Trap("ignores the sliding window", lambda b, s: b.sliding_window is not None),
                    ),
                ),
            ),
        ),
        MoeTarget(
            "qwen2_moe",
            "Qwen2MoeForCausalLM",
            names=ExpertNames(
                shared="mlp.shared_expert", shared_gate="mlp.shared_expert_gate.weight"
            ),
            shape_keys={
                "num_experts": "num_experts",
                "top_k": "num_experts_per_tok",
                "expert_size": "moe_intermediate_size",
                "shared_size": "shared_expert_intermediate_size",
            },
            shared="free",
            shared_weight=0.5,
            dense_layers="any",
            holds={
                "qkv_bias": "qkv_bias",
                "sliding_window": "sliding_window",
                "layer_types": "layer_types",
            },
            constants={
                "norm_topk_prob": True,
                "decoder_sparse_step": 1,
                "output_router_logits": False,
            },
            computed=_qwen2_moe_windows,
            limits=(_no_o_bias,),
            engines=(
                TRANSFORMERS,
                Engine(
                    "vLLM",
                    True,
                    (
                        Trap("expects q, k and v biases, which these files lack",
                             lambda b, s: not b.qkv_bias),
                        Trap(HEAD_DIM, _odd_head_dim),
                        Trap("ignores the sliding window", lambda b, s: b.sliding_window is not None),
                    ),
                ),
                Engine("SGLang", True, (Trap(HEAD_DIM, _odd_head_dim),)),
                Engine(
                    "llama.cpp",
                    True,
                    (
                        Trap("ignores norm_topk_prob, so its output differs"),
                        Trap("needs shared-expert tensors", lambda b, s: s.shared_size == 0),
                        Trap(HEAD_DIM, _odd_head_dim),
                    ),
                ),
            ),
        ),
        MoeTarget(
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            names=ExpertNames(),
            shape_keys={
                "num_experts": "num_experts",
                "top_k": "num_experts_per_tok",
                "expert_size": "moe_intermediate_size",
            },
            dense_layers="any",
            holds={"qkv_bias": "attention_bias", "o_bias": "attention_bias",
                   "sliding_window": "sliding_window"},
            always={"qk_norm": "head"},
            constants={
                "norm_topk_prob": True,
                "decoder_sparse_step": 1,
                "output_router_logits": False,
            },
            computed=_qwen3_moe_windows,
            limits=(_same_bias,),
            engines=(
                TRANSFORMERS,
                Engine("vLLM", True, (Trap("drops the bias of o_proj", lambda b, s: b.o_bias),)),
                Engine("SGLang", True),
                Engine("llama.cpp", True),
            ),
        ),
        MoeTarget(
            "glm4_moe",
            "Glm4MoeForCausalLM",
            names=ExpertNames(
                shared="mlp.shared_experts", selection_bias="mlp.gate.e_score_correction_bias"
            ),
            shape_keys={
                "num_experts": "n_routed_experts",
                "top_k": "num_experts_per_tok",
                "expert_size": "moe_intermediate_size",
                "num_shared": "n_shared_experts",
            },
            scoring="sigmoid",
            scale_key="routed_scaling_factor",
            shared="units",
            dense_layers="prefix",
            holds={"qkv_bias": "attention_bias", "qk_norm": "use_qk_norm",
                   "partial_rotary": "partial_rotary_factor"},
            constants={"norm_topk_prob": True, "n_group": 1, "topk_group": 1, "num_mtp_layers": 0,
                       "output_router_logits": False},
            computed=_glm4_moe,
            limits=(_no_o_bias, _head_norm_only),
            engines=(
                TRANSFORMERS,
                Engine("vLLM", True, (Trap(SILU, _not_silu),)),
                Engine("SGLang", True, (Trap(SILU, _not_silu),)),
                Engine(
                    "llama.cpp",
                    True,
                    (
                        Trap("always adds a shared expert: use --shared-experts 1 or more",
                             lambda b, s: s.shared_size == 0),
                    ),
                ),
            ),
        ),
    )
}  # fmt: skip
"""Every target, by model type."""

LEGACY_KEYS = {"num_local_experts": "num_experts"}
"""Keys of transformers 5 and the older names that some tools still read."""


def with_legacy_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Add the keys of older releases: both spellings load alike."""
    result = dict(config)
    rope = dict(result.get("rope_parameters") or {})
    if "rope_theta" in rope:
        result["rope_theta"] = rope.pop("rope_theta")
        kind = rope.get("rope_type", "default")
        rope.pop("partial_rotary_factor", None)
        result["rope_scaling"] = None if kind == "default" else {**rope, "type": kind}
    for key, old in LEGACY_KEYS.items():
        if key in result:
            result[old] = result[key]
    return result


def candidates(family: DenseFamily, body: Body) -> dict[str, list[str]]:
    """Return each target proved for this family with the reasons why it does not fit this body."""
    return {name: TARGETS[name].misfits(body) for name in family.targets}
