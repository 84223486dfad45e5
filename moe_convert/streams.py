"""Run a model layer by layer, one layer's weights in memory at a time.

The call arguments of every layer (rotary embeddings, masks) are recorded once by running the model
with its layers replaced by stubs; after that each layer is loaded, run and dropped in turn.

D hidden size · T tokens
"""

from __future__ import annotations

from collections.abc import Mapping
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


class _Finished(Exception):
    """Raised by the last stub: nothing behind the layers needs to run."""


class DenseStream:
    """The dense model's hidden states, advanced one decoder layer at a time."""

    def __init__(
        self,
        config: Mapping[str, Any],
        family: DenseFamily,
        weights: Mapping[str, Weight],
        ids_BT: torch.Tensor,
    ) -> None:
        """Embed the token ids and record how each layer is called; weights are read lazily."""
        self._family, self._weights, self._next = family, weights, 0
        self._received: torch.Tensor | None = None
        self._model = _skeleton(config)
        self._layers: list[Any] = list(self._model.model.layers)
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._states: torch.Tensor = self._begin(ids_BT)

    def _begin(self, ids_BT: torch.Tensor) -> torch.Tensor:
        import torch

        used, compact_BT = torch.unique(ids_BT, return_inverse=True)
        embedding = self._model.get_input_embeddings()
        rows = [self._weights["model.embed_tokens.weight"].rows(range(i, i + 1)) for i in used]
        stored = [row.stored.read() if row.stored else row.load() for row in rows]  # type: ignore[attr-defined]
        table = torch.cat(stored).float()
        embedding.weight = torch.nn.Parameter(table, requires_grad=False)
        embedding.padding_idx = None
        seen: list[torch.Tensor] = []
        stubs = [self._stub(layer, seen, n) for n, layer in enumerate(self._layers)]
        self._model.model.layers = torch.nn.ModuleList(stubs)
        try:
            self._model.model(input_ids=compact_BT, use_cache=False)
        except _Finished:
            return seen[0]
        raise AssertionError("the model did not call its layers")

    def _stub(self, layer: Any, seen: list[torch.Tensor], number: int) -> torch.nn.Module:
        import torch

        calls, last = self._calls, number == len(self._layers) - 1

        class Stub(torch.nn.Module):
            def __getattr__(self, name: str) -> Any:
                return getattr(layer, name)

            def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                seen.append(hidden_states)
                calls.append((args, kwargs))
                if last:
                    raise _Finished
                return hidden_states

        return Stub()

    def reach(self, layer: int) -> torch.Tensor:
        """Run the model up to and with this layer; return what its FFN received, fp32 [T, D]."""
        while self._next <= layer:
            self._received = self._advance(self._next)
            self._next += 1
        assert self._received is not None
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
        args, kwargs = self._calls[layer]
        with torch.no_grad():
            result = module(self._states, *args, **kwargs)
        hook.remove()
        module.to("meta")
        self._states = result[0] if isinstance(result, tuple) else result
        return received[0].flatten(0, -2)


def sample_ids(folder: Path | None, vocab_size: int) -> torch.Tensor:
    """Return token ids [1, T] of the sample text, or random ones without a tokenizer."""
    import torch
    from transformers import AutoTokenizer

    try:
        if folder is None:
            raise OSError
        ids_BT: torch.Tensor = AutoTokenizer.from_pretrained(folder)(
            SAMPLE_TEXT, return_tensors="pt"
        ).input_ids
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
