"""What makes the layers of a conversion: by slicing the source's weights, or along two streams.

D hidden size · E routed experts
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from moe_convert.checkpoint import CheckpointWriter, Source
from moe_convert.edits import edited
from moe_convert.experts import Learned
from moe_convert.ffn import Experts, Weight, gather
from moe_convert.inputs import Inputs
from moe_convert.manifest import SplitReport
from moe_convert.plan import Plan
from moe_convert.plan.layout import Named, step_name
from moe_convert.routers import Routed
from moe_convert.routing import RouterMaker
from moe_convert.runtime import chosen_device
from moe_convert.splitting import Splitter

if TYPE_CHECKING:
    from moe_convert.learning import Progress


class Maker(Protocol):
    """Makes experts and router of one layer after the other."""

    def __call__(self, layer: int) -> tuple[Experts, Weight]:
        """Return the layer's experts and router rows [E, D]."""

    def pass_over(self, layer: int | None, tensors: Named) -> None:
        """Take note of a step that an earlier run wrote; `tensors` are what lies in the files."""

    def leave(self, layer: int | None, tensors: Named) -> None:
        """Take note of a step that is written."""

    @property
    def found(self) -> Mapping[int, Routed]:
        """What the routers do with the data, by layer."""

    @property
    def report(self) -> SplitReport | None:
        """What fitting to data showed."""

    def close(self) -> None:
        """Remove what was put on disk for the way; found and report stay."""


class LayerMaker:
    """Makes layers whose weights are copied, sliced or changed one by one."""

    report = None

    def __init__(self, plan: Plan, local: Source, routers: RouterMaker) -> None:
        """Prepare; nothing is read or run yet."""
        self._plan, self._routers = plan, routers
        self._base = {name: ref.weight() for name, ref in local.tensors.items()}

    def __call__(self, layer: int) -> tuple[Experts, Weight]:
        """Return the layer's experts and router rows [E, D], lazily loaded."""
        plan = self._plan
        layout, shape = plan.layout, plan.shape
        dense = layout.family.ffn(layer, self._base, layout.body).cast(plan.dtype)
        others = (e.ffn(layer, layout.family, plan.dtype) for e in plan.experts)
        method = plan.recipe.experts
        assignment = method.assign(dense.num_neurons, plan.target, shape, layer)
        experts = gather((dense, *others), assignment)
        experts = edited(experts, method.edits, method.seed, layer)
        size = (shape.num_experts, layout.body.hidden_size)
        return experts, Weight(size, plan.dtype, lambda: self._routers(layer))

    def pass_over(self, layer: int | None, tensors: Named) -> None:
        """Measure the router of a layer that an earlier run wrote, for the report."""
        if layer in self._plan.shape.moe_layers:
            self._routers(layer)

    def leave(self, layer: int | None, tensors: Named) -> None:
        """Nothing follows from what was written."""

    @property
    def found(self) -> Mapping[int, Routed]:
        """What the routers do with the data, by layer."""
        return self._routers.found

    def close(self) -> None:
        """Nothing was put on disk."""


def layer_maker(
    plan: Plan,
    local: Source,
    weights: Mapping[str, Weight],
    inputs: Inputs | None,
    writer: CheckpointWriter,
    progress: Progress,
) -> Maker:
    """Return what makes the layers of a plan; `writer` knows which of them are finished.

    What must be learned on the whole model is learned here: nothing, if every expert is chosen.

    Raises:
        UsageError: the device is not there.
    """
    if not plan.recipe.carves:
        return LayerMaker(plan, local, RouterMaker(plan, local, weights, inputs))
    assert inputs is not None
    device = chosen_device(plan.recipe.runtime.device)

    def is_written(layer: int) -> bool:
        return writer.has(step_name(layer))

    learned, chosen = None, plan.shape.top_k < plan.shape.num_experts
    if isinstance(plan.recipe.experts, Learned) and chosen:
        from moe_convert.learning import learn

        learned = learn(plan, local, weights, inputs.data_BT, writer.folder, device, progress)
    return Splitter(plan, local, weights, inputs, is_written, device, learned)
