"""The plan: everything that a conversion will write, decided from headers before a tensor is read.

Every error that a user can cause is raised here. The conversion then writes the announced tensors
and no others.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from moe_convert.checkpoint import Shard, Source, TensorSpec, open_source, shard, stored_shapes
from moe_convert.errors import DoesNotFitError, SourceError, UnsupportedError, UsageError
from moe_convert.families import Body, DenseFamily, find_family, split_name
from moe_convert.ffn import TORCH_NAMES, Experts, Ffn, Weight
from moe_convert.recipe import DTYPES, Recipe, chosen_layers
from moe_convert.targets import TARGETS, MoeShape, MoeTarget, candidates, with_legacy_keys
from moe_convert.targets.base import EMBEDDING

LARGE_DROP = 0.5
GROUPED_MM_BYTES = 16
INTERPRETER_BYTES = 450 * 10**6
WRITE_RATE = (0.2e9, 2e9)
"""Bytes per second that disks are assumed to write, slowest and fastest."""


@dataclass(frozen=True)
class Note:
    """A warning: a stable code, one sentence, the remedy."""

    code: str
    message: str
    hint: str = ""


@dataclass(frozen=True)
class Estimate:
    """What the conversion will take; sizes in bytes, times in seconds (shortest, longest)."""

    download_bytes: int
    disk_bytes: int
    free_disk_bytes: int
    ram_bytes: int
    verify_ram_bytes: int
    free_ram_bytes: int
    time_s: tuple[float, float]

    @property
    def fits(self) -> bool:
        """Whether disk and memory suffice for the conversion."""
        return self.disk_bytes <= self.free_disk_bytes and self.ram_bytes <= self.free_ram_bytes

    @property
    def verify_fits(self) -> bool:
        """Whether the result can be loaded here to be compared with the dense model."""
        return self.verify_ram_bytes <= self.free_ram_bytes


@dataclass(frozen=True)
class Step:
    """A group of tensors that is written together: one decoder layer, or what lies around them."""

    name: str
    layer: int | None
    specs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Layout:
    """What decides names, shapes and dtypes of the result."""

    family: DenseFamily
    body: Body
    target: MoeTarget
    shape: MoeShape
    dtype: str
    untie: bool


@dataclass(frozen=True)
class Plan:
    """A resolved conversion."""

    recipe: Recipe
    source: Source
    layout: Layout
    config: Mapping[str, Any]
    output: Path
    steps: tuple[Step, ...]
    shards: tuple[Shard, ...]
    refused: Mapping[str, list[str]]
    params_active: int
    estimate: Estimate
    warnings: tuple[Note, ...]

    @property
    def target(self) -> MoeTarget:
        """The architecture of the result."""
        return self.layout.target

    @property
    def shape(self) -> MoeShape:
        """Number and size of the experts."""
        return self.layout.shape

    @property
    def dtype(self) -> str:
        """How weights are stored."""
        return self.layout.dtype

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """Every tensor of the result, in the order of writing."""
        return tuple(spec for step in self.steps for spec in step.specs)

    @property
    def params_total(self) -> int:
        """Parameters of the result."""
        return sum(_count(spec.shape) for spec in self.specs)

    @property
    def params_dense(self) -> int:
        """Parameters of the source."""
        return sum(_count(ref.shape) for ref in self.source.tensors.values())

    @property
    def exact(self) -> bool:
        """Whether the result must compute the dense function before any training."""
        neutral = self.recipe.router.kind == "zeros"
        return self.recipe.experts.exact(self.target, self.shape, neutral)

    @property
    def engines(self) -> dict[str, tuple[str, ...]]:
        """Each engine's known traps for these files."""
        return {e.name: e.notes(self.layout.body, self.shape) for e in self.target.engines}


def make_plan(recipe: Recipe, token: str | None = None) -> Plan:
    """Resolve a recipe against the headers of its source.

    Raises:
        UsageError: a choice is invalid for this model.
        SourceError: the source is missing, corrupt or unsupported.
    """
    source = open_source(recipe.source.model, recipe.source.revision, token)
    return plan_source(recipe, source)


def plan_source(recipe: Recipe, source: Source) -> Plan:
    """Resolve a recipe against an opened source; see `make_plan`."""
    family, body = find_family(source.config)
    _check_tensors(source)
    body = replace(
        body,
        tied=body.tied and "lm_head.weight" not in source.tensors,
        max_positions=min(body.max_positions, recipe.target.max_positions or body.max_positions),
    )
    target, refused = choose_target(recipe, family, body)
    dtype = DTYPES.get(recipe.target.dtype, source.dtype)
    shape = choose_shape(recipe, family, body, target)
    untie = body.tied and (recipe.output.compat or target.must_untie(body))
    layout = Layout(family, body, target, shape, dtype, untie)
    layout = _wide_enough(layout, source, chosen=recipe.target.dtype != "auto")
    _check_width(shape, body, layout.dtype)
    steps = tuple(announce(layout, source))
    specs = [spec for step in steps for spec in step.specs]
    plan = Plan(
        recipe=recipe,
        source=source,
        layout=layout,
        config=_config(layout, recipe.output.compat),
        output=output_folder(recipe, source, shape),
        steps=steps,
        shards=shard(specs, recipe.output.max_shard_bytes),
        refused=refused,
        params_active=_active(specs, target, shape),
        estimate=_EMPTY,
        warnings=(),
    )
    plan = replace(plan, estimate=_estimate(plan))
    return replace(plan, warnings=tuple(_warnings(plan)))


def choose_target(
    recipe: Recipe, family: DenseFamily, body: Body
) -> tuple[MoeTarget, dict[str, list[str]]]:
    """Return the wanted target, or the first that fits, and why the others do not.

    Raises:
        UsageError: no such target.
        UnsupportedError: none fits; the sentence gives the reason of each.
    """
    wanted = recipe.target.architecture
    found = candidates(family, body)
    if wanted != "auto" and wanted not in TARGETS:
        raise UsageError(
            f"There is no target {wanted!r}; expected auto or one of {', '.join(TARGETS)}."
        )
    if wanted != "auto" and wanted not in found:
        raise UnsupportedError(
            f"{wanted} is not proved to hold a {family.model_type}.",
            f"Use one of {', '.join(found)}.",
        )
    names = [wanted] if wanted != "auto" else list(found)
    fitting = [name for name in names if not found[name]] or [""]
    if not fitting[0]:
        reasons = "; ".join(f"{name}: {', '.join(found[name])}" for name in names)
        raise UnsupportedError(f"No target can hold this {family.model_type} exactly ({reasons}).")
    wants_dense = len(chosen_layers(recipe.target.layers, body.num_layers)) < body.num_layers
    if wanted == "auto":
        able = [n for n in fitting if _suits(recipe, body, TARGETS[n], wants_dense)]
        fitting = able or fitting
    return TARGETS[fitting[0]], {name: why for name, why in found.items() if why}


def _suits(recipe: Recipe, body: Body, target: MoeTarget, wants_dense: bool) -> bool:
    shared_size = recipe.experts.shared_size(body.ffn_size, 1, recipe.target.shared_experts)
    shared = target.shared != "none" or not shared_size
    return shared and (target.dense_layers != "none" or not wants_dense)


def choose_shape(recipe: Recipe, family: DenseFamily, body: Body, target: MoeTarget) -> MoeShape:
    """Return sizes and layers of the experts.

    Raises:
        UsageError: counts are impossible, or the target has no place for them.
    """
    wanted = recipe.target
    if wanted.num_experts < 2:
        raise UsageError(f"An MoE needs at least 2 experts, got --experts {wanted.num_experts}.")
    if not 1 <= wanted.top_k <= wanted.num_experts:
        raise UsageError(
            f"--top-k {wanted.top_k} is outside 1..{wanted.num_experts}, the number of experts."
        )
    if wanted.shared_experts > 1 and target.shared == "one":
        raise UsageError(
            f"{target.model_type} has one shared expert, got --shared-experts "
            f"{wanted.shared_experts}.",
            "Use --shared-experts 1.",
        )
    _check_fixed_router(recipe, target)
    try:
        layers = chosen_layers(wanted.layers, body.num_layers)
    except ValueError as error:
        raise UsageError(f"--layers: {error}.") from error
    if not layers:
        raise UsageError(f"--layers {wanted.layers} chooses no layer of {body.num_layers}.")
    size = recipe.experts.expert_size(body.ffn_size, wanted.num_experts + wanted.shared_experts)
    shared_size = recipe.experts.shared_size(body.ffn_size, size, wanted.shared_experts)
    if shared_size and target.shared == "none":
        able = [name for name in family.targets if TARGETS[name].shared != "none"]
        raise UsageError(
            f"{target.model_type} has no shared experts.",
            f"Use --target {' or '.join(able)}." if able else "",
        )
    shape = MoeShape(
        num_experts=wanted.num_experts,
        top_k=wanted.top_k,
        expert_size=size,
        shared_size=shared_size,
        dense_size=body.ffn_size,
        num_layers=body.num_layers,
        moe_layers=layers,
        num_groups=wanted.num_groups,
        top_groups=wanted.top_groups,
    )
    _check_groups(shape, target)
    recipe.experts.check(body.ffn_size, target, shape)
    shape = replace(shape, routed_scale=recipe.experts.routed_scale(target, shape))
    if not target.allows_dense(shape):
        able = [name for name in family.targets if TARGETS[name].allows_dense(shape)]
        raise UsageError(
            f"{target.model_type} cannot keep layers {list(shape.dense_layers)} dense.",
            f"Targets that can: {', '.join(able) or 'none'}.",
        )
    return shape


def _check_fixed_router(recipe: Recipe, target: MoeTarget) -> None:
    if target.fixed_top_k is None:
        return
    if recipe.target.top_k != target.fixed_top_k:
        raise UsageError(
            f"{target.model_type} always uses {target.fixed_top_k} experts per token, got --top-k "
            f"{recipe.target.top_k}.",
            f"Use --top-k {target.fixed_top_k}.",
        )
    if recipe.router.kind == "zeros":
        raise UsageError(
            f"The router of {target.model_type} shares weights between experts whose logits tie, so "
            "it cannot start from zeros.",
            "Use --router normal.",
        )


def _check_groups(shape: MoeShape, target: MoeTarget) -> None:
    groups, best = shape.num_groups, shape.top_groups
    if groups == 1 and best == 1:
        return
    if not target.groups:
        able = ", ".join(name for name, row in TARGETS.items() if row.groups)
        raise UsageError(
            f"{target.model_type} has no expert groups.", f"Targets with groups: {able}."
        )
    size = shape.num_experts // groups
    if shape.num_experts % groups or size < 2 or not 1 <= best <= groups:
        raise UsageError(
            f"{shape.num_experts} experts do not form {groups} groups of two or more, of which "
            f"{best} may be used."
        )
    if best * size < shape.top_k:
        raise UsageError(
            f"The best {best} of {groups} groups hold {best * size} experts, and --top-k asks for "
            f"{shape.top_k}.",
            "Raise target.top_groups.",
        )


def _check_width(shape: MoeShape, body: Body, dtype: str) -> None:
    multiple = GROUPED_MM_BYTES * 8 // _bits(dtype)
    for what, size in (("expert", shape.expert_size), ("hidden", body.hidden_size)):
        if size % multiple:
            raise UsageError(
                f"The {what} size {size} is not a multiple of {multiple}, which grouped matrix "
                f"products need in {TORCH_NAMES[dtype]}.",
                "Use --dtype fp32." if size % 4 == 0 else "",
            )


def _wide_enough(layout: Layout, source: Source, chosen: bool) -> Layout:
    """Store everything in fp32 where arithmetic on tensors, such as 1 + w, needs its bits.

    Raises:
        UsageError: a narrower dtype was asked for.
    """
    weights = {name: ref.weight() for name, ref in source.tensors.items()}
    computed = [name for name, weight in _rest(layout, weights) if weight.rounds]
    if not computed or layout.dtype in {"F32", "F64"}:
        return layout
    if chosen:
        raise UsageError(
            f"{TORCH_NAMES[layout.dtype]} cannot hold {computed[0]} exactly, which "
            f"{layout.target.model_type} stores with another value than {layout.family.model_type}.",
            "Use --dtype fp32.",
        )
    return replace(layout, dtype="F32")


def _check_tensors(source: Source) -> None:
    """Compare the headers with what transformers' own class stores for this config."""
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[str(source.config["model_type"])].from_dict(dict(source.config))
    expected = stored_shapes(config)
    for name, shape in expected.items():
        ref = source.tensors.get(name)
        if ref is None:
            raise SourceError(f"The checkpoint has no tensor {name}.", "Download it again.")
        if ref.shape != shape:
            raise SourceError(
                f"Tensor {name} has shape {list(ref.shape)}, and config.json means {list(shape)}."
            )
        if ref.dtype not in TORCH_NAMES:
            raise SourceError(
                f"Tensor {name} has dtype {ref.dtype}, expected one of {', '.join(TORCH_NAMES)}."
            )
    head = {"lm_head.weight"} if config.tie_word_embeddings else set()
    extra = sorted(
        n for n in source.tensors.keys() - expected.keys() - head if "rotary_emb.inv_freq" not in n
    )
    if extra:
        raise SourceError(
            f"The checkpoint holds {extra[0]} ({len(extra)} such tensors), which its config.json "
            "does not account for."
        )


Named = list[tuple[str, Weight]]


def lay_out(
    layout: Layout,
    weights: Mapping[str, Weight],
    make: Callable[[int], tuple[Experts, Weight]],
) -> Iterator[tuple[str, int | None, Named]]:
    """Yield the steps of a conversion: name, layer and every tensor, in the order of writing.

    `weights` are the source's tensors, and `make` returns experts and router of an MoE layer.
    """
    rest: dict[int | None, Named] = {}
    for name, weight in _rest(layout, weights):
        rest.setdefault(split_name(name)[0], []).append((name, weight.cast(layout.dtype)))
    around, stored = rest.get(None, []), layout.target.stored
    yield "before", None, stored([pair for pair in around if "embed" in pair[0]])
    for layer in range(layout.body.num_layers):
        named = rest.get(layer, []) + _ffn(layout, weights, make, layer)
        yield f"layer {layer}", layer, stored(named)
    yield "after", None, stored([pair for pair in around if "embed" not in pair[0]])


def _rest(layout: Layout, weights: Mapping[str, Weight]) -> Iterator[tuple[str, Weight]]:
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
    blank = blank_experts(body, shape, dtype)
    for name, layer, tensors in lay_out(layout, weights, lambda _: (blank, router_ED)):
        specs = tuple(TensorSpec(n, weight.shape, weight.dtype) for n, weight in tensors)
        yield Step(name, layer, specs)


def blank_experts(body: Body, shape: MoeShape, dtype: str) -> Experts:
    """Return experts of the right sizes whose values are never asked for."""

    def ffn(neurons: int) -> Ffn:
        wide = Weight.filled((neurons, body.hidden_size), 0.0, dtype)
        return Ffn(wide, wide, Weight.filled((body.hidden_size, neurons), 0.0, dtype), body.act)

    return Experts((ffn(shape.expert_size),) * shape.num_experts, ffn(shape.shared_size))


def _config(layout: Layout, compat: bool) -> dict[str, Any]:
    """Return config.json and make sure that transformers takes it."""
    from transformers import CONFIG_MAPPING

    target = layout.target
    config = {
        "architectures": [target.architecture],
        "model_type": target.model_type,
        "dtype": TORCH_NAMES[layout.dtype],
        **target.config(layout.body, layout.shape, layout.untie),
    }
    CONFIG_MAPPING[target.model_type].from_dict(dict(config))
    return with_legacy_keys({**config, "torch_dtype": config["dtype"]}) if compat else config


def output_folder(recipe: Recipe, source: Source, shape: MoeShape) -> Path:
    """Return where the result goes."""
    if recipe.output.dir:
        return Path(recipe.output.dir).expanduser()
    stem = source.name.rsplit("/", 1)[-1].removesuffix(".gguf")
    return Path(f"{stem}-moe-{shape.num_experts}x-k{shape.top_k}")


def _active(specs: list[TensorSpec], target: MoeTarget, shape: MoeShape) -> int:
    """Return the parameters that one token uses."""
    active = 0
    for spec in specs:
        used = shape.top_k if target.is_routed(spec.name) else shape.num_experts
        active += _count(spec.shape) * used
    return active // shape.num_experts


def _count(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _bits(dtype: str) -> int:
    return {"F32": 32, "F64": 64}.get(dtype, 16)


_EMPTY = Estimate(0, 0, 0, 0, 0, 0, (0.0, 0.0))


def _estimate(plan: Plan) -> Estimate:
    output_bytes = sum(shard.num_bytes for shard in plan.shards)
    fetched = plan.source.download_bytes + plan.source.unpack_bytes
    largest = max(_count(ref.shape) for ref in plan.source.tensors.values())
    params, dense = plan.params_total, plan.params_dense
    unpacking = 3 * plan.source.unpack_bytes
    verify = 4 * max(params, dense) if plan.recipe.verify.enabled else 0
    quick, slow = (
        (output_bytes + fetched) / rate + verify / (10 * rate) for rate in WRITE_RATE[::-1]
    )
    folder = plan.output.absolute().parent
    while not folder.exists():
        folder = folder.parent
    return Estimate(
        download_bytes=plan.source.download_bytes,
        disk_bytes=output_bytes + fetched,
        free_disk_bytes=shutil.disk_usage(folder).free,
        ram_bytes=INTERPRETER_BYTES + max(unpacking, 8 * largest),
        verify_ram_bytes=INTERPRETER_BYTES + verify,
        free_ram_bytes=available_ram_bytes(),
        time_s=(round(quick, 1), round(slow, 1)),
    )


def available_ram_bytes() -> int:
    """Return the memory that new processes can use."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        fields = dict(line.split(":") for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_fits(plan: Plan, force: bool) -> None:
    """Refuse to begin what cannot end.

    Raises:
        DoesNotFitError: disk or memory is too small and `force` is off.
    """
    estimate = plan.estimate
    needs = (
        ("disk", estimate.disk_bytes, estimate.free_disk_bytes),
        ("memory", estimate.ram_bytes, estimate.free_ram_bytes),
    )
    for what, needed, free in needs:
        if needed > free and not force:
            raise DoesNotFitError(
                f"The conversion needs {needed / 1e9:.1f} GB of {what}, and {free / 1e9:.1f} GB "
                "are free.",
                "Use fewer experts or a smaller --dtype, or --force to try all the same.",
            )


def _honesty(plan: Plan) -> Iterator[Note]:
    """Say where training afterwards cannot do what a user may hope."""
    experts = plan.recipe.experts
    if experts.method == "clone" and plan.exact and plan.shape.top_k > 1:
        yield Note(
            "equal_experts",
            "All experts are equal, so the language-model loss gives the router no gradient: "
            "training routers alone can teach nothing but balance.",
            "Train the experts too, or add --noise or --drop-ratio.",
        )
    for edit in experts.edits:
        if edit.edit == "drop" and edit.ratio >= LARGE_DROP:
            yield Note(
                "large_drop",
                f"Re-initialising {edit.ratio:.0%} of the neurons pays only after tens of billions "
                "of tokens (arXiv 2502.19261).",
                "For a short run use a smaller ratio or --noise.",
            )


def _warnings(plan: Plan) -> Iterator[Note]:
    shape, estimate = plan.shape, plan.estimate
    if shape.top_k == 1 and plan.target.weights_sum is not None:
        yield Note(
            "top1_renormalized",
            "With --top-k 1 the chosen expert always weighs one, so the router gets no gradient.",
            "Use --top-k 2 or more if you mean to train it.",
        )
    yield from _honesty(plan)
    if plan.recipe.router.kind == "zeros":
        yield Note(
            "zero_router",
            "A zero router sends every token to the first experts until it is trained.",
            "Use --router normal for a spread from the start.",
        )
    if not estimate.fits:
        yield Note("does_not_fit", "The conversion does not fit on this machine; see the estimate.")
    if plan.recipe.verify.enabled and not estimate.verify_fits:
        yield Note(
            "verify_skipped",
            f"The result needs {estimate.verify_ram_bytes / 1e9:.1f} GB of memory to be compared "
            "with the dense model, so that check will be left out here.",
            "Run `moe-convert verify` on a larger machine.",
        )
    if plan.dtype != plan.source.dtype and plan.recipe.target.dtype == "auto":
        yield Note(
            "widened",
            f"{plan.target.model_type} stores some tensors with another value than "
            f"{plan.layout.family.model_type}, which {TORCH_NAMES[plan.source.dtype]} cannot hold "
            "exactly, so everything is written in float32.",
        )
    elif plan.dtype != plan.source.dtype:
        yield Note(
            "cast",
            f"Weights are rounded from {TORCH_NAMES[plan.source.dtype]} to "
            f"{TORCH_NAMES[plan.dtype]}; parity is checked against the rounded dense model.",
        )
