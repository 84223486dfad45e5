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
from moe_convert.checkpoint.names import full_config
from moe_convert.compose import ExpertSource, distinct, notes, open_experts
from moe_convert.devices import DeviceRow, device_rows
from moe_convert.errors import DoesNotFitError, SourceError, UnsupportedError, UsageError
from moe_convert.experts import Compose
from moe_convert.families import Body, DenseFamily, find_family, split_name
from moe_convert.families.custom import CUSTOM, CustomFamily, custom_hint, find_custom
from moe_convert.ffn import TORCH_NAMES, Experts, Ffn, Weight
from moe_convert.inputs import check_inputs, input_notes
from moe_convert.recipe import DTYPES, Recipe, chosen_layers
from moe_convert.targets import TARGETS, MoeShape, MoeTarget, with_legacy_keys
from moe_convert.targets.base import EMBEDDING
from moe_convert.targets.custom import custom_target
from moe_convert.wrappers import AROUND, WrappedFamily, find_wrapped

LARGE_DROP = 0.5
CUSTOM_METHODS = ("clone", "split")
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
    """What decides names, shapes and dtypes of the result.

    With `as_stored` a tensor that the source holds in a wider dtype than the rest keeps it.
    """

    family: DenseFamily
    body: Body
    target: MoeTarget
    shape: MoeShape
    dtype: str
    untie: bool
    as_stored: bool = False


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
    experts: tuple[ExpertSource, ...] = ()

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
        unchanged = all(expert.same_as(self.source) for expert in self.experts)
        return unchanged and self.recipe.experts.exact(self.target, self.shape, neutral)

    @property
    def devices(self) -> tuple[DeviceRow, ...]:
        """What the result asks of several devices, by their number."""
        routed = [spec for spec in self.specs if self.target.is_routed(spec.name)]
        return device_rows(
            self.layout.body,
            self.shape,
            self.dtype,
            total_bytes=sum(spec.num_bytes for spec in self.specs),
            routed_bytes=sum(spec.num_bytes for spec in routed),
        )

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
    return plan_source(recipe, source, token)


def plan_source(recipe: Recipe, source: Source, token: str | None = None) -> Plan:
    """Resolve a recipe against an opened source; see `make_plan`."""
    source, family, body = _read(recipe, source)
    experts: tuple[ExpertSource, ...] = ()
    if isinstance(recipe.experts, Compose):

        def read(other: Source) -> tuple[Source, Body]:
            read_source, _, other_body = _read(recipe, other)
            return read_source, other_body

        experts = open_experts(recipe.experts, source, body, read, token)
    target, refused = choose_target(recipe, source, family, body)
    dtype = DTYPES.get(recipe.target.dtype, source.dtype)
    shape = choose_shape(recipe, family, body, target)
    check_inputs(recipe, shape, body.hidden_size, body.vocab_size, source.folder)
    untie = target.stock and body.tied and (recipe.output.compat or target.must_untie(body))
    as_stored = recipe.target.dtype == "auto"
    layout = Layout(family, body, target, shape, dtype, untie, as_stored)
    layout = _wide_enough(layout, source, chosen=recipe.target.dtype != "auto")
    if target.stock:
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
        experts=experts,
    )
    plan = replace(plan, estimate=_estimate(plan))
    return replace(plan, warnings=tuple(_warnings(plan)))


def _read(recipe: Recipe, source: Source) -> tuple[Source, DenseFamily, Body]:
    """Return the source with names that its family understands, the family and its body."""
    source, family, body = _understood(recipe, source)
    body = replace(
        body,
        tied=body.tied and "lm_head.weight" not in source.tensors,
        max_positions=min(body.max_positions, recipe.target.max_positions or body.max_positions),
    )
    return source, family, body


def _understood(recipe: Recipe, source: Source) -> tuple[Source, DenseFamily, Body]:
    if recipe.target.architecture != CUSTOM:
        wrapped = find_wrapped(source.config)
        family, body = wrapped or find_family(source.config)
        _check_tensors(source, stored_shapes(full_config(source.config)), family.unused)
        return wrapped[0].opened(source) if wrapped else source, family, body
    if recipe.target.max_positions is not None:
        raise UsageError("target.max_positions has no effect with --target custom.")
    if recipe.experts.method not in CUSTOM_METHODS:
        raise UsageError(
            f"--method {recipe.experts.method} is not proved with --target custom.",
            f"Use {' or '.join(CUSTOM_METHODS)}.",
        )
    if not all(edit.neutral for edit in recipe.experts.edits):
        raise UsageError(
            "Edits such as --noise need FFNs of gate, up and down, and those of custom targets may "
            "look otherwise."
        )
    custom, body = find_custom(source.config)
    source = custom.opened(source)
    _check_tensors(source, custom.expected(source.config))
    return source, custom, body


def choose_target(
    recipe: Recipe, source: Source, family: DenseFamily, body: Body
) -> tuple[MoeTarget, dict[str, list[str]]]:
    """Return the wanted target, or the first that fits, and why the others do not.

    Raises:
        UsageError: no such target.
        UnsupportedError: none fits; the sentence gives the reason of each.
    """
    wanted = recipe.target.architecture
    if isinstance(family, CustomFamily):
        return custom_target(family, source.config), {}
    rows = _rows(family)
    found = {name: rows[name].misfits(body) for name in family.targets}
    if wanted != "auto" and wanted not in rows:
        raise UsageError(
            f"There is no target {wanted!r}; expected auto, {CUSTOM} or one of "
            f"{', '.join(TARGETS)}."
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
        raise UnsupportedError(
            f"No target can hold this {family.model_type} exactly ({reasons}).",
            custom_hint(family.model_type),
        )
    wants_dense = len(chosen_layers(recipe.target.layers, body.num_layers)) < body.num_layers
    if wanted == "auto":
        able = [n for n in fitting if _suits(recipe, body, rows[n], wants_dense)]
        fitting = able or fitting
    return rows[fitting[0]], {name: why for name, why in found.items() if why}


def _rows(family: DenseFamily) -> Mapping[str, MoeTarget]:
    """Return the target rows by name, with those that only this checkpoint has."""
    if isinstance(family, WrappedFamily):
        return {**TARGETS, family.target.model_type: family.target}
    return TARGETS


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
        able = [name for name in family.targets if _rows(family)[name].shared != "none"]
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
        able = [name for name in family.targets if _rows(family)[name].allows_dense(shape)]
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
            f"The router of {target.model_type} shares weights between experts whose logits tie, "
            "so it cannot start from zeros.",
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
            f"{layout.target.model_type} stores with another value than {layout.family.model_type} "
            "does.",
            "Use --dtype fp32.",
        )
    return replace(layout, dtype="F32")


def _check_tensors(
    source: Source, expected: Mapping[str, tuple[int, ...]], unused: tuple[str, ...] = ()
) -> None:
    """Compare the headers with what transformers' own class stores for this config."""
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
    tied = full_config(source.config).tie_word_embeddings
    ignored = ("rotary_emb.inv_freq", "lm_head.weight") if tied else "rotary_emb.inv_freq"
    extra = sorted(
        n
        for n in source.tensors.keys() - expected.keys()
        if not n.endswith(ignored) and not n.startswith(unused)
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
        rest.setdefault(split_name(name)[0], []).append((name, _cast(layout, name, weight)))
    around, stored = rest.get(None, []), layout.target.stored
    yield "before", None, stored([pair for pair in around if "embed" in pair[0]])
    for layer in range(layout.body.num_layers):
        named = rest.get(layer, []) + _ffn(layout, weights, make, layer)
        yield f"layer {layer}", layer, stored(named)
    yield "after", None, stored([pair for pair in around if "embed" not in pair[0]])


def _cast(layout: Layout, name: str, weight: Weight) -> Weight:
    wider = weight.stored is not None and _bits(weight.dtype) > _bits(layout.dtype)
    if name.startswith(AROUND) or (wider and layout.as_stored):
        return weight
    return weight.cast(layout.dtype)


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

    def blank(layer: int) -> tuple[Experts, Weight]:
        ffn = layout.family.ffn(layer, weights, body).cast(dtype)
        return blank_experts(ffn, shape), router_ED

    for name, layer, tensors in lay_out(layout, weights, blank):
        specs = tuple(TensorSpec(n, weight.shape, weight.dtype) for n, weight in tensors)
        yield Step(name, layer, specs)


def blank_experts(ffn: Ffn, shape: MoeShape) -> Experts:
    """Return experts of the right sizes whose values are never asked for."""
    import torch

    routed = ffn.select(torch.arange(shape.expert_size))
    return Experts((routed,) * shape.num_experts, ffn.select(torch.arange(shape.shared_size)))


def _config(layout: Layout, compat: bool) -> dict[str, Any]:
    """Return config.json and make sure that transformers takes it."""
    target = layout.target
    config = {
        "architectures": [target.architecture],
        "model_type": target.model_type,
        "dtype": TORCH_NAMES[layout.dtype],
        **target.config(layout.body, layout.shape, layout.untie),
    }
    full_config(config)
    if not (compat and target.stock):
        return config
    return with_legacy_keys({**config, "torch_dtype": config["dtype"]})


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
    sources = [plan.source, *(e.source for e in distinct(plan.experts) if not e.adapter)]
    download = sum(source.download_bytes for source in sources)
    fetched = download + sum(source.unpack_bytes for source in sources)
    largest = max(_count(ref.shape) for ref in plan.source.tensors.values())
    params, dense = plan.params_total, plan.params_dense
    unpacking = 3 * max(source.unpack_bytes for source in sources)
    verify = 4 * max(params, dense) if plan.recipe.verify.enabled else 0
    quick, slow = (
        (output_bytes + fetched) / rate + verify / (10 * rate) for rate in WRITE_RATE[::-1]
    )
    folder = plan.output.absolute().parent
    while not folder.exists():
        folder = folder.parent
    return Estimate(
        download_bytes=download,
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
    if experts.method in {"clone", "compose"} and plan.exact and plan.shape.top_k > 1:
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


def _source_notes(plan: Plan) -> Iterator[Note]:
    """Say what is left out of a composition, and what the recipe itself has to say."""
    if isinstance(plan.recipe.experts, Compose):
        layout = plan.layout
        found = notes(plan.recipe.experts, plan.experts, plan.source, layout.family, layout.body)
        yield from (Note(*note) for note in found)
    yield from (Note(*note) for note in input_notes(plan.recipe))
    yield from (Note("recipe_note", text) for text in plan.recipe.notes)


def _warnings(plan: Plan) -> Iterator[Note]:
    shape, estimate = plan.shape, plan.estimate
    if shape.top_k == 1 and plan.target.weights_sum is not None:
        yield Note(
            "top1_renormalized",
            "With --top-k 1 the chosen expert always weighs one, so the router gets no gradient.",
            "Use --top-k 2 or more if you mean to train it.",
        )
    yield from _honesty(plan)
    yield from _source_notes(plan)
    family = plan.layout.family
    unused = [name for name in plan.source.tensors if name.startswith(family.unused)]
    if unused:
        yield Note(
            "unused",
            f"{unused[0]} and {len(unused) - 1} more tensors are left out: transformers loads them "
            "for no model of this type.",
        )
    if isinstance(family, WrappedFamily):
        yield Note("multimodal", family.path(plan.source.tensors))
    if not plan.target.stock:
        yield Note(
            "custom_code",
            "The result needs trust_remote_code=True, which runs the modelling file beside the "
            "weights, and no serving engine loads it.",
        )
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
