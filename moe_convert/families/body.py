"""What a dense family row is, and the body of a decoder that it describes.

A family row translates a Hugging Face config into a `Body`, the vocabulary in which every target
says what it can hold, and its tensors into Llama's names. An attribute that no row understands is
refused by name, so nothing is lost in silence.

D hidden size · F FFN neurons
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from typing import Any

from moe_convert.errors import UnsupportedError, UsageError
from moe_convert.ffn import Ffn, Weight
from moe_convert.transforms import plus_one, split_rows

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Body:
    """A decoder apart from its FFNs, in the words of Llama's config.

    The fields without default say how large it is, and every target has a place for them. Each of
    the others is a feature: where it differs from its default, a target that has no place for it
    cannot hold the body.

    `norm` is rms, layer (LayerNorm with bias), layer_nobias or layer_plain (no weights at all).
    `block` is where the norms stand: pre, post (on the outputs only), sandwich (both) or parallel
    (attention and FFN read the same norm). `qk_norm` is None, head (per head), head_after_rope or
    full (before the heads are split). `local_rope` is the rope of sliding layers where it differs
    from `rope`.
    `exact_below` is the context length up to which this description is complete. `native` names a
    token mixer that only its own sibling has; its config keys then travel in `carried`.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    ffn_size: int
    act: str
    norm_eps: float
    max_positions: int
    rope: Mapping[str, Any]
    tied: bool
    carried: Mapping[str, Any] = field(default_factory=dict)
    head_dim: int = 0
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    norm: str = "rms"
    block: str = "pre"
    qk_norm: str | None = None
    clip_qkv: float | None = None
    sliding_window: int | None = None
    layer_types: tuple[str, ...] | None = None
    nope_layers: tuple[int, ...] = ()
    partial_rotary: float = 1.0
    interleaved_rope: bool = False
    local_rope: Mapping[str, Any] | None = None
    exact_below: int | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    attention_multiplier: float | None = None
    logits_divisor: float = 1.0
    final_softcap: float | None = None
    native: str | None = None

    @property
    def plain_head_dim(self) -> bool:
        """Whether the head size is hidden size / heads, which some engines take for granted."""
        return self.head_dim * self.num_heads == self.hidden_size


FEATURES = tuple(
    f.name
    for f in fields(Body)
    if f.name not in {"head_dim", "carried"} and f.default is not MISSING
)
"""Body fields that a target must have a place for when they differ from their default."""

SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "ffn_size": "intermediate_size",
    "act": "hidden_act",
    "norm_eps": "rms_norm_eps",
    "max_positions": "max_position_embeddings",
    "tied": "tie_word_embeddings",
}
"""Body field to the config attribute that most families use for it."""

CARRIED = ("initializer_range", "attention_dropout", "pad_token_id", "bos_token_id", "eos_token_id")
"""Attributes that mean the same everywhere and go through unchanged."""

IGNORED = frozenset({
    "model_type", "architectures", "transformers_version", "torch_dtype", "dtype", "use_cache",
    "rope_theta", "rope_scaling", "rope_parameters", "head_dim", "pretraining_tp", "unk_token_id",
    "sep_token_id", "return_dict", "output_hidden_states", "output_attentions",
    "is_encoder_decoder",
    "chunk_size_feed_forward", "id2label", "label2id", "problem_type", "auto_map", "name_or_path",
    "attn_implementation", "license", "use_bfloat16", "tokenizer_class", "is_decoder",
    "transformers.js_config",
})  # fmt: skip
"""Attributes that do not change the function, or that transformers folds into `rope_parameters`."""


PARTIAL = "partial_rotary_factor"
ROPE_KEYS = frozenset({
    "rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings",
    "attention_factor", "beta_fast", "beta_slow", "short_factor", "long_factor", "low_freq_factor",
    "high_freq_factor", "mscale", "mscale_all_dim", "truncate", "mrope_section",
    "mrope_interleaved",
})  # fmt: skip
"""Keys of a rope that families and targets read alike, or not at all."""


@dataclass(frozen=True)
class FfnNames:
    """Where a family keeps one layer's FFN, relative to the layer; `fused` if gate holds up too."""

    gate: str = "mlp.gate_proj.weight"
    up: str = "mlp.up_proj.weight"
    down: str = "mlp.down_proj.weight"
    fused: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """All tensors of the FFN."""
        return tuple(dict.fromkeys((self.gate, self.up, self.down)))


Rule = Callable[[Weight, Body], Mapping[str, Weight]]
"""Turns one tensor of a family into tensors with Llama's names."""


def renamed(name: str) -> Rule:
    """Keep the value under another name."""
    return lambda weight, body: {name: weight}


def plus_one_as(name: str) -> Rule:
    """Norms that are applied as `1 + w`, under the given name."""
    return lambda weight, body: {name: plus_one(weight)}


@dataclass(frozen=True)
class DenseFamily:
    """One dense model type of transformers.

    `fields` maps Body fields to config attributes where they differ from `SIZES`; `fixed` are
    features that every member has; `only` lists attributes of which some values are understood and
    the others refused; `also_read` those that `refine` uses, which computes what is not a plain
    copy; `carries` go through unchanged to a sibling. `tensors` has a rule for each tensor that is
    not called, shaped or valued as in Llama, by its name inside the layer; `implied` those that the
    function has without storing them, each with the number that fills its hidden-size vector.
    `ffn_norm` is the norm whose output the FFN, and so the router, receives, and `layers` where the
    loaded model has its decoder layers. `unused` are prefixes of tensors that transformers itself
    never loads, such as a draft head; the result has none. `rope_keys` are the keys of a rope that
    this family reads beyond those that all do. `token_tables` are further tables with a row for
    each token. `limit` says in words up to where the row is exact.
    """

    model_type: str
    architecture: str
    targets: tuple[str, ...]
    examples: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    also_read: tuple[str, ...] = ()
    refine: Callable[[Config], Mapping[str, Any]] = lambda config: {}
    carries: tuple[str, ...] = ()
    tensors: Mapping[str, Rule] = field(default_factory=dict)
    implied: Mapping[str, float] = field(default_factory=dict)
    ffn_names: FfnNames = FfnNames()
    ffn_norm: str | None = "post_attention_layernorm.weight"
    ffn_module: str = "mlp"
    layers: str = "model.layers"
    unused: tuple[str, ...] = ()
    rope_keys: tuple[str, ...] = ()
    token_tables: tuple[str, ...] = ()
    limit: str = ""

    def body(self, config: Config, given: Config) -> Body:
        """Translate a full config (defaults filled in); `given` is config.json as it was written.

        Raises:
            UnsupportedError: an attribute is unknown or has a value that is not understood.
        """
        fields = {**SIZES, **self.fields}
        known = {*fields.values(), *CARRIED, *IGNORED, *self.only, *self.also_read, *self.carries}
        unknown = sorted(k for k in given if k not in known and not k.startswith("_"))
        if unknown:
            raise UnsupportedError(
                f"config.json of this {self.model_type} sets {', '.join(unknown)}, which this "
                f"family does not define; none of its targets ({', '.join(self.targets)}) has a "
                "place for it, so the function cannot be kept for sure.",
                "Remove the attribute if it has no effect.",
            )
        for name, allowed in self.only.items():
            value = config.get(name, given.get(name))
            if value not in allowed:
                raise UnsupportedError(
                    f"{name}={value!r} of this {self.model_type} cannot be expressed in "
                    f"any stock MoE architecture (only {' or '.join(map(repr, allowed))})."
                )
        self._check_ropes(config)
        values = {ours: config.get(theirs) for ours, theirs in fields.items()}
        refined = {**self.fixed, **self.refine(config)}
        carried = {name: config.get(name) for name in (*CARRIED, *self.carries)}
        carried |= refined.pop("carried", {})
        return Body(**{**values, **_common(config), **refined}, carried=carried)

    def _check_ropes(self, config: Config) -> None:
        """Refuse keys of a rope that this family ignores and a target might not."""
        for rope in each_rope(config.get("rope_parameters") or {}):
            for key, value in rope.items():
                idle = value is None or (key == PARTIAL and value == 1.0)
                if key not in ROPE_KEYS and key not in self.rope_keys and not idle:
                    raise UnsupportedError(
                        f"{key}={value!r} in the rope of this {self.model_type} is nothing that "
                        "this family reads, so the function cannot be kept for sure.",
                        "Remove the key if it has no effect.",
                    )

    def ffn(self, layer: int, tensors: Mapping[str, Weight], body: Body) -> Ffn:
        """Return one layer's FFN, nothing read.

        A fused gate_up is cut in two; where gate and up are the same tensor, relu(x)² is computed
        as relu(x) · x.
        """
        names = self.ffn_names
        gate, up, down = (
            tensors[layer_name(layer, name)] for name in (names.gate, names.up, names.down)
        )
        if names.fused:
            gate, up = split_rows(gate, (body.ffn_size, body.ffn_size))
        return Ffn(gate, up, down, body.act)

    def rest(self, tensors: Mapping[str, Weight], body: Body) -> Iterator[tuple[str, Weight]]:
        """Yield every tensor outside the FFNs under Llama's name, in the order of the layers."""
        tensors = {**tensors, **dict(self._implied(body))}
        for name in sorted(tensors, key=order):
            layer, inside = split_name(name)
            if layer is not None and inside in self.ffn_names.names:
                continue
            if "rotary_emb.inv_freq" in name or name.startswith(self.unused):
                continue
            rule = self.tensors.get(inside)
            if rule is None:
                yield name, tensors[name]
                continue
            for new, weight in rule(tensors[name], body).items():
                yield new if layer is None else layer_name(layer, new), weight

    def _implied(self, body: Body) -> Iterator[tuple[str, Weight]]:
        for inside, value in self.implied.items():
            weight = Weight.filled((body.hidden_size,), value, "F32")
            if inside.startswith("model."):
                yield inside, weight
                continue
            yield from ((layer_name(layer, inside), weight) for layer in range(body.num_layers))

    def norm_before_ffn(
        self, layer: int, tensors: Mapping[str, Weight], body: Body
    ) -> Weight | None:
        """Return what multiplies the normed input of one layer's FFN; None if nothing does."""
        if self.ffn_norm is None:
            return None
        weight, rule = tensors[layer_name(layer, self.ffn_norm)], self.tensors.get(self.ffn_norm)
        return next(iter(rule(weight, body).values())) if rule else weight


def layer_name(layer: int, name: str) -> str:
    """Return the full name of a tensor of one layer."""
    return f"model.layers.{layer}.{name}"


def split_name(name: str) -> tuple[int | None, str]:
    """Return layer and name inside the layer; the layer is None outside the decoder layers."""
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    return (int(match[1]), match[2]) if match else (None, name)


def order(name: str) -> tuple[int, int, str]:
    """Sort key: embedding, layers by number, final norm, head."""
    layer, inside = split_name(name)
    if layer is not None:
        return 1, layer, inside
    return (0 if "embed" in name else 3 if "lm_head" in name else 2), 0, name


def _common(config: Config) -> dict[str, Any]:
    """Return what every family writes alike: rope, head size and the pattern of windows."""
    rope = dict(config.get("rope_parameters") or {})
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    return {
        "rope": {k: v for k, v in rope.items() if k != PARTIAL},
        "partial_rotary": rope.get(PARTIAL) or 1.0,
        "head_dim": config.get("head_dim") or hidden // heads,
    }


def each_rope(rope: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the rope of every kind of layer, or the one that all layers have."""
    return [part for part in rope.values() if isinstance(part, Mapping)] or [rope]


def shortened(body: Body, max_positions: int) -> Body:
    """Return the body with a shorter context and with ropes that do not change with it.

    Raises:
        UsageError: a rope follows the context length in a way that its keys cannot express.
    """
    if max_positions >= body.max_positions:
        return body
    ropes = (body.rope, body.local_rope or {})
    for rope in (part for found in ropes for part in each_rope(found)):
        if rope.get("rope_type") == "dynamic" and not rope.get("alpha"):
            raise UsageError(
                f"target.max_positions={max_positions} would change this model's rope: with "
                "rope_type='dynamic' it follows the context length.",
                "Leave target.max_positions out.",
            )
    local = None if body.local_rope is None else _scaled_as(body.local_rope, body.max_positions)
    rope = _scaled_as(body.rope, body.max_positions)
    return replace(body, rope=rope, local_rope=local, max_positions=max_positions)


def _scaled_as(rope: Mapping[str, Any], max_positions: int) -> dict[str, Any]:
    """Write the scale out that a rope without one takes from the length of the context."""
    result: dict[str, Any] = {
        key: _scaled_as(part, max_positions) if isinstance(part, Mapping) else part
        for key, part in rope.items()
    }
    if result.get("rope_type") in {"longrope", "yarn"} and result.get("factor") is None:
        result["factor"] = max_positions / result["original_max_position_embeddings"]
    return result


def windows(config: Config) -> dict[str, Any]:
    """Return `sliding_window` and `layer_types`; a pattern that is uniform needs no list."""
    types = tuple(config.get("layer_types") or ())
    window = config.get("sliding_window")
    if "sliding_attention" not in types or window is None:
        return {"sliding_window": None, "layer_types": None}
    return {"sliding_window": window, "layer_types": None if len(set(types)) == 1 else types}
