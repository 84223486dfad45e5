"""Which layers of a split stay dense: how far the model's answers move if one layer alone is split.

The dense model runs once, layer by layer. At each one a branch leaves it, in which that layer's FFN
is carved by the plan's strategy and router, without edits and selection biases; the branch goes on
through the dense layers behind. What counts is the final distribution: an error measured at the
layer itself says little, for some layers' outputs matter far more than others'.

B rows · T tokens · D hidden size · E routed experts
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Literal

from moe_convert.carving import PORTION, Carved
from moe_convert.checkpoint import Source
from moe_convert.experts import Split
from moe_convert.ffn import FfnSample, Neurons, Weight
from moe_convert.inputs import Inputs
from moe_convert.manifest import Sensitivity
from moe_convert.plan import Plan, most_dense, with_layers
from moe_convert.recipe import MEASURED
from moe_convert.routers import States
from moe_convert.runtime import chosen_device, exact_products, products
from moe_convert.splitting import layer_gradients
from moe_convert.streams import BranchedStream, DenseStream

if TYPE_CHECKING:
    import torch

KEPT_NAME = ".layers"
"""The file in which a conversion that goes on finds what was decided before."""
BAR = 2.0
"""How many times the median hurt a layer's own must be for it to stay dense."""


def settled(
    plan: Plan,
    local: Source,
    weights: Mapping[str, Weight],
    inputs: Inputs | None,
    folder: Path,
    progress: Callable[[str, int, int], None],
) -> tuple[Plan, Sensitivity | None]:
    """Return the plan with its layers decided, and what they were decided by, if it left them open.

    The decision is kept in `folder`, which is that of this very plan, and made no second time.
    """
    if plan.recipe.target.layers != MEASURED:
        return plan, None
    assert inputs is not None
    path = folder / KEPT_NAME
    if path.is_file():
        found = Sensitivity.model_validate_json(path.read_text(encoding="utf-8"))
    else:
        found = measure(plan, local, weights, inputs, progress)
        partial = path.with_suffix(".partial")
        partial.write_text(found.model_dump_json(), encoding="utf-8")
        partial.replace(path)
    moe_layers = [n for n in plan.shape.moe_layers if n not in found.dense_layers]
    return with_layers(plan, moe_layers), found


def measure(
    plan: Plan,
    local: Source,
    weights: Mapping[str, Weight],
    inputs: Inputs,
    progress: Callable[[str, int, int], None],
) -> Sensitivity:
    """Return what splitting each layer alone does to the model, and which layers stay dense."""
    rule = plan.target.dense_layers
    assert rule != "none"
    fitted_BT, judged_BT = inputs.samples
    hurt = hurts(plan, local, weights, fitted_BT, judged_BT, progress)
    return Sensitivity(
        tokens=judged_BT.numel(),
        kl=hurt,
        bar=BAR * median(hurt),
        dense_layers=list(stay_dense(hurt, rule)),
    )


def hurts(
    plan: Plan,
    local: Source,
    weights: Mapping[str, Weight],
    fitted_BT: torch.Tensor,
    judged_BT: torch.Tensor,
    progress: Callable[[str, int, int], None],
) -> list[float]:
    """Return KL(dense ‖ one layer split) of a token in nats on `judged_BT`, layer by layer."""
    import torch

    runtime, family = plan.recipe.runtime, plan.layout.family
    device, num_layers = chosen_device(runtime.device), plan.layout.body.num_layers
    with (
        closing(layer_gradients(local, plan, fitted_BT, device)) as gradients,
        torch.no_grad(),
        products(device, runtime.precision),
    ):
        fit = DenseStream(local.config, family, weights, fitted_BT, device)
        judge = BranchedStream(local.config, family, weights, judged_BT, device)
        for layer in range(num_layers):
            gradient = gradients.loaders[layer] if gradients.loaders else None
            ffn = family.ffn(layer, weights, plan.layout.body)
            neurons = Neurons.of(ffn.cast(plan.dtype), device)
            sample = _sample(neurons, fit.reach(layer), fitted_BT.shape[1], gradient)
            judge.branch(layer, _carved(plan, layer, neurons, sample))
            progress("layers", (layer + 1) * (layer + 2), num_layers * (num_layers + 1))
        return judge.divergences()


def _sample(
    neurons: Neurons,
    x_TD: torch.Tensor,
    row_length: int,
    gradient_TD: Callable[[], torch.Tensor] | None,
) -> FfnSample:
    """Return what an FFN receives and gives in the dense model."""
    import torch

    given = [
        neurons.hidden(part_TD) @ neurons.down_DF.T
        for part_TD in x_TD.split(PORTION[x_TD.device.type])
    ]
    given_TD = torch.cat(given)
    return FfnSample(x_TD, x_TD, given_TD, row_length, gradient_TD, lambda: given_TD)


def _carved(plan: Plan, layer: int, neurons: Neurons, sample: FfnSample) -> Carved:
    """Carve a layer by the plan's strategy and router, and leave its values as they are.

    Every token gets the experts that the router alone prefers, and as many as any other.
    """
    method, router = plan.recipe.experts, plan.recipe.router
    shape = plan.shape.without_nulls
    assert isinstance(method, Split)
    with exact_products(sample.x_TD.device.type):
        grouping = method.group(shape, layer, neurons, sample)
        seed = router.seed * 100_003 + layer
        if router.fitted:
            rows_ED = router.fit(neurons, grouping, sample.x_TD, seed)
        else:
            size = (shape.num_experts, plan.layout.body.hidden_size)
            rows_ED = router.rows(*size, layer, States(sample.x_TD.cpu()))
    return Carved.of(neurons, grouping, rows_ED, shape.used_k)


def stay_dense(hurt: Sequence[float], rule: Literal["prefix", "any"]) -> tuple[int, ...]:
    """Return the layers that stay dense: those that hurt `BAR` times the median, at most a quarter.

    Where only the first layers can, it is the longest run of them that ends in such a layer and
    whose mean is above the same bar.
    """
    bar, most = BAR * median(hurt), most_dense(len(hurt))
    over = [layer for layer, value in enumerate(hurt) if value > bar]
    if rule == "any":
        return tuple(sorted(sorted(over, key=lambda layer: -hurt[layer])[:most]))
    lengths = [layer + 1 for layer in over if layer < most]
    paid = [length for length in lengths if sum(hurt[:length]) > bar * length]
    return tuple(range(max(paid, default=0)))
