"""From a recipe and the headers of its source to a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe_convert.calibration import Made, check, resolved
from moe_convert.checkpoint import Source, TensorSpec, open_source, shard, stored_shapes
from moe_convert.checkpoint.configs import Filled, aside, filled
from moe_convert.checkpoint.names import full_config
from moe_convert.compose import ExpertSource, open_experts
from moe_convert.errors import SourceError, UnsupportedError, UsageError
from moe_convert.experts import Compose
from moe_convert.families import Body, DenseFamily, find_family
from moe_convert.families.body import shortened
from moe_convert.families.custom import CUSTOM, find_custom
from moe_convert.families.shapes import stored
from moe_convert.ffn import TORCH_NAMES
from moe_convert.inputs import check_inputs
from moe_convert.plan.choices import choose_shape, choose_target, most_dense, with_counts
from moe_convert.plan.estimate import check_offload, estimate
from moe_convert.plan.layout import announce, rest
from moe_convert.plan.model import GROUPED_MM_BYTES, Estimate, Layout, Plan, bits, count
from moe_convert.plan.notes import warnings
from moe_convert.recipe import DTYPES, MEASURED, Recipe
from moe_convert.targets import MoeShape, MoeTarget, with_legacy_keys
from moe_convert.wrappers import find_wrapped

CUSTOM_METHODS = ("clone", "split")


def make_plan(recipe: Recipe, token: str | None = None, *, only_plan: bool = False) -> Plan:
    """Resolve a recipe against the headers of its source.

    With `only_plan` no conversion follows, which would need all of transformers anyway.

    Raises:
        UsageError: a choice is invalid for this model.
        SourceError: the source is missing, corrupt or unsupported.
    """
    wanted = recipe.source
    source = open_source(wanted.model, wanted.revision, token, wanted.download)
    if not wanted.download and source.revision is None:
        raise UsageError(
            f"--no-download has no effect: {source.name} is not on the Hub.", "Leave it out."
        )
    if source.streamed and recipe.data.is_self:
        raise UsageError(
            "The source can only write text with its weights on this disk, and --no-download "
            "leaves them on the Hub.",
            "Give text with --data, or leave --no-download out.",
        )
    runs_models = recipe.verify.enabled or recipe.needs_input
    light = aside(torch_follows=not only_plan) if only_plan or not runs_models else None
    with light or nullcontext(filled) as fill:
        return plan_source(recipe, source, token, fill)


def plan_source(
    recipe: Recipe, source: Source, token: str | None = None, fill: Filled = filled
) -> Plan:
    """Resolve a recipe against an opened source; see `make_plan`."""
    source, family, body = _read(recipe, source, fill)
    experts: tuple[ExpertSource, ...] = ()
    if isinstance(recipe.experts, Compose):

        def read(other: Source) -> tuple[Source, Body]:
            read_source, _, other_body = _read(recipe, other, fill)
            return read_source, other_body

        reach = (token, recipe.source.download)
        experts = open_experts(recipe.experts, source, body, read, *reach)
    dtype = DTYPES.get(recipe.target.dtype, source.dtype)
    recipe = with_counts(recipe, body, dtype)
    target, refused = choose_target(recipe, source, family, body)
    target = target.compatible(target, body) if recipe.output.compat else target
    shape = choose_shape(recipe, family, body, target)
    check_offload(recipe)
    check_inputs(recipe, shape, body.hidden_size, body.vocab_size, source.folder)
    untie = target.stock and body.tied and (recipe.output.compat or target.must_untie(body))
    as_stored = recipe.target.dtype == "auto"
    layout = Layout(family, body, target, shape, dtype, untie, as_stored)
    plan = _assembled(recipe, source, layout, refused, experts, fill)
    if recipe.calibration.enabled:
        _check_calibration(plan)
    if recipe.target.layers != MEASURED:
        return plan
    most = most_dense(body.num_layers)
    densest = with_layers(plan, range(most, body.num_layers), fill)
    return _weighed(replace(plan, densest=densest))


def with_layers(plan: Plan, layers: Sequence[int], fill: Filled = filled) -> Plan:
    """Return the plan in which exactly these layers get experts."""
    target = plan.recipe.target.model_copy(update={"layers": list(layers)})
    recipe = plan.recipe.model_copy(update={"target": target})
    shape = replace(plan.shape, moe_layers=tuple(layers))
    layout = replace(plan.layout, shape=shape)
    return _assembled(recipe, plan.source, layout, plan.refused, plan.experts, fill)


def _assembled(
    recipe: Recipe,
    source: Source,
    layout: Layout,
    refused: Mapping[str, list[str]],
    experts: tuple[ExpertSource, ...],
    fill: Filled,
) -> Plan:
    """Return the plan of a layout: every tensor, its place, and what that takes."""
    layout = _wide_enough(layout, source, chosen=recipe.target.dtype != "auto")
    target, shape = layout.target, layout.shape
    if target.stock:
        _check_width(shape, layout.body, layout.dtype)
    steps = tuple(announce(layout, source))
    specs = [spec for step in steps for spec in step.specs]
    plan = Plan(
        recipe=recipe,
        source=source,
        layout=layout,
        config=_config(layout, recipe.output.compat, fill),
        output=output_folder(recipe, source, shape),
        steps=steps,
        shards=shard(specs, recipe.output.max_shard_bytes),
        refused=refused,
        params_active=_active(specs, target, shape),
        estimate=_EMPTY,
        warnings=(),
        experts=experts,
    )
    return _weighed(plan)


def _weighed(plan: Plan) -> Plan:
    """Return the plan with what it takes and what to know of it."""
    plan = replace(plan, estimate=estimate(plan))
    return replace(plan, warnings=tuple(warnings(plan)))


def _check_calibration(plan: Plan) -> None:
    """Refuse to calibrate in a way that cannot work, before anything is written."""
    recipe, target = plan.recipe, plan.target
    biased = any(target.keeps_dtype(spec.name) for spec in plan.specs)
    made = Made(
        recipe.experts,
        target,
        plan.exact,
        plan.shape.top_k,
        plan.shape.num_experts,
        plan.shape.expert_size,
        selection_bias=biased,
        null_experts=plan.shape.null_experts,
    )
    check(resolved(recipe.calibration, made, gpu=False), made)


def _read(recipe: Recipe, source: Source, fill: Filled) -> tuple[Source, DenseFamily, Body]:
    """Return the source with names that its family understands, the family and its body."""
    source, family, body = _understood(recipe, source, fill)
    body = replace(body, tied=body.tied and "lm_head.weight" not in source.tensors)
    if recipe.target.max_positions is not None:
        body = shortened(body, recipe.target.max_positions)
    return source, family, body


def _understood(recipe: Recipe, source: Source, fill: Filled) -> tuple[Source, DenseFamily, Body]:
    if recipe.target.architecture != CUSTOM:
        wrapped = find_wrapped(source.config)
        family, body = wrapped or find_family(source.config, fill)
        known = None if wrapped else stored(family, body)
        if known is None or _complaint(source, known, body.tied, family.unused):
            _check_tensors(source, stored_shapes(full_config(source.config)), family.unused)
        return wrapped[0].opened(source) if wrapped else source, family, body
    if recipe.target.max_positions is not None:
        raise UsageError("target.max_positions has no effect with --target custom.")
    if recipe.experts.method not in CUSTOM_METHODS:
        raise UsageError(
            f"--method {recipe.experts.method} is not proved with --target custom.",
            f"Use {' or '.join(CUSTOM_METHODS)}.",
        )
    if recipe.carves:
        raise UnsupportedError(
            "What splits an FFN by its weights or by data needs gate, up and down, and those of "
            "custom targets may look otherwise.",
            "Use --strategy contiguous or random.",
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


def _check_width(shape: MoeShape, body: Body, dtype: str) -> None:
    multiple = GROUPED_MM_BYTES * 8 // bits(dtype)
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
    computed = [name for name, weight in rest(layout, weights) if weight.rounds]
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
    tied = bool(full_config(source.config).tie_word_embeddings)
    complaint = _complaint(source, expected, tied, unused)
    if complaint is not None:
        raise complaint


def _complaint(
    source: Source, expected: Mapping[str, tuple[int, ...]], tied: bool, unused: tuple[str, ...]
) -> SourceError | None:
    """Return what is wrong with the headers, of which `expected` says what they should hold."""
    for name, shape in expected.items():
        ref = source.tensors.get(name)
        if ref is None:
            return SourceError(f"The checkpoint has no tensor {name}.", "Download it again.")
        if ref.shape != shape:
            return SourceError(
                f"Tensor {name} has shape {list(ref.shape)}, and config.json means {list(shape)}."
            )
        if ref.dtype not in TORCH_NAMES:
            return SourceError(
                f"Tensor {name} has dtype {ref.dtype}, expected one of {', '.join(TORCH_NAMES)}."
            )
    ignored = ("rotary_emb.inv_freq", "lm_head.weight") if tied else "rotary_emb.inv_freq"
    extra = sorted(
        n
        for n in source.tensors.keys() - expected.keys()
        if not n.endswith(ignored) and not n.startswith(unused)
    )
    if not extra:
        return None
    return SourceError(
        f"The checkpoint holds {extra[0]} ({len(extra)} such tensors), which its config.json "
        "does not account for."
    )


def _config(layout: Layout, compat: bool, fill: Filled) -> dict[str, Any]:
    """Return config.json and make sure that transformers takes it."""
    target = layout.target
    config = {
        "architectures": [target.architecture],
        "model_type": target.model_type,
        "dtype": TORCH_NAMES[layout.dtype],
        **target.config(layout.body, layout.shape, layout.untie),
    }
    if not target.stock:
        full_config(config)
        return config
    fill(config)
    if not compat:
        return config
    return with_legacy_keys({**config, "torch_dtype": config["dtype"]})


def output_folder(recipe: Recipe, source: Source, shape: MoeShape) -> Path:
    """Return where the result goes."""
    if recipe.output.dir:
        return Path(recipe.output.dir).expanduser()
    stem = source.name.rsplit("/", 1)[-1].removesuffix(".gguf")
    return Path(f"{stem}-moe-{shape.num_experts}x-k{shape.top_k}")


def _active(specs: list[TensorSpec], target: MoeTarget, shape: MoeShape) -> int:
    """Return the parameters that one token uses, on average and without experts of zeros."""
    active = 0
    for spec in specs:
        used = shape.used_k if target.is_routed(spec.name) else shape.num_experts
        active += count(spec.shape) * used
    return active // shape.num_experts


_EMPTY = Estimate(0, 0, 0, 0, 0, 0, (0.0, 0.0))
