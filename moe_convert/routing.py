"""The routers of one conversion, layer by layer, and what they would do with the data.

D hidden size · E routed experts · R router rows
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from moe_convert.checkpoint import Source
from moe_convert.ffn import Weight, torch_dtype
from moe_convert.inputs import Inputs, num_rows
from moe_convert.manifest import Routing, Warning_
from moe_convert.plan import Plan
from moe_convert.recipe import Recipe
from moe_convert.routers import Routed, busiest, routed
from moe_convert.streams import DenseStream

if TYPE_CHECKING:
    import torch

PARALLEL = 0.95
"""Cosine from which two rows are said to choose the same tokens."""


class RouterMaker:
    """Makes the rows of one layer after the other, in the order of the layers."""

    def __init__(
        self, plan: Plan, local: Source, weights: Mapping[str, Weight], inputs: Inputs | None
    ) -> None:
        """Prepare; nothing is read or run yet."""
        self._plan, self._local, self._weights = plan, local, weights
        self._inputs = inputs
        self._stream: DenseStream | None = None
        self._last: tuple[int, torch.Tensor] | None = None
        self._found: dict[int, Routed] = {}

    def __call__(self, layer: int) -> torch.Tensor:
        """Return the router rows of a layer, fp32 [E, D]."""
        if self._last is None or self._last[0] != layer:
            self._last = layer, self._make(layer)
        return self._last[1]

    def _make(self, layer: int) -> torch.Tensor:
        plan, layout = self._plan, self._plan.layout
        router, body, shape = plan.recipe.router, layout.body, plan.shape
        states = None
        if self._inputs is not None:
            states = self._inputs.states(self._reach(layer, self._inputs))
        copies = plan.recipe.experts.shared_rows
        rows_RD = router.rows(num_rows(plan.recipe, shape), body.hidden_size, layer, states)
        rows_ED = rows_RD.repeat_interleave(copies, dim=0)[: shape.num_experts]
        if states is None:
            norm = layout.family.norm_before_ffn(layer, self._weights, body)
            return router.scaled(rows_ED, None, norm.load() if norm else None)
        rows_ED = router.scaled(rows_ED, states.data_TD, None)
        stored_ED = rows_ED.to(torch_dtype(plan.dtype))
        self._found[layer] = routed(stored_ED, states.data_TD, shape, copies)
        return rows_ED

    def _reach(self, layer: int, inputs: Inputs) -> torch.Tensor:
        if self._stream is None:
            family = self._plan.layout.family
            self._stream = DenseStream(self._local.config, family, self._weights, inputs.ids)
        return self._stream.reach(layer)

    @property
    def found(self) -> dict[int, Routed]:
        """What the routers made so far do with the data, by layer."""
        return self._found


def routing_report(
    recipe: Recipe, inputs: Inputs | None, measured: Mapping[int, Routed]
) -> Routing | None:
    """Return what the routers do with the data; None if nothing was measured."""
    if inputs is None or not measured:
        return None
    layers = sorted(measured)
    found = [measured[layer] for layer in layers]
    entropies = [one.entropy for one in found]
    unsteered = [busiest(one.unsteered_E) for one in found if one.unsteered_E is not None]
    return Routing(
        data=recipe.data.name,
        tokens=inputs.data_BT.numel(),
        tokens_sha256=inputs.sha256,
        layers=layers,
        logit_std=[one.logit_std for one in found],
        condition=[one.condition for one in found],
        closest=[one.closest for one in found],
        load=[one.load_E.tolist() for one in found],
        entropy_mean=sum(entropies) / len(entropies),
        entropy_min=min(entropies),
        max_over_mean=max(one.max_over_mean for one in found),
        dead_experts=sum(one.num_dead for one in found),
        unbalanced=max(unsteered, default=None),
        mean_k=[one.mean_k for one in found] if recipe.router.thresholds else None,
    )


def routing_notes(report: Routing | None, balance: float | None = None) -> Iterator[Warning_]:
    """Yield warnings about rows that point the same way, and a load less even than `balance`."""
    if report is None:
        return
    if balance is not None and report.max_over_mean > 1 + balance:
        yield Warning_(
            code="unbalanced",
            message=f"The busiest expert gets {report.max_over_mean:.3f} times its share, and "
            f"router.balance asks for {1 + balance:.3f} at most.",
            hint="Give more data, or allow more.",
        )
    pairs = zip(report.layers, report.closest, strict=True)
    layers = [layer for layer, cosine in pairs if cosine > PARALLEL]
    if layers:
        yield Warning_(
            code="parallel_rows",
            message=f"Two different router rows are nearly parallel (cosine above {PARALLEL}) in "
            f"layers {', '.join(map(str, layers))}: their experts compete for the same tokens.",
            hint="Use more, or more different, data or prompts.",
        )
