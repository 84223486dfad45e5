"""Every tensor of the result in the order of writing: what plan and conversion share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from moe_convert.checkpoint import Source, TensorSpec
from moe_convert.families import layer_name, split_name
from moe_convert.ffn import Experts, Ffn, Weight
from moe_convert.plan.model import Layout, Step, bits
from moe_convert.targets import MoeShape
from moe_convert.targets.base import EMBEDDING
from moe_convert.wrappers import AROUND

Named = list[tuple[str, Weight]]


def lay_out(
    layout: Layout,
    weights: Mapping[str, Weight],
    make: Callable[[int], tuple[Experts, Weight]],
) -> Iterator[tuple[str, int | None, Named]]:
    """Yield the steps of a conversion: name, layer and every tensor, in the order of writing.

    `weights` are the source's tensors, and `make` returns experts and router of an MoE layer.
    """
    parts: dict[int | None, Named] = {}
    for name, weight in rest(layout, weights):
        parts.setdefault(split_name(name)[0], []).append((name, _cast(layout, name, weight)))
    around, stored = parts.get(None, []), layout.target.stored
    yield "before", None, stored([pair for pair in around if "embed" in pair[0]])
    for layer in range(layout.body.num_layers):
        named = parts.get(layer, []) + _ffn(layout, weights, make, layer)
        yield step_name(layer), layer, stored(named)
    yield "after", None, stored([pair for pair in around if "embed" not in pair[0]])


def step_name(layer: int) -> str:
    """Return what the step is called that writes a layer."""
    return f"layer {layer}"


def without_ffn(layout: Layout, weights: Mapping[str, Weight]) -> dict[int | None, Named]:
    """Return what is stored outside the FFNs: by layer, and under None what lies around them."""
    body, shape, target = layout.body, layout.shape, layout.target
    parts: dict[int | None, Named] = {n: [] for n in (None, *range(body.num_layers))}
    for name, weight in rest(layout, weights):
        if not name.startswith(AROUND):
            parts[split_name(name)[0]].append((name, _cast(layout, name, weight)))
    for layer in shape.moe_layers:
        extras = target.extras(body, shape, layout.dtype)
        parts[layer] += [(layer_name(layer, inside), weight) for inside, weight in extras.items()]
    return {layer: target.stored(named) for layer, named in parts.items()}


def _cast(layout: Layout, name: str, weight: Weight) -> Weight:
    wider = weight.stored is not None and bits(weight.dtype) > bits(layout.dtype)
    if name.startswith(AROUND) or (wider and layout.as_stored):
        return weight
    return weight.cast(layout.dtype)


def rest(layout: Layout, weights: Mapping[str, Weight]) -> Iterator[tuple[str, Weight]]:
    """Yield everything outside the FFNs as the target stores it."""
    for name, weight in layout.family.rest(weights, layout.body):
        yield from layout.target.place(name, weight, layout.body)
    if layout.untie:
        yield "lm_head.weight", weights[EMBEDDING]


def _ffn(
    layout: Layout,
    weights: Mapping[str, Weight],
    make: Callable[[int], tuple[Experts, Weight]],
    layer: int,
) -> Named:
    if layer in layout.shape.moe_layers:
        experts, router_ED = make(layer)
        target, body, shape = layout.target, layout.body, layout.shape
        return list(target.tensors(layer, experts, router_ED, body, shape))
    ffn = layout.family.ffn(layer, weights, layout.body).cast(layout.dtype)
    return list(layout.target.dense_tensors(layer, ffn))


def announce(layout: Layout, source: Source) -> Iterator[Step]:
    """Yield the steps with every tensor's name, shape and dtype, nothing read."""
    weights = {name: ref.weight() for name, ref in source.tensors.items()}
    shape, body, dtype = layout.shape, layout.body, layout.dtype
    router_ED = Weight.filled((shape.num_experts, body.hidden_size), 0.0, dtype)

    def blank(layer: int) -> tuple[Experts, Weight]:
        ffn = layout.family.ffn(layer, weights, body).cast(dtype)
        return blank_experts(ffn, shape), router_ED

    for name, layer, tensors in lay_out(layout, weights, blank):
        specs = tuple(TensorSpec(n, weight.shape, weight.dtype) for n, weight in tensors)
        yield Step(name, layer, specs)


def blank_experts(ffn: Ffn, shape: MoeShape) -> Experts:
    """Return experts of the right sizes whose values are never asked for."""
    routed = ffn.select(range(shape.expert_size))
    return Experts((routed,) * shape.num_experts, ffn.select(range(shape.shared_size)))
