"""A model whose layers run one at a time; what the dense and the converted stream share.

B rows · T tokens · D hidden size
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moe_convert.checkpoint.names import build, full_config
from moe_convert.ffn import Weight, torch_dtype
from moe_convert.streams.room import Room

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

EMBEDDING = "model.embed_tokens.weight"
"""What the embedding's table is called in the weights where they have no name of the model's."""

BATCH_TOKENS = 2048
"""Tokens that go through a layer at once; more rows take their turn."""

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and named arguments of a layer, without the hidden states."""


class _Finished(Exception):
    """Raised by the last stub: nothing behind the layers needs to run."""


class Stream:
    """A model's hidden states, advanced one decoder layer at a time, fp32.

    The states of all tokens are kept, and what a layer's FFN receives, in one place for all layers;
    what a layer computes on the way only for some rows at once.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: str,
        weights: Mapping[str, Weight],
        ids: torch.Tensor | Sequence[torch.Tensor],
        token_tables: tuple[str, ...] = (),
        device: str = "cpu",
        room: Room | None = None,
    ) -> None:
        """Embed the token ids and record how each layer is called.

        `weights` are read lazily, by the names of the loaded `model`, which takes no memory yet;
        `layers` is where it has its decoder layers. `ids` are rows [B, T], or several such tensors
        of different lengths. `room` is where the states live, by default the device.
        """
        self._model, self._weights, self._device = model, weights, device
        self._at, self._tables = layers, token_tables
        self._layers: list[Any] = list(model.get_submodule(layers))
        self._calls: list[list[Call]] = []
        self._room = room or Room(device)
        self._begin(_batches(ids))

    def _begin(self, batches: list[torch.Tensor]) -> None:
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
        for batch, (part, ids) in enumerate(zip(compact, batches, strict=True)):
            embedded_BTD = self._record(part.view_as(ids).to(self._device), seen)
            if batch == 0:
                self._make_room(batches, embedded_BTD.shape[-1])
            self.states[batch].copy_(embedded_BTD)
        self._model.set_submodule(self._at, torch.nn.ModuleList(self._layers))

    def _make_room(self, batches: list[torch.Tensor], num_dims: int) -> None:
        """Lay the states of every batch into those of all tokens, in the order of the ids."""
        sizes = [ids.numel() for ids in batches]

        def divided(all_TD: torch.Tensor) -> list[torch.Tensor]:
            parts = zip(all_TD.split(sizes), batches, strict=True)
            return [part_TD.view(*ids.shape, -1) for part_TD, ids in parts]

        self.states_TD = self._room.empty(sum(sizes), num_dims)
        self._received_TD = self._room.empty(sum(sizes), num_dims)
        self.states, self._received = divided(self.states_TD), divided(self._received_TD)

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

    def _run(self, layer: int, batch: int, states_BTD: torch.Tensor | None = None) -> torch.Tensor:
        """Return what a loaded layer makes of one batch: of its states, or of those given."""
        import torch

        args, kwargs = self._calls[batch][layer]
        with torch.no_grad():
            given_BTD = self.states[batch] if states_BTD is None else states_BTD
            result = self._layers[layer](given_BTD.to(self._device), *args, **kwargs)
        return states_of(result)

    def _keep(self, batch: int, received: list[torch.Tensor]) -> None:
        """Put aside what the layer's FFN has just received, and empty the list."""
        into_BTD = self._received[batch]
        into_BTD.copy_(received[0].view_as(into_BTD))
        received.clear()

    @property
    def received_TD(self) -> torch.Tensor:
        """What the FFN of the layer that was reached receives, fp32 [T, D], until the next one."""
        return self._received_TD.to(self._device)


def states_of(result: Any) -> torch.Tensor:
    """Return the states of a module that may give something else beside them."""
    states: torch.Tensor = result[0] if isinstance(result, tuple) else result
    return states


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


def skeleton(config: Mapping[str, Any]) -> PreTrainedModel:
    """Return the model in fp32 with no parameter memory and its buffers computed."""
    import torch
    from accelerate import init_empty_weights

    full = full_config(config)
    with init_empty_weights(include_buffers=False):
        model = build(full, dtype=torch.float32)
    return model.eval().requires_grad_(False)
