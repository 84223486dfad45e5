"""What an MoE target row is: what the architecture can hold, and its names on disk.

D hidden size · E routed experts · N neurons per expert
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from moe_convert.families.body import FEATURES, SIZES, Body, Rule, layer_name, split_name
from moe_convert.ffn import Experts, Ffn, Weight, concatenated, stack
from moe_convert.transforms import half_split

EMBEDDING = "model.embed_tokens.weight"
UNREGISTERED = "does not register this architecture"
FOLDED = frozenset({"embedding_multiplier", "interleaved_rope", "exact_below"})
"""Features that need no place in a config: tensors absorb them, or a limit speaks of them."""


@dataclass(frozen=True)
class MoeShape:
    """How many experts of which size, and in which layers.

    `routed_scale` multiplies the combined output of the routed experts where a target has a config
    key for it. With groups, a token uses experts of its `top_groups` best of `num_groups` only.

    The last `null_experts` of the `num_experts` are of zeros: to be chosen in the place of others,
    so that a token uses between `top_k` less these and `top_k` of the rest, `mean_k` on average.
    """

    num_experts: int
    top_k: int
    expert_size: int
    shared_size: int
    dense_size: int
    num_layers: int
    moe_layers: tuple[int, ...]
    routed_scale: float = 1.0
    num_groups: int = 1
    top_groups: int = 1
    null_experts: int = 0
    mean_k: int | None = None

    @property
    def without_nulls(self) -> MoeShape:
        """The shape as if there were no experts of zeros."""
        return replace(self, num_experts=self.num_experts - self.null_experts, null_experts=0)

    @property
    def used_k(self) -> int:
        """How many experts that give anything a token uses, on average."""
        return self.top_k if self.mean_k is None else self.mean_k

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
    """What an engine does differently, and for which bodies and shapes.

    `condition` says `when` in words, where the predicate is not one of `CONDITIONS`.
    """

    text: str
    when: Callable[[Body, MoeShape], bool] = lambda body, shape: True
    condition: str = ""

    @property
    def described(self) -> str:
        """The trap with its condition, for those who have no body in mind."""
        condition = self.condition or CONDITIONS.get(self.when, "")
        return f"{self.text} (if {condition})" if condition else self.text


@dataclass(frozen=True)
class Engine:
    """What is known of one engine: whether it registers the architecture, and its traps."""

    name: str
    registered: bool
    traps: tuple[Trap, ...] = ()

    def notes(self, body: Body, shape: MoeShape) -> tuple[str, ...]:
        """Return the traps that this body and shape fall into."""
        if not self.registered:
            return (UNREGISTERED,)
        return tuple(trap.text for trap in self.traps if trap.when(body, shape))


Named = Iterator[tuple[str, Weight]]
"""Names inside a layer with their weights."""


def per_expert(
    gate: str = "mlp.experts.{expert}.gate_proj.weight",
    up: str = "mlp.experts.{expert}.up_proj.weight",
    down: str = "mlp.experts.{expert}.down_proj.weight",
) -> Callable[[tuple[Ffn, ...]], Named]:
    """Store every expert's matrices on their own; `{expert}` stands for its number."""

    def write(routed: tuple[Ffn, ...]) -> Named:
        for template, attribute in ((gate, "gate_FD"), (up, "up_FD"), (down, "down_DF")):
            for number, expert in enumerate(routed):
                yield template.format(expert=number), getattr(expert, attribute)

    return write


def stacked(gate_up: str, down: str) -> Callable[[tuple[Ffn, ...]], Named]:
    """Store all experts in two tensors: gate over up [E, 2N, D], and down [E, D, N]."""

    def write(routed: tuple[Ffn, ...]) -> Named:
        yield gate_up, stack([concatenated([e.gate_FD, e.up_FD], axis=0) for e in routed])
        yield down, stack([e.down_DF for e in routed])

    return write


def projections(
    prefix: str, gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> Callable[[Ffn], Named]:
    """Store one FFN as three matrices below `prefix`."""

    def write(ffn: Ffn) -> Named:
        for name, attribute in ((gate, "gate_FD"), (up, "up_FD"), (down, "down_DF")):
            yield f"{prefix}.{name}.weight", getattr(ffn, attribute)

    return write


def fused_projections(gate_up: str, down: str) -> Callable[[Ffn], Named]:
    """Store one FFN as gate over up [2F, D], and down [D, F]."""

    def write(ffn: Ffn) -> Named:
        yield gate_up, concatenated([ffn.gate_FD, ffn.up_FD], axis=0)
        yield down, ffn.down_DF

    return write


def if_any(write: Callable[[Ffn], Named]) -> Callable[[Ffn], Named]:
    """Store the shared expert where there is one, and no tensors of width zero otherwise."""
    return lambda ffn: write(ffn) if ffn.num_neurons else iter(())


@dataclass(frozen=True)
class MoeTarget:
    """One stock MoE model type of transformers.

    `holds` maps Body features to config keys, `always` names features that every member has;
    `shape_keys` does so for `MoeShape`; `constants` are config values that never change, `computed`
    those that follow from body and shape; `limits` name further bodies it cannot hold, with the
    reason. `weights_sum` is what the weights of the chosen experts add up to before the scaling
    factor of `scale_key`, whatever the router says, which makes clones exact; None if that depends
    on the router. `neutral` is the weight of one chosen expert under a zero router. With
    `fixed_top_k` every token uses that many experts, each with the same weight whatever the router
    says, as long as its logits do not tie; a zero router is then refused.

    `shared` says how wide the shared expert may be: any width, units of the expert size, or exactly
    one unit. Where it is `shared_required`, zeros fill it if nobody asked for one.

    `places` holds a rule for each of Llama's tensors that is called, shaped or valued otherwise,
    and `extras` the tensors that no dense model has, by their name inside the layer;
    `selection_bias` is which of them is added to the scores that decide who is chosen, and to
    nothing else, where these are computed in fp32 whatever the weights are. `absorbs` are
    features of any value that `places` and `computed` see to, within `limits`. `fuses` names
    tensors that hold several of Llama's one above the other, and `on_disk` what Llama's prefixes
    are called in the files. `ties` says whether embedding and head may be one tensor;
    `routed_marks` are parts of the names of the routed experts' tensors. `router_module` is where
    the loaded model keeps the router inside a layer, and `router_gives` what it returns first.
    `files` are copied beside the weights, and `stock` says whether transformers has the class.
    `stream_divisor` is what the dense residual stream is divided by after a layer.
    """

    model_type: str
    architecture: str
    shape_keys: Mapping[str, str]
    engines: tuple[Engine, ...]
    router: str = "mlp.gate.weight"
    routed: Callable[[tuple[Ffn, ...]], Named] = per_expert()
    shared_as: Callable[[Ffn], Named] | None = None
    dense_as: Callable[[Ffn], Named] = projections("mlp")
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    weights_sum: float | None = 1.0
    scale_key: str | None = None
    fixed_top_k: int | None = None
    shared: Literal["none", "free", "units", "one"] = "none"
    shared_required: bool = False
    shared_weight: float = 1.0
    dense_layers: Literal["none", "prefix", "any"] = "none"
    groups: bool = False
    rope: Literal["half", "interleaved"] = "half"
    holds: Mapping[str, str] = field(default_factory=dict)
    always: Mapping[str, Any] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    sizes: Mapping[str, str] = field(default_factory=dict)
    computed: Callable[[Body, MoeShape], Mapping[str, Any]] = lambda body, shape: {}
    limits: tuple[Callable[[Body], str | None], ...] = ()
    places: Mapping[str, Rule] = field(default_factory=dict)
    extras: Callable[[Body, MoeShape, str], Mapping[str, Weight]] = lambda body, shape, dtype: {}
    selection_bias: str | None = None
    router_module: str = "mlp.gate"
    router_gives: Literal["logits", "shares"] = "logits"
    absorbs: frozenset[str] = frozenset()
    fuses: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    on_disk: Mapping[str, str] = field(default_factory=dict)
    ties: bool = True
    routed_marks: tuple[str, ...] = (".experts.",)
    files: Mapping[str, Path] = field(default_factory=dict)
    stock: bool = True
    stream_divisor: Callable[[int], float] = lambda layer: 1.0
    compatible: Callable[[MoeTarget, Body], MoeTarget] = lambda target, body: target

    @property
    def recipe_name(self) -> str:
        """What a recipe calls this target."""
        return self.model_type

    @property
    def text_model_type(self) -> str:
        """The model type of the decoder alone."""
        return self.model_type

    def alone(self, name: str) -> str:
        """Return what the decoder alone calls a stored tensor of the result."""
        return name

    def neutral(self, shape: MoeShape) -> float:
        """Return what one chosen expert is multiplied by when the router says nothing."""
        if self.weights_sum is not None:
            return self.weights_sum / shape.top_k * shape.routed_scale
        return (0.5 if self.scoring == "sigmoid" else 1 / shape.num_experts) * shape.routed_scale

    def misfits(self, body: Body) -> list[str]:
        """Return why this target cannot hold the body; empty when it can."""
        reasons = []
        defaults = {f.name: f.default for f in fields(Body)}
        seen_to = {*self.holds, *self.absorbs, *FOLDED}
        for feature in FEATURES:
            value = getattr(body, feature)
            if feature in self.always:
                if value != self.always[feature]:
                    reasons.append(f"it always has {feature}={self.always[feature]!r}")
            elif feature == "sliding_window" and _cuts_nothing(body):
                continue
            elif feature not in seen_to and value != defaults[feature]:
                reasons.append(f"it has no place for {feature}={value!r}")
        if self.rope == "interleaved" and not body.interleaved_rope:
            reasons.append("it rotates interleaved pairs")
        if body.exact_below is not None and body.max_positions > body.exact_below:
            reasons.append(
                f"exact only up to {body.exact_below} tokens, and the config allows "
                f"{body.max_positions} (--set target.max_positions={body.exact_below} cuts it)"
            )
        return reasons + [reason for limit in self.limits if (reason := limit(body))]

    def config(self, body: Body, shape: MoeShape, untie: bool) -> dict[str, Any]:
        """Return config.json's architecture part, in the keys of transformers 5."""
        sizes = {**SIZES, "head_dim": "head_dim", **self.sizes, **self.holds}
        config = {key: _plain(getattr(body, name)) for name, key in sizes.items()}
        config |= {key: getattr(shape, name) for name, key in self.shape_keys.items()}
        config |= dict(body.carried) | dict(self.constants)
        config["rope_parameters"] = dict(body.rope)
        config["tie_word_embeddings"] = body.tied and not untie
        if self.scale_key:
            config[self.scale_key] = shape.routed_scale
        if self.groups:
            config |= {"n_group": shape.num_groups, "topk_group": shape.top_groups}
        return config | dict(self.computed(body, shape))

    def folds_embedding(self, body: Body) -> bool:
        """Whether the embedding must be stored multiplied, which needs an lm_head of its own."""
        return body.embedding_multiplier != 1.0 and "embedding_multiplier" not in self.holds

    def must_untie(self, body: Body) -> bool:
        """Whether a tied head has to be written as a tensor of its own."""
        return self.folds_embedding(body) or not self.ties

    def is_routed(self, name: str) -> bool:
        """Whether a stored tensor belongs to the routed experts, of which a token uses some."""
        return any(mark in name for mark in self.routed_marks)

    def keeps_dtype(self, name: str) -> bool:
        """Whether a stored tensor has a dtype of its own, whatever the weights have."""
        return name.endswith(("correction_bias", "expert_bias"))

    def stored(self, named: list[tuple[str, Weight]]) -> list[tuple[str, Weight]]:
        """Return the tensors of one step, complete and in Llama's names, as the files hold them."""
        tensors = dict(named)
        for name, _ in named:
            layer, inside = split_name(name)
            for fused, parts in self.fuses.items():
                if layer is not None and inside == parts[0]:
                    found = [tensors.pop(layer_name(layer, part)) for part in parts]
                    tensors[layer_name(layer, fused)] = concatenated(found, axis=0)
        return [(self._stored_name(name), weight) for name, weight in tensors.items()]

    def _stored_name(self, name: str) -> str:
        for ours, theirs in self.on_disk.items():
            if name.startswith(ours):
                return theirs + name.removeprefix(ours)
        return name

    def router_name(self, layer: int) -> str:
        """Return what the files call the router's rows of a layer."""
        return self._stored_name(layer_name(layer, self.router))

    def bias_name(self, layer: int) -> str | None:
        """Return what the files call the selection bias of a layer, if there is one."""
        name = self.selection_bias
        return None if name is None else self._stored_name(layer_name(layer, name))

    def place(self, name: str, weight: Weight, body: Body) -> Iterator[tuple[str, Weight]]:
        """Yield one of Llama's tensors as this target stores it."""
        layer, inside = split_name(name)
        if inside == EMBEDDING and self.folds_embedding(body):
            weight = weight.scaled(body.embedding_multiplier)
        if body.interleaved_rope and self.rope == "half":
            weight = _as_half_split(inside, weight, body)
        rule = self.places.get(inside)
        for new, placed in (rule(weight, body) if rule else {inside: weight}).items():
            yield new if layer is None else layer_name(layer, new), placed

    def tensors(
        self, layer: int, experts: Experts, router_ED: Weight, body: Body, shape: MoeShape
    ) -> Iterator[tuple[str, Weight]]:
        """Yield name and weight of everything that replaces one dense FFN."""
        inside = {self.router: router_ED, **self.extras(body, shape, router_ED.dtype)}
        if experts.bias_E is not None:
            assert self.selection_bias is not None
            size = inside[self.selection_bias].shape
            inside[self.selection_bias] = Weight.of(experts.bias_E.view(size), "F32")
        inside |= dict(self.routed(experts.routed))
        if self.shared_as:
            idle = self.shared_required and not shape.shared_size
            shared = zero_expert(body, shape, router_ED.dtype) if idle else experts.shared
            inside |= dict(self.shared_as(shared))
        for name, weight in inside.items():
            yield layer_name(layer, name), weight

    def dense_tensors(self, layer: int, ffn: Ffn) -> Iterator[tuple[str, Weight]]:
        """Yield name and weight of an FFN that stays dense."""
        for name, weight in self.dense_as(ffn):
            yield layer_name(layer, name), weight

    def allows_dense(self, shape: MoeShape) -> bool:
        """Whether the layers that stay dense have a place in the config."""
        dense = shape.dense_layers
        if self.dense_layers == "prefix":
            return dense == tuple(range(len(dense)))
        return not dense or self.dense_layers == "any"


def _cuts_nothing(body: Body) -> bool:
    """Whether the window is no shorter than the context up to which the body is described."""
    if body.sliding_window is None or body.exact_below is None or body.layer_types is not None:
        return False
    return body.exact_below <= body.sliding_window


def _as_half_split(inside: str, weight: Weight, body: Body) -> Weight:
    heads = {"q_proj": body.num_heads, "k_proj": body.num_kv_heads}
    for projection, num_heads in heads.items():
        if inside.startswith(f"self_attn.{projection}."):
            return half_split(weight, num_heads, int(body.head_dim * body.partial_rotary))
    return weight


def zero_expert(body: Body, shape: MoeShape, dtype: str) -> Ffn:
    """Return an expert whose output is zero, for targets that always add one."""
    wide_FD = Weight.filled((shape.expert_size, body.hidden_size), 0.0, dtype)
    down_DF = Weight.filled((body.hidden_size, shape.expert_size), 0.0, dtype)
    return Ffn(wide_FD, wide_FD, down_DF, body.act)


def window_types(body: Body) -> list[str]:
    """Return `layer_types` as transformers writes them, for every layer."""
    kind = "full_attention" if body.sliding_window is None else "sliding_attention"
    return list(body.layer_types or [kind] * body.num_layers)


def mlp_types(shape: MoeShape) -> list[str]:
    """Return `mlp_layer_types` as transformers writes them: which layers stay dense."""
    return ["sparse" if n in shape.moe_layers else "dense" for n in range(shape.num_layers)]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def odd_head_dim(body: Body, shape: MoeShape) -> bool:
    """Whether the head size is not hidden size / heads."""
    return not body.plain_head_dim


def not_silu(body: Body, shape: MoeShape) -> bool:
    """Whether the activation is another than SiLU."""
    return body.act != "silu"


def windowed(body: Body, shape: MoeShape) -> bool:
    """Whether some layer has a sliding window."""
    return body.sliding_window is not None


HEAD_DIM = "takes the head size for hidden size / heads"
WINDOW = "ignores the sliding window"
SILU = "runs SiLU whatever hidden_act says"
TRANSFORMERS = Engine("transformers", True)
CONDITIONS: Mapping[Callable[[Body, MoeShape], bool], str] = {
    odd_head_dim: "the head size differs from that",
    not_silu: "the activation is another",
    windowed: "there is one",
}
"""The predicates that several rows share, in words."""


def same_bias(body: Body) -> str | None:
    """Refuse biases on some projections only."""
    if body.qkv_bias != body.o_bias:
        return (
            f"it has one switch for all biases, and qkv_bias={body.qkv_bias}, o_bias={body.o_bias}"
        )
    return None


def whole_correction(body: Body) -> str | None:
    """Refuse an untruncated yarn range, which transformers reads only from ropes of one kind."""
    if body.rope.get("truncate") is False:
        return "its ropes by layer type have no place for truncate=False"
    return None


def no_o_bias(body: Body) -> str | None:
    """Refuse a bias on the output projection."""
    return "it has no bias on o_proj" if body.o_bias else None
