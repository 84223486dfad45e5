"""Dense families: what each one's config means and where its feed-forward weights lie.

A family row translates a Hugging Face config into a `Body`, the vocabulary in which every target
says what it can hold, and its tensors into Llama's names. An attribute that no row understands is
refused by name, so nothing is lost in silence.

D hidden size · F FFN neurons
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from moe_convert.errors import SourceError, UnsupportedError
from moe_convert.ffn import Ffn, Weight

Config = Mapping[str, Any]


@dataclass(frozen=True)
class Body:
    """A decoder apart from its FFNs, in the words of Llama's config.

    The fields without default say how large it is, and every target has a place for them. Each of
    the others is a feature: where it differs from its default, a target that has no place for it
    cannot hold the body.
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
    qk_norm: str | None = None
    sliding_window: int | None = None
    layer_types: tuple[str, ...] | None = None
    partial_rotary: float = 1.0

    @property
    def plain_head_dim(self) -> bool:
        """Whether the head size is hidden size / heads, which some engines take for granted."""
        return self.head_dim * self.num_heads == self.hidden_size


FEATURES = ("qkv_bias", "o_bias", "mlp_bias", "qk_norm", "sliding_window", "layer_types",
            "partial_rotary")  # fmt: skip
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
    "sep_token_id", "return_dict", "output_hidden_states", "output_attentions", "is_encoder_decoder",
    "chunk_size_feed_forward", "id2label", "label2id", "problem_type", "auto_map", "name_or_path",
    "attn_implementation", "license", "use_bfloat16", "tokenizer_class", "is_decoder",
})  # fmt: skip
"""Attributes that do not change the function, or that transformers folds into `rope_parameters`."""


@dataclass(frozen=True)
class FfnNames:
    """Where a family keeps one layer's FFN, relative to the layer."""

    gate: str = "mlp.gate_proj.weight"
    up: str = "mlp.up_proj.weight"
    down: str = "mlp.down_proj.weight"

    @property
    def names(self) -> tuple[str, ...]:
        """All tensors of the FFN."""
        return tuple(dict.fromkeys((self.gate, self.up, self.down)))


@dataclass(frozen=True)
class DenseFamily:
    """One dense model type of transformers.

    `fields` maps Body fields to config attributes where they differ from `SIZES`; `fixed` are
    features that every member has; `only` lists attributes of which some values are understood and
    the others refused; `refine` computes what is not a plain copy. `ffn_norm` is the norm whose
    output the FFN, and so the router, receives.
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
    ffn_names: FfnNames = FfnNames()
    ffn_norm: str | None = "post_attention_layernorm.weight"
    ffn_module: str = "mlp"

    def body(self, config: Config, given: Config) -> Body:
        """Translate a full config (defaults filled in); `given` is config.json as it was written.

        Raises:
            UnsupportedError: an attribute is unknown or has a value that is not understood.
        """
        fields = {**SIZES, **self.fields}
        known = {*fields.values(), *CARRIED, *IGNORED, *self.only, *self.also_read}
        unknown = sorted(k for k in given if k not in known and not k.startswith("_"))
        if unknown:
            raise UnsupportedError(
                f"config.json of this {self.model_type} sets {', '.join(unknown)}, which this "
                "family does not define, so the function cannot be kept for sure.",
                "Remove the attribute if it has no effect.",
            )
        for name, allowed in self.only.items():
            if config.get(name) not in allowed:
                raise UnsupportedError(
                    f"{name}={config.get(name)!r} of this {self.model_type} cannot be expressed in "
                    f"any stock MoE architecture (only {' or '.join(map(repr, allowed))})."
                )
        values = {ours: config.get(theirs) for ours, theirs in fields.items()}
        return Body(
            **{**values, **_common(config), **self.fixed, **self.refine(config)},
            carried={name: config.get(name) for name in CARRIED},
        )

    def ffn(self, layer: int, tensors: Mapping[str, Weight], body: Body) -> Ffn:
        """Return one layer's FFN, nothing read."""
        names = self.ffn_names
        gate, up, down = (
            tensors[layer_name(layer, name)] for name in (names.gate, names.up, names.down)
        )
        return Ffn(gate, up, down, body.act)

    def rest(self, tensors: Mapping[str, Weight]) -> Iterator[tuple[str, Weight]]:
        """Yield every tensor outside the FFNs under Llama's name, in the order of the layers."""
        for name in sorted(tensors, key=order):
            if split_name(name)[1] not in self.ffn_names.names:
                yield name, tensors[name]


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
        "rope": {k: v for k, v in rope.items() if k != "partial_rotary_factor"},
        "partial_rotary": rope.get("partial_rotary_factor") or 1.0,
        "head_dim": config.get("head_dim") or hidden // heads,
    }


def windows(config: Config) -> dict[str, Any]:
    """Return `sliding_window` and `layer_types`; a pattern that is uniform needs no list."""
    types = tuple(config.get("layer_types") or ())
    window = config.get("sliding_window")
    if "sliding_attention" not in types or window is None:
        return {"sliding_window": None, "layer_types": None}
    return {"sliding_window": window, "layer_types": None if len(set(types)) == 1 else types}


QWEN_WINDOW = ("use_sliding_window", "max_window_layers", "layer_types", "sliding_window")

FAMILIES = {
    row.model_type: row
    for row in (
        DenseFamily(
            "llama",
            "LlamaForCausalLM",
            targets=("mixtral", "glm4_moe", "qwen2_moe"),
            examples="Llama 2 and 3, TinyLlama, SmolLM2, Falcon3, Yi",
            fields={"mlp_bias": "mlp_bias"},
            also_read=("attention_bias",),
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
            targets=("qwen3_moe", "glm4_moe"),
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
}
"""Every dense family, by model type."""


def find_family(config: Config) -> tuple[DenseFamily, Body]:
    """Return the family row and the body of a config.json.

    Raises:
        UnsupportedError: no row has this model type, or an attribute is not understood.
        SourceError: transformers rejects the config.
    """
    from transformers import CONFIG_MAPPING

    model_type = str(config["model_type"])
    family = FAMILIES.get(model_type)
    if family is None:
        raise UnsupportedError(
            f"No stock MoE architecture is known to hold {model_type} models exactly.",
            f"Supported: {', '.join(FAMILIES)}; see `moe-convert archs ls`.",
        )
    try:
        full = CONFIG_MAPPING[model_type].from_dict(dict(config)).to_dict()
    except Exception as error:
        raise SourceError(f"transformers rejects this config.json: {_first_line(error)}") from error
    return family, family.body(full, config)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(error).__name__
