"""The dense model's stream, through the source's own layer class.

B rows · T tokens · D hidden size
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moe_convert.families import DenseFamily, layer_name
from moe_convert.ffn import Weight
from moe_convert.streams.base import Stream, skeleton
from moe_convert.streams.room import Room

if TYPE_CHECKING:
    import torch


class DenseStream(Stream):
    """The dense model's hidden states."""

    def __init__(
        self,
        config: Mapping[str, Any],
        family: DenseFamily,
        weights: Mapping[str, Weight],
        ids: torch.Tensor | Sequence[torch.Tensor],
        device: str = "cpu",
        room: Room | None = None,
    ) -> None:
        """Embed the token ids; `weights` are the source's."""
        self._family, self._next = family, 0
        model = skeleton(config)
        super().__init__(model, family.layers, weights, ids, family.token_tables, device, room)

    def reach(self, layer: int) -> torch.Tensor:
        """Run the model up to and with this layer; return what its FFN received, fp32 [T, D].

        T runs over all rows of all tensors of ids, in their order. The next layer overwrites it.
        """
        while self._next <= layer:
            self._advance(self._next)
            self._next += 1
        assert self._next == layer + 1, "the stream does not go back"
        return self.received_TD

    def _loaded(self, layer: int) -> Any:
        """Return a layer with its weights."""
        module, prefix = self._layers[layer], layer_name(layer, "")
        state = {
            name.removeprefix(prefix): weight.load().to(self._device).float()
            for name, weight in self._weights.items()
            if name.startswith(prefix) and "rotary_emb" not in name
        }
        module.load_state_dict(state, assign=True)
        return module

    def _advance(self, layer: int) -> None:
        module = self._loaded(layer)
        received: list[torch.Tensor] = []
        ffn = module.get_submodule(self._family.ffn_module)
        hook = ffn.register_forward_pre_hook(lambda _, args: received.append(args[0]))
        for batch, states_BTD in enumerate(self.states):
            states_BTD.copy_(self._run(layer, batch))
            self._keep(batch, received)
        hook.remove()
        module.to("meta")
