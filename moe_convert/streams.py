"""Run a model layer by layer, one layer's weights in memory at a time.

The call arguments of every layer (rotary embeddings, masks) are recorded once by running the model
with its layers replaced by stubs; after that each layer is loaded, run and dropped in turn.

D hidden size · T tokens
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_convert.families import DenseFamily, layer_name
from moe_convert.ffn import Weight

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


BATCH_TOKENS = 2048
"""Tokens that go through a layer at once; more rows take their turn."""

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and named arguments of a layer, without the hidden states."""


class _Finished(Exception):
    """Raised by the last stub: nothing behind the layers needs to run."""


class DenseStream:
    """The dense model's hidden states, advanced one decoder layer at a time.

    The states of all tokens are kept, what a layer computes on the way only for some rows at once.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        family: DenseFamily,
        weights: Mapping[str, Weight],
        ids: torch.Tensor | Sequence[torch.Tensor],
    ) -> None:
        """Embed the token ids and record how each layer is called; weights are read lazily.

        `ids` are rows [B, T], or several such tensors of different lengths.
        """
        self._family, self._weights, self._next = family, weights, 0
        self._received: torch.Tensor | None = None
        self._model = _skeleton(config)
        self._layers: list[Any] = list(self._model.get_submodule(family.layers))
        self._calls: list[list[Call]] = []
        self._states: list[torch.Tensor] = self._begin(_batches(ids))

    def _begin(self, batches: list[torch.Tensor]) -> list[torch.Tensor]:
        import torch

        used, compact_N = torch.cat([ids.flatten() for ids in batches]).unique(return_inverse=True)
        embedding = self._model.get_input_embeddings()
        embedding.weight = self._rows("model.embed_tokens.weight", used)
        embedding.padding_idx = None
        self._load_around(embedding.weight, used)
        seen: list[torch.Tensor] = []
        stubs = [self._stub(layer, seen, n) for n, layer in enumerate(self._layers)]
        self._model.set_submodule(self._family.layers, torch.nn.ModuleList(stubs))
        compact = compact_N.split([ids.numel() for ids in batches])
        return [
            self._record(part.view_as(ids), seen)
            for part, ids in zip(compact, batches, strict=True)
        ]

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

        rows = [self._weights[name].rows(range(i, i + 1)) for i in used]
        stored = [row.stored.read() if row.stored else row.load() for row in rows]  # type: ignore[attr-defined]
        return torch.nn.Parameter(torch.cat(stored).float(), requires_grad=False)

    def _load_around(self, embedding: torch.Tensor, used: torch.Tensor) -> None:
        """Load what may run before the layers, such as learned positions, but no head."""
        import torch

        head = self._model.get_output_embeddings()
        for name, parameter in list(self._model.named_parameters()):
            outside = not name.startswith(f"{self._family.layers}.") and name in self._weights
            if outside and parameter is not embedding and parameter is not head.weight:
                module, _, leaf = name.rpartition(".")
                if name in self._family.token_tables:
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
        import torch

        module, prefix = self._layers[layer], layer_name(layer, "")
        state = {
            name.removeprefix(prefix): weight.load().float()
            for name, weight in self._weights.items()
            if name.startswith(prefix) and "rotary_emb" not in name
        }
        module.load_state_dict(state, assign=True)
        received: list[torch.Tensor] = []
        ffn = module.get_submodule(self._family.ffn_module)
        hook = ffn.register_forward_pre_hook(lambda _, args: received.append(args[0]))
        with torch.no_grad():
            for batch, states in enumerate(self._states):
                args, kwargs = self._calls[batch][layer]
                result = module(states, *args, **kwargs)
                self._states[batch] = result[0] if isinstance(result, tuple) else result
        hook.remove()
        module.to("meta")
        return torch.cat([x.flatten(0, -2) for x in received])


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


def _skeleton(config: Mapping[str, Any]) -> PreTrainedModel:
    """Return the model in fp32 with no parameter memory and its buffers computed."""
    import torch
    from accelerate import init_empty_weights
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    full = CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(full, dtype=torch.float32)
    return model.eval().requires_grad_(False)
