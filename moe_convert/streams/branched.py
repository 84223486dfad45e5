"""The dense stream with branches: what would become of it if one layer's FFN gave something else.

B rows · T tokens · D hidden size · V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from moe_convert.streams.base import EMBEDDING
from moe_convert.streams.dense import DenseStream

if TYPE_CHECKING:
    import torch

HEAD = "lm_head.weight"
HEAD_TOKENS = 256
"""Tokens whose logits are held at once, of the dense stream and of one branch."""


class BranchedStream(DenseStream):
    """The dense stream, and one branch for each layer that it went through.

    A branch leaves the dense stream at its layer and goes through all later ones, which are as they
    were. All go through a layer while its weights are in memory, so that each is read once.
    """

    _branches: tuple[list[torch.Tensor], ...] = ()

    def branch(self, layer: int, given: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Run all states through the next layer.

        A new branch begins there, in which its FFN gives `given` of what it receives, [T, D].
        """
        assert self._next == layer, "the layers are run in their order"
        module = self._loaded(layer)
        self._branches = tuple(self._all(layer, states) for states in self._branches)

        def instead(_: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
            return given(args[0].flatten(0, -2)).to(out.dtype).view_as(out)

        hook = module.get_submodule(self._family.ffn_module).register_forward_hook(instead)
        self._branches += (self._all(layer, self.states),)
        hook.remove()
        for states_BTD, after_BTD in zip(self.states, self._all(layer, self.states), strict=True):
            states_BTD.copy_(after_BTD)
        module.to("meta")
        self._next += 1

    def _all(self, layer: int, states: list[torch.Tensor]) -> list[torch.Tensor]:
        return [self._run(layer, batch, one_BTD) for batch, one_BTD in enumerate(states)]

    def divergences(self) -> list[float]:
        """Return KL(dense ‖ branch) of a token in nats for every branch, behind the last layer."""
        totals = [0.0] * len(self._branches)
        with self._ending() as log_probabilities:
            for dense_TD, *others in self._portions():
                dense_TV = log_probabilities(dense_TD)
                shares_TV = dense_TV.exp()
                for branch, states_TD in enumerate(others):
                    ratio_TV = dense_TV - log_probabilities(states_TD)
                    totals[branch] += float((shares_TV * ratio_TV).sum())
        num_tokens = sum(states.shape[0] * states.shape[1] for states in self.states)
        return [max(0.0, total) / num_tokens for total in totals]

    def _portions(self) -> Iterator[tuple[torch.Tensor, ...]]:
        """Yield the states of some tokens at a time: of the dense stream and of every branch."""
        for streams in zip(self.states, *self._branches, strict=True):
            portions = (states_BTD.flatten(0, -2).split(HEAD_TOKENS) for states_BTD in streams)
            yield from zip(*portions, strict=True)

    @contextmanager
    def _ending(self) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """Yield what computes log-probabilities, fp32 [T, V], of states behind the last layer.

        The model itself does, with layers that all give these states whatever they receive.
        """
        import torch

        given: list[torch.Tensor] = []

        class Given(torch.nn.Module):
            def __init__(self, layer: Any) -> None:
                super().__init__()
                self.__dict__["_layer"] = layer

            def __getattr__(self, name: str) -> Any:
                return getattr(self.__dict__["_layer"], name)

            def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
                return given[0]

        head_VD = self._head()

        def log_probabilities(states_TD: torch.Tensor) -> torch.Tensor:
            given[:] = [states_TD[None]]
            ids_1T = torch.zeros(1, len(states_TD), dtype=torch.int64, device=states_TD.device)
            out = self._model(input_ids=ids_1T, use_cache=False)
            logits_1TV = out.logits if "logits" in out else out.last_hidden_state @ head_VD.T
            return logits_1TV[0].float().log_softmax(dim=-1)

        stubs = torch.nn.ModuleList([Given(layer) for layer in self._layers])
        self._model.set_submodule(self._at, stubs)
        yield log_probabilities
        self._model.set_submodule(self._at, torch.nn.ModuleList(self._layers))

    def _head(self) -> torch.Tensor:
        """Load the head's rows, fp32 [V, D], into the model if it has a place for them."""
        import torch

        head = self._model.get_output_embeddings()
        embedding = self._model.get_input_embeddings()
        names = {module: f"{name}.weight" for name, module in self._model.named_modules()}
        wanted = (names.get(head, HEAD), HEAD, names[embedding], EMBEDDING)
        found = next(name for name in wanted if name in self._weights)
        head_VD = self._weights[found].load().float().to(self._device)
        if head is not None:
            head.weight = torch.nn.Parameter(head_VD, requires_grad=False)
        return head_VD
