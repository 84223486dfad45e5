"""What the routers of a model do while it runs, and the two ways in which that is changed.

Every MoE layer has a router module that returns logits, weights and chosen experts, or logits
alone, and an `experts` module that is called with states, chosen experts and weights.

L MoE layers · T tokens · E routed experts · K chosen experts · D hidden size
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from moe_convert.calibrate.dense_experts import GATES
from moe_convert.calibrate.models import modules_of
from moe_convert.losses import score_spread, straight_through
from moe_convert.targets import MoeTarget

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Watch:
    """Records logits and choices of every MoE layer while `recording`, those of zeros left out."""

    def __init__(
        self,
        model: PreTrainedModel,
        target: MoeTarget,
        top_k: int,
        null_experts: int = 0,
        *,
        dense_router: bool = False,
        wide: bool = False,
    ) -> None:
        """Hook every layer; with `dense_router` the routers hear of all experts.

        Where these run as one `wide` FFN, that computes them all anyway; elsewhere each is run once
        more. The last `null_experts` are zeros, and to choose one is to choose nobody.
        """
        self.target, self.top_k, self._dense_router = target, top_k, dense_router
        self.logits: list[torch.Tensor] = []
        self.chosen: list[torch.Tensor] = []
        self._recording = False
        self._order_T: torch.Tensor | None = None
        self._last: dict[int, torch.Tensor] = {}
        routers = [module for _, module in modules_of(model, target.router_module)]
        self.num_layers = len(routers)
        self.num_experts = max(p.shape[0] for p in routers[0].parameters() if p.dim() == 2)
        self.num_experts -= null_experts
        self._null_experts = null_experts
        for layer, router in enumerate(routers):
            router.register_forward_hook(functools.partial(self._routed, layer))
        self._experts = [module for _, module in modules_of(model, "experts") if dense_router]
        self._wide = wide
        for layer, experts in enumerate(() if wide else self._experts):
            experts.register_forward_hook(functools.partial(self._mixed, layer))

    def _routed(self, layer: int, router: torch.nn.Module, args: Any, out: Any) -> Any:
        """Record what a router returned, and return what is used in its place."""
        logits_TE = (out[0] if isinstance(out, tuple) else out).flatten(0, -2)
        if self.target.router_gives == "shares":
            logits_TE = logits_TE.clamp(min=1e-30).log()
        if self._dense_router:
            self._last[layer] = logits_TE
            if self._wide:
                setattr(
                    self._experts[layer],
                    GATES,
                    self._gates(layer, *(part.flatten(0, -2) for part in out[1:])),
                )
        if self._recording:
            chosen_TK = out[2] if isinstance(out, tuple) else logits_TE.topk(self.top_k).indices
            self.logits.append(logits_TE[:, : self.num_experts])
            self.chosen.append(chosen_TK.detach())
        if self._order_T is not None:
            order_T = self._order_T.to(logits_TE.device)
            return tuple(part[order_T] for part in out) if isinstance(out, tuple) else out[order_T]
        return (out[0], out[1].detach(), out[2]) if self._dense_router else out

    def _mixed(
        self, layer: int, module: Any, args: tuple[Any, ...], out: torch.Tensor
    ) -> torch.Tensor:
        """Run every expert on every token, and let the router hear of it."""
        hidden, chosen_TK, weights_TK = args
        gates_TE = self._gates(layer, weights_TK, chosen_TK)
        if gates_TE is None:
            return out
        one = torch.ones_like(chosen_TK[:, :1])
        with torch.no_grad():
            outputs = [
                module.forward(hidden, one * e, one.to(weights_TK.dtype)).flatten(0, -2)
                for e in range(self.num_experts)
            ]
        mixed = straight_through(out.flatten(0, -2), torch.stack(outputs), gates_TE)
        return mixed.view_as(out)

    def _gates(
        self, layer: int, weights_TK: torch.Tensor, chosen_TK: torch.Tensor
    ) -> torch.Tensor | None:
        """Return the gates of all experts by which a router learns [T, E]; None if it does not.

        They are the scores, in the proportion in which those of the chosen experts are weights.
        """
        if self._order_T is not None or not torch.is_grad_enabled():
            return None
        logits_TE = self._last[layer].float()
        scores_TE = (
            logits_TE.sigmoid() if self.target.scoring == "sigmoid" else logits_TE.softmax(-1)
        )
        chosen_T1 = scores_TE.gather(1, chosen_TK).sum(-1, keepdim=True)
        return scores_TE / chosen_T1 * weights_TK.detach().float().sum(-1, keepdim=True)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record one forward pass; a recomputation in the backward pass is none."""
        self.logits, self.chosen, self._recording = [], [], True
        try:
            yield
        finally:
            self._recording = False

    @contextmanager
    def permuted(self, num_tokens: int, generator: torch.Generator) -> Iterator[None]:
        """Give every token the experts and weights of another one, the same in every layer."""
        self._order_T = torch.randperm(num_tokens, generator=generator)
        try:
            yield
        finally:
            self._order_T = None

    def counts(self) -> torch.Tensor:
        """Return how often each expert was chosen in the recorded pass, fp32 [L, E]."""
        chosen_LTK = torch.stack([chosen_TK.flatten(0, -2) for chosen_TK in self.chosen])
        shape = (*chosen_LTK.shape[:2], self.num_experts + self._null_experts)
        marks_LTE = torch.zeros(shape, dtype=torch.bool, device=chosen_LTK.device)
        marks_LTE.scatter_(2, chosen_LTK, True)
        return marks_LTE[..., : self.num_experts].sum(dim=1, dtype=torch.float32)

    def spread(self) -> torch.Tensor:
        """Return how far apart a token's scores lie in the recorded pass, fp32 [L]."""
        sigmoid = self.target.scoring == "sigmoid"
        with torch.no_grad():
            found = [score_spread(logits_TE, sigmoid) for logits_TE in self.logits]
        return torch.stack(found)

    def forget(self) -> None:
        """Let go of what was recorded."""
        self.logits, self.chosen = [], []
