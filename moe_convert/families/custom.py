"""Families that no stock architecture holds: converted only with our own modelling file.

The decoder is then the dense class itself, so its config goes through as it is, and a row says no
more than where its FFNs are and which axis of each of their tensors counts neurons.

D hidden size · F FFN neurons · N neurons per expert
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

from moe_convert.checkpoint import Source, TensorRef
from moe_convert.checkpoint.names import embedding_name, full_config, loaded_names, loaded_shapes
from moe_convert.errors import SourceError, UnsupportedError
from moe_convert.families.body import Body, Config, DenseFamily, layer_name, order, split_name
from moe_convert.ffn import Ffn, Weight, as_range, concatenated

CUSTOM = "custom"
LAYERS = "model.layers."
EMBEDDING = "model.embed_tokens.weight"

Neurons = Any
"""A range, or int64 indices."""

Cut = Callable[[Weight, Neurons, float], Weight]
"""Takes the neurons of one expert out of a tensor; its output is multiplied by a factor."""


def rows(weight: Weight, neurons: Neurons, scale: float) -> Weight:
    """Neurons are rows: gate, up and their biases."""
    return weight.rows(neurons)


def columns(weight: Weight, neurons: Neurons, scale: float) -> Weight:
    """Neurons are columns: up of a Conv1D."""
    return weight.columns(neurons)


def halves(weight: Weight, neurons: Neurons, scale: float) -> Weight:
    """Neurons are rows twice: gate above up in one tensor."""
    num_neurons = weight.shape[0] // 2
    if isinstance(neurons, range) and neurons == range(num_neurons):
        return weight
    below = [weight.rows(range(num_neurons)), weight.rows(range(num_neurons, 2 * num_neurons))]
    return concatenated([half.rows(neurons) for half in below], axis=0)


def rows_out(weight: Weight, neurons: Neurons, scale: float) -> Weight:
    """Down of a Conv1D."""
    return weight.rows(neurons).scaled(scale)


def columns_out(weight: Weight, neurons: Neurons, scale: float) -> Weight:
    """Down of a linear layer."""
    return weight.columns(neurons).scaled(scale)


def whole(weight: Weight, neurons: Neurons, scale: float) -> Weight:
    """Every expert has all of it: the weights of the chosen ones add up to one."""
    return weight


GATED = {"gate_proj": rows, "up_proj": rows, "down_proj": columns_out}


@dataclass(frozen=True)
class ModuleFfn:
    """An FFN of whatever form: its tensors by their name inside the layer, and how each is cut.

    Stands in for `Ffn`: a custom family makes it and its target takes it apart again.
    """

    weights: Mapping[str, Weight]
    cuts: Mapping[str, Cut]
    num_neurons: int

    @property
    def num_params(self) -> int:
        """Number of elements."""
        return sum(weight.num_params for weight in self.weights.values())

    def select(self, neurons_N: Any, scale: float = 1.0, up_scale: float = 1.0) -> ModuleFfn:
        """Return the network of these neurons, its output without bias times both scales."""
        neurons = as_range(neurons_N)
        chosen = {
            name: self.cuts[name](weight, neurons, scale * up_scale)
            for name, weight in self.weights.items()
        }
        return replace(self, weights=chosen, num_neurons=len(neurons))

    def cast(self, dtype: str) -> ModuleFfn:
        """Return the network stored as another dtype."""
        return replace(self, weights={n: w.cast(dtype) for n, w in self.weights.items()})


@dataclass(frozen=True)
class CustomFamily(DenseFamily):
    """One dense model type whose class is subclassed.

    `reason` says why no stock architecture holds it. `modules` are the attributes of a layer that
    make up its FFN, in the order of their calls, `size_key` the config attribute that says how wide
    it is, and `linears` the linear layers of the FFN by name.
    """

    reason: str = ""
    modules: tuple[str, ...] = ("mlp",)
    size_key: str = "intermediate_size"
    linears: Mapping[str, Cut] = field(default_factory=lambda: GATED)

    @property
    def cuts(self) -> dict[str, Cut]:
        """How each tensor of the FFN is cut, by its name inside the layer."""
        inside = "" if len(self.modules) > 1 else f"{self.modules[0]}."
        cuts: dict[str, Cut] = {}
        for name, cut in self.linears.items():
            cuts[f"{inside}{name}.weight"] = cut
            cuts[f"{inside}{name}.bias"] = whole if cut in {rows_out, columns_out} else rows
        return cuts

    def body(self, config: Config, given: Config) -> Body:
        """Return the sizes; everything else stays inside the dense class."""
        full = full_config(given)
        heads = full.num_attention_heads
        return Body(
            vocab_size=full.vocab_size,
            hidden_size=full.hidden_size,
            num_layers=full.num_hidden_layers,
            num_heads=heads,
            num_kv_heads=getattr(full, "num_key_value_heads", None) or heads,
            ffn_size=getattr(full, self.size_key) or 4 * full.hidden_size,
            act="",
            norm_eps=0.0,
            max_positions=full.max_position_embeddings,
            rope={},
            tied=bool(full.tie_word_embeddings),
            head_dim=getattr(full, "head_dim", None) or full.hidden_size // heads,
        )

    def ffn(self, layer: int, tensors: Mapping[str, Weight], body: Body) -> Ffn:
        """Return one layer's FFN as a `ModuleFfn`."""
        found = {
            name: tensors[layer_name(layer, name)]
            for name in self.cuts
            if layer_name(layer, name) in tensors
        }
        return cast("Ffn", ModuleFfn(found, self.cuts, body.ffn_size))

    def rest(self, tensors: Mapping[str, Weight], body: Body) -> Iterator[tuple[str, Weight]]:
        """Yield every tensor outside the FFNs, in the order of the layers."""
        for name in sorted(tensors, key=order):
            layer, inside = split_name(name)
            if layer is None or inside not in self.cuts:
                yield name, tensors[name]

    def norm_before_ffn(
        self, layer: int, tensors: Mapping[str, Weight], body: Body
    ) -> Weight | None:
        """Return nothing: norms take too many forms here to be worked out."""
        return None

    def own_names(self, config: Config) -> dict[str, str]:
        """Return what this family's model calls Llama's embedding and decoder layers."""
        return {EMBEDDING: embedding_name(full_config(config)), LAYERS: f"{self.layers}."}

    def opened(self, source: Source) -> Source:
        """Return the source with the names of the loaded model, embedding and layers as in Llama.

        Custom code gets no conversion of names when it is loaded, and older files have other names
        or lack the prefix.
        """
        names = loaded_names(full_config(source.config), source.tensors)
        own = self.own_names(source.config)
        tensors: dict[str, TensorRef] = {}
        for stored, loaded in names.items():
            tensors[_swapped(loaded, {new: old for old, new in own.items()})] = source.tensors[
                stored
            ]
        return replace(source, tensors=tensors, fetch=lambda: self.opened(source.fetch()))

    def expected(self, config: Config) -> dict[str, tuple[int, ...]]:
        """Return name and shape of every tensor of an opened source."""
        own = {new: old for old, new in self.own_names(config).items()}
        shapes = loaded_shapes(full_config(config))
        return {_swapped(name, own): shape for name, shape in shapes.items()}


def _swapped(name: str, prefixes: Mapping[str, str]) -> str:
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def find_custom(config: Config) -> tuple[CustomFamily, Body]:
    """Return the custom family of a config.json and its sizes.

    Raises:
        UnsupportedError: no row has this model type.
        SourceError: transformers rejects the config.
    """
    model_type = str(config["model_type"])
    family = CUSTOM_FAMILIES.get(model_type)
    if family is None:
        raise UnsupportedError(
            f"The modelling file for custom targets is not proved on {model_type} models.",
            f"It is on {', '.join(CUSTOM_FAMILIES)}.",
        )
    try:
        return family, family.body(config, config)
    except Exception as error:
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise SourceError(f"transformers rejects this config.json: {first[0]}") from error


def custom_hint(model_type: str) -> str:
    """Return what a user whose model has no stock home can do; empty if nothing."""
    if model_type not in CUSTOM_FAMILIES:
        return ""
    return "Use --target custom, whose result runs only with trust_remote_code and in no engine."


def custom_reason(model_type: str) -> str:
    """Return why no stock architecture holds a model type, as the end of a sentence."""
    family = CUSTOM_FAMILIES.get(model_type)
    return f": {family.reason}" if family else ""


CUSTOM_FAMILIES: dict[str, CustomFamily] = {
    row.model_type: row
    for row in (
        CustomFamily(
            "gemma2",
            "Gemma2ForCausalLM",
            targets=(),
            examples="Gemma 2 2B to 27B",
            reason="it caps its attention scores",
        ),
        CustomFamily(
            "glm4",
            "Glm4ForCausalLM",
            targets=(),
            examples="GLM-4-0414",
            reason="it norms before and after each block, without a norm of queries and keys",
            linears={"gate_up_proj": halves, "down_proj": columns_out},
        ),
        CustomFamily(
            "exaone4",
            "Exaone4ForCausalLM",
            targets=(),
            examples="EXAONE 4.0",
            reason="it norms only the outputs of its blocks, and queries and keys per head",
        ),
        CustomFamily(
            "olmo3",
            "Olmo3ForCausalLM",
            targets=(),
            examples="OLMo 3",
            reason="it has sliding windows, with a rope of their own",
        ),
        CustomFamily(
            "gpt_neox",
            "GPTNeoXForCausalLM",
            targets=(),
            examples="Pythia, GPT-NeoX 20B",
            reason="its FFN has no gate and biases",
            layers="gpt_neox.layers",
            linears={"dense_h_to_4h": rows, "dense_4h_to_h": columns_out},
        ),
        CustomFamily(
            "gpt2",
            "GPT2LMHeadModel",
            targets=(),
            examples="GPT-2, DistilGPT2",
            reason="its FFN has no gate and biases, and its positions are learned",
            layers="transformer.h",
            size_key="n_inner",
            linears={"c_fc": columns, "c_proj": rows_out},
        ),
        CustomFamily(
            "opt",
            "OPTForCausalLM",
            targets=(),
            examples="OPT 125M to 66B",
            reason="its FFN has no gate and biases, and its positions are learned",
            layers="model.decoder.layers",
            modules=("fc1", "activation_fn", "fc2"),
            size_key="ffn_dim",
            linears={"fc1": rows, "fc2": columns_out},
            ffn_module="fc1",
        ),
        CustomFamily(
            "starcoder2",
            "Starcoder2ForCausalLM",
            targets=(),
            examples="StarCoder2 3B to 15B",
            reason="its FFN has no gate and biases",
            linears={"c_fc": rows, "c_proj": columns_out},
        ),
        CustomFamily(
            "phi",
            "PhiForCausalLM",
            targets=(),
            examples="Phi-1, Phi-1.5, Phi-2",
            reason="its FFN has no gate and biases",
            linears={"fc1": rows, "fc2": columns_out},
        ),
    )
}
"""Every family that is proved with the modelling file, by model type."""
