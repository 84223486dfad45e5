"""Run models layer by layer, one layer's weights in memory at a time.

The call arguments of every layer (rotary embeddings, masks) are recorded once by running the model
with its layers replaced by stubs; after that each layer is loaded, run and dropped in turn. The
dense stream runs the source's own layer class; the converted stream runs the target's, with the
tensors that were just made.

B rows · T tokens · D hidden size
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_convert.checkpoint.names import build, full_config, loaded_names
from moe_convert.families import DenseFamily, layer_name
from moe_convert.ffn import Weight, torch_dtype

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

SAMPLE_TEXT = """\
The river had risen in the night, and by morning the lower fields were under water. People from the
village carried what they could up the hill: blankets, two hens in a basket, a clock that had not
run for years. "It will be gone by Friday," said the old man, though nobody had asked him.

def mean(values: list[float]) -> float:
    if not values:
        raise ValueError("mean of nothing")
    return sum(values) / len(values)

A train leaves at 9:40 and travels 210 km at 84 km/h. How long does it take? 210 / 84 = 2.5, so it
arrives at 12:10. In biology, a cell membrane lets small molecules through and keeps large ones out;
the difference in concentration on its two sides stores energy. Le marché ouvre à huit heures. Die
Bibliothek ist am Sonntag geschlossen. Q: Which planet is closest to the sun? A: Mercury.
"""
"""A short mixed text for measurements that need some input and were given no data."""


EMBEDDING = "model.embed_tokens.weight"
"""What the embedding's table is called in the weights where they have no name of the model's."""

ROUTER = "router"
"""What a router is called that is not part of the FFN module but stands beside it in the layer."""

BATCH_TOKENS = 2048
"""Tokens that go through a layer at once; more rows take their turn."""

FFN_TOKENS = 16_384
"""Tokens that go through experts at once."""

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and named arguments of a layer, without the hidden states."""


class _Finished(Exception):
    """Raised by the last stub: nothing behind the layers needs to run."""


class Stream:
    """A model's hidden states, advanced one decoder layer at a time, fp32.

    The states of all tokens are kept, what a layer computes on the way only for some rows at once.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: str,
        weights: Mapping[str, Weight],
        ids: torch.Tensor | Sequence[torch.Tensor],
        token_tables: tuple[str, ...] = (),
        device: str = "cpu",
    ) -> None:
        """Embed the token ids and record how each layer is called.

        `weights` are read lazily, by the names of the loaded `model`, which takes no memory yet;
        `layers` is where it has its decoder layers. `ids` are rows [B, T], or several such tensors
        of different lengths.
        """
        self._model, self._weights, self._device = model, weights, device
        self._at, self._tables = layers, token_tables
        self._layers: list[Any] = list(model.get_submodule(layers))
        self._calls: list[list[Call]] = []
        self.states: list[torch.Tensor] = self._begin(_batches(ids))

    def _begin(self, batches: list[torch.Tensor]) -> list[torch.Tensor]:
        import torch

        used, compact_N = torch.cat([ids.flatten() for ids in batches]).unique(return_inverse=True)
        embedding = self._model.get_input_embeddings()
        named = self._model.named_parameters()
        name = next(n for n, parameter in named if parameter is embedding.weight)
        name = name if name in self._weights else EMBEDDING
        embedding.weight = self._rows(name, used)
        embedding.padding_idx = None
        self._load_around(embedding.weight, used)
        seen: list[torch.Tensor] = []
        stubs = [self._stub(layer, seen, n) for n, layer in enumerate(self._layers)]
        self._model.set_submodule(self._at, torch.nn.ModuleList(stubs))
        self._to_device()
        compact = compact_N.split([ids.numel() for ids in batches])
        states = [
            self._record(part.view_as(ids).to(self._device), seen)
            for part, ids in zip(compact, batches, strict=True)
        ]
        self._model.set_submodule(self._at, torch.nn.ModuleList(self._layers))
        return states

    def _to_device(self) -> None:
        """Move what has values; layers without weights keep theirs on the meta device."""
        import torch

        for module in self._model.modules():
            for name, value in [*module._parameters.items(), *module._buffers.items()]:
                if value is not None and not value.is_meta and value.device.type != self._device:
                    moved = value.to(self._device)
                    kept = torch.nn.Parameter(moved, False) if name in module._parameters else moved
                    setattr(module, name, kept)

    def _record(self, ids_BT: torch.Tensor, seen: list[torch.Tensor]) -> torch.Tensor:
        """Return the embedded batch; keep its calls, equal tensors of all batches only once."""
        seen.clear()
        self._calls.append([])
        try:
            self._model.base_model(input_ids=ids_BT, use_cache=False)
        except _Finished:
            self._calls[-1] = _shared(self._calls[-1], self._calls[0])
            return seen[0]
        raise AssertionError("the model did not call its layers")

    def _rows(self, name: str, used: torch.Tensor) -> torch.nn.Parameter:
        """Read the rows of some tokens from a table."""
        import torch

        table = self._weights[name]
        if table.stored is None:
            found = table.load().to(torch_dtype(table.dtype))[used]
        else:
            rows = [table.stored.rows(i, i + 1) for i in used.tolist()]
            found = torch.cat([row.read() for row in rows])  # type: ignore[attr-defined]
        return torch.nn.Parameter(found.float(), requires_grad=False)

    def _load_around(self, embedding: torch.Tensor, used: torch.Tensor) -> None:
        """Load what may run before the layers, such as learned positions, but no head."""
        import torch

        head = self._model.get_output_embeddings()
        unused = None if head is None else head.weight
        for name, parameter in list(self._model.named_parameters()):
            outside = not name.startswith(f"{self._at}.") and name in self._weights
            if outside and parameter is not embedding and parameter is not unused:
                module, _, leaf = name.rpartition(".")
                if name in self._tables:
                    value = self._rows(name, used)
                else:
                    whole = self._weights[name].load().float()
                    value = torch.nn.Parameter(whole, requires_grad=False)
                setattr(self._model.get_submodule(module), leaf, value)

    def _stub(self, layer: Any, seen: list[torch.Tensor], number: int) -> torch.nn.Module:
        import torch

        calls, last = self._calls, number == len(self._layers) - 1

        class Stub(torch.nn.Module):
            def __getattr__(self, name: str) -> Any:
                return getattr(layer, name)

            def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                seen.append(hidden_states)
                calls[-1].append((args, kwargs))
                if last:
                    raise _Finished
                return hidden_states

        return Stub()

    def _run(self, layer: int, batch: int) -> torch.Tensor:
        """Return what a loaded layer makes of the states of one batch."""
        import torch

        args, kwargs = self._calls[batch][layer]
        with torch.no_grad():
            result = self._layers[layer](self.states[batch], *args, **kwargs)
        states: torch.Tensor = result[0] if isinstance(result, tuple) else result
        return states

    @property
    def states_TD(self) -> torch.Tensor:
        """The states of all tokens, [T, D], in the order of the ids."""
        return _flat(self.states)


class DenseStream(Stream):
    """The dense model's hidden states."""

    def __init__(
        self,
        config: Mapping[str, Any],
        family: DenseFamily,
        weights: Mapping[str, Weight],
        ids: torch.Tensor | Sequence[torch.Tensor],
        device: str = "cpu",
    ) -> None:
        """Embed the token ids; `weights` are the source's."""
        self._family, self._next = family, 0
        self._received: torch.Tensor | None = None
        model = skeleton(config)
        super().__init__(model, family.layers, weights, ids, family.token_tables, device)

    def reach(self, layer: int) -> torch.Tensor:
        """Run the model up to and with this layer; return what its FFN received, fp32 [T, D].

        T runs over all rows of all tensors of ids, in their order.
        """
        while self._next <= layer:
            self._received = self._advance(self._next)
            self._next += 1
        assert self._received is not None
        assert self._next == layer + 1, "the stream does not go back"
        return self._received

    def _advance(self, layer: int) -> torch.Tensor:
        module, prefix = self._layers[layer], layer_name(layer, "")
        state = {
            name.removeprefix(prefix): weight.load().float().to(self._device)
            for name, weight in self._weights.items()
            if name.startswith(prefix) and "rotary_emb" not in name
        }
        module.load_state_dict(state, assign=True)
        received: list[torch.Tensor] = []
        ffn = module.get_submodule(self._family.ffn_module)
        hook = ffn.register_forward_pre_hook(lambda _, args: received.append(args[0]))
        for batch in range(len(self.states)):
            self.states[batch] = self._run(layer, batch)
        hook.remove()
        module.to("meta")
        return _flat(received)


class ConvertedStream(Stream):
    """The converted model's hidden states, run with the tensors that were made so far.

    `enter` runs a layer without its FFN and says what that will receive; once the experts are made
    `leave` adds what they give. Where the layer adds the FFN's output, times a constant, to its
    stream, `gain` is that constant, and nothing is computed twice.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        around: Mapping[str, Weight],
        ids: torch.Tensor | Sequence[torch.Tensor],
        device: str = "cpu",
        token_tables: tuple[str, ...] = (),
    ) -> None:
        """Embed the token ids; `around` are the tensors outside the layers, as they are stored."""
        model = skeleton(config)
        names = loaded_names(model.config, around)
        weights = {loaded: around[stored] for stored, loaded in names.items()}
        super().__init__(model, _layers_of(model), weights, ids, token_tables, device)
        self._left: list[torch.Tensor] = []
        self._received: list[torch.Tensor] = []
        self.gain: float | None = None

    def enter(self, layer: int, tensors: Mapping[str, Weight]) -> torch.Tensor:
        """Run a layer without its FFN; return what this receives, fp32 [T, D].

        `tensors` are the layer's others, as they are stored.
        """
        self._load(tensors)
        module = self._layers[layer]
        names = {n.split(".")[0] for n, p in module.named_parameters() if p.is_meta}
        replaced = {name: module.get_submodule(name) for name in sorted(names)}
        probes = _probes(list(replaced))
        first = next(iter(probes.values()))
        for name, probe in probes.items():
            module.set_submodule(name, probe)
        self._left = [self._run(layer, batch) for batch in range(len(self.states))]
        self._received = list(first.seen)
        self.gain = self._gain(layer, first)
        for name, old in replaced.items():
            module.set_submodule(name, old)
        self._ffns = list(replaced)
        return _flat(self._received)

    def _gain(self, layer: int, probe: Any) -> float | None:
        """Return what the layer multiplies its FFN's output by; None if it does more than that."""
        left_BTD = self._left[0]
        probe.gives = left_BTD.roll(1, dims=-1).flip(dims=(1,))
        moved_BTD = self._run(layer, 0) - left_BTD
        gain = float((moved_BTD * probe.gives).sum() / probe.gives.square().sum())
        wrong = (moved_BTD - gain * probe.gives).norm() / probe.gives.norm()
        probe.gives = None
        return gain if float(wrong) < 1e-3 * abs(gain) else None

    @property
    def left_TD(self) -> torch.Tensor:
        """The stream after the layer as if its FFN gave nothing, fp32 [T, D]."""
        return _flat(self._left)

    def ffns(self, layer: int, tensors: Mapping[str, Weight]) -> dict[str, torch.nn.Module]:
        """Load the FFN of the layer that was entered; return its modules by name in the model."""
        self._load(tensors)
        prefix = f"{self._at}.{layer}"
        return {f"{prefix}.{n}": self._layers[layer].get_submodule(n) for n in self._ffns}

    def leave(self, layer: int, tensors: Mapping[str, Weight]) -> None:
        """Run on with the whole layer, whose `tensors` are as they are stored."""
        import torch

        self._load(tensors)
        module = self._layers[layer]
        if self._left and self.gain is not None:
            ffns = [module.get_submodule(name) for name in self._ffns]
            x_TD = _flat(self._received)
            with torch.no_grad():
                given = [
                    sum(_first(ffn(part_TD.unsqueeze(0))) for ffn in ffns).squeeze(0)
                    for part_TD in x_TD.split(FFN_TOKENS)
                ]
            parts = torch.cat(given).split([left.shape[0] * left.shape[1] for left in self._left])
            self.states = [
                left.add_(part_TD.view_as(left), alpha=self.gain)
                for left, part_TD in zip(self._left, parts, strict=True)
            ]
        else:
            for batch in range(len(self.states)):
                self.states[batch] = self._run(layer, batch)
        self._left, self._received = [], []
        module.to("meta")

    def _load(self, tensors: Mapping[str, Weight]) -> None:
        """Load tensors of the files into the model as `from_pretrained` would, rounded, in fp32."""
        import torch
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        state = {
            name: weight.load().to(torch_dtype(weight.dtype)).float()
            for name, weight in tensors.items()
        }
        config = LoadStateDictConfig(
            weight_mapping=get_model_conversion_mapping(self._model),
            device_map={"": self._device},
            dtype=torch.float32,
        )
        convert_and_load_state_dict_in_model(self._model, state, config)


def _probes(names: list[str]) -> dict[str, Any]:
    """Return modules in place of a layer's FFN: the first keeps what it gets, all give nothing.

    A router that the layer itself calls gives three nothings, which go to the experts.
    """
    import torch

    class Probe(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[torch.Tensor] = []
            self.gives: torch.Tensor | None = None

        def forward(self, x_BTD: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            self.seen.append(x_BTD)
            return torch.zeros_like(x_BTD) if self.gives is None else self.gives.view_as(x_BTD)

    class Chooser(torch.nn.Module):
        def forward(self, x_TD: torch.Tensor) -> tuple[None, None, None]:
            return None, None, None

    return {name: Chooser() if name == ROUTER else Probe() for name in names}


def _first(result: Any) -> torch.Tensor:
    """Return the states of a module that may give router logits beside them."""
    states: torch.Tensor = result[0] if isinstance(result, tuple) else result
    return states


def _flat(batches: Sequence[torch.Tensor]) -> torch.Tensor:
    import torch

    return torch.cat([states.flatten(0, -2) for states in batches])


def _layers_of(model: PreTrainedModel) -> str:
    """Return where a model has its decoder layers."""
    import torch

    number = model.config.get_text_config().num_hidden_layers
    names = (
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == number
    )
    return str(next(names))


def _batches(ids: torch.Tensor | Sequence[torch.Tensor]) -> list[torch.Tensor]:
    import torch

    tensors = [ids] if isinstance(ids, torch.Tensor) else ids
    return [b for t in tensors for b in t.split(max(1, BATCH_TOKENS // t.shape[1]))]


def _shared(value: Any, known: Any) -> Any:
    """Return a nest of arguments with every tensor that equals the known one replaced by it."""
    import torch

    if isinstance(value, torch.Tensor) and isinstance(known, torch.Tensor):
        alike = value.shape == known.shape and value.dtype == known.dtype
        return known if alike and torch.equal(value, known) else value
    if type(value) is dict and isinstance(known, dict):
        return {key: _shared(item, known.get(key)) for key, item in value.items()}
    if type(value) in {list, tuple} and isinstance(known, type(value)) and len(value) == len(known):
        return type(value)(_shared(*pair) for pair in zip(value, known, strict=True))
    return value


def sample_ids(folder: Path | None, vocab_size: int, trust: bool = False) -> torch.Tensor:
    """Return token ids [1, T] of the sample text, or random ones without a tokenizer.

    `trust` says that code which lies in the folder is ours and may run.
    """
    import torch
    from transformers import AutoTokenizer

    try:
        if folder is None:
            raise OSError
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
        ids_BT: torch.Tensor = tokenizer(SAMPLE_TEXT, return_tensors="pt").input_ids
    except (OSError, ValueError, KeyError):
        generator = torch.Generator().manual_seed(0)
        return torch.randint(vocab_size, (1, 256), generator=generator)
    return ids_BT[:, :512].clamp(max=vocab_size - 1)


def skeleton(config: Mapping[str, Any]) -> PreTrainedModel:
    """Return the model in fp32 with no parameter memory and its buffers computed."""
    import torch
    from accelerate import init_empty_weights

    full = full_config(config)
    with init_empty_weights(include_buffers=False):
        model = build(full, dtype=torch.float32)
    return model.eval().requires_grad_(False)
