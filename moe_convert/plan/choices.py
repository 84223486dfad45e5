"""Which target holds the source, and how many experts of which size it gets."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace

from moe_convert.checkpoint import Source
from moe_convert.edits import Fit
from moe_convert.errors import UnsupportedError, UsageError
from moe_convert.experts import Split
from moe_convert.families import Body, DenseFamily
from moe_convert.families.custom import CUSTOM, CustomFamily, custom_hint
from moe_convert.plan.model import GROUPED_MM_BYTES, bits
from moe_convert.plan.selection import check_selection, with_nulls
from moe_convert.recipe import MEASURED, Recipe, chosen_layers
from moe_convert.targets import TARGETS, MoeShape, MoeTarget
from moe_convert.targets.custom import custom_target
from moe_convert.wrappers import WrappedFamily

CUTS = (64, 32, 16, 8, 4)
"""How many experts an FFN is cut into when only the share that fires is given, finest first."""


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
        known = ["auto", CUSTOM, *rows]
        near = difflib.get_close_matches(wanted, known, n=1)
        raise UsageError(
            f"There is no target {wanted!r}; expected one of {', '.join(known)}.",
            f"Did you mean {near[0]}?" if near else "",
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
        others = [name for name, why in found.items() if not why]
        who = "No target can" if wanted == "auto" else f"{wanted} cannot"
        raise UnsupportedError(
            f"{who} hold this {family.model_type} exactly ({reasons}).",
            f"Use --target {others[0]}." if others else custom_hint(family.model_type),
        )
    measured = recipe.target.layers == MEASURED
    wants_dense = measured or len(_layers(recipe, body)) < body.num_layers
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
    steered = target.selection_bias is not None or not recipe.router.steers
    return shared and steered and (target.dense_layers != "none" or not wants_dense)


def _layers(recipe: Recipe, body: Body) -> tuple[int, ...]:
    """Return the layers that get experts."""
    try:
        layers = chosen_layers(recipe.target.layers, body.num_layers)
    except ValueError as error:
        raise UsageError(f"--layers: {error}.") from error
    if not layers:
        raise UsageError(f"--layers {recipe.target.layers} chooses no layer of {body.num_layers}.")
    return layers


def most_dense(num_layers: int) -> int:
    """Return how many layers stay dense at most where a measurement decides: a quarter."""
    return num_layers // 4


def _check_measured(recipe: Recipe, family: DenseFamily, body: Body, target: MoeTarget) -> None:
    """Refuse to measure where that could not leave a layer dense for a reason."""
    method, counts = recipe.experts, recipe.target
    if not isinstance(method, Split) or counts.top_k == counts.num_experts:
        what = "a split of which every expert fires"
        what = what if isinstance(method, Split) else f"experts.method {method.method}"
        raise UsageError(
            "--layers auto leaves those layers dense that a split hurts most, and with "
            f"{what} nothing is lost in any.",
            "Use --layers all, or choose layers by number.",
        )
    if not recipe.carves:
        raise UsageError(
            f"--layers auto measures on data what a split does, and this one (strategy "
            f"{method.strategy}, router {recipe.router.kind}) is made of none.",
            "Use --strategy contribution, or choose layers by number.",
        )
    if target.dense_layers == "none":
        able = [name for name in family.targets if _rows(family)[name].dense_layers != "none"]
        raise UsageError(
            f"{target.model_type} cannot keep any layer dense, so --layers auto has no choice.",
            f"Targets that can: {', '.join(able) or 'none'}.",
        )
    if not most_dense(body.num_layers):
        raise UsageError(
            f"--layers auto leaves a quarter of the layers dense at most, which is none of "
            f"{body.num_layers}.",
            "Choose layers by number.",
        )


def with_counts(recipe: Recipe, body: Body, dtype: str) -> Recipe:
    """Return the recipe with the counts that `target.active` stands for.

    The finest cut into at most 64 experts whose widths grouped matrix products take; of those that
    fire, half are shared (rounded down, at least one if two fire).

    Raises:
        UsageError: it is no split, counts are given too, or no cut fits.
    """
    wanted = recipe.target
    if wanted.active is None:
        return recipe
    if not isinstance(recipe.experts, Split):
        raise UsageError(
            "target.active is the share of an FFN that fires after a split, and "
            f"experts.method is {recipe.experts.method}.",
            "Use --method split.",
        )
    given = {"num_experts", "top_k", "shared_experts"} & wanted.model_fields_set
    if given:
        raise UsageError(
            f"target.active sets target.{min(given)} too, and the recipe gives both.",
            "Leave one of them out.",
        )
    multiple = GROUPED_MM_BYTES * 8 // bits(dtype)
    for num_units in CUTS:
        fires = round(wanted.active * num_units)
        if body.ffn_size % (num_units * multiple) == 0 and 1 <= fires < num_units:
            shared = fires // 2
            counts = {
                "num_experts": num_units - shared,
                "top_k": fires - shared,
                "shared_experts": shared,
            }
            return recipe.model_copy(update={"target": wanted.model_copy(update=counts)})
    raise UsageError(
        f"No cut of an FFN of {body.ffn_size} neurons into {CUTS[0]} to {CUTS[-1]} experts has "
        f"widths that are multiples of {multiple} and lets {wanted.active:g} of it fire.",
        _instead_of_active(body.ffn_size, dtype, multiple),
    )


def _instead_of_active(ffn_size: int, dtype: str, multiple: int) -> str:
    """Return what could be asked for where no cut is fit for a share."""
    units = [n for n in range(2, CUTS[0] + 1) if ffn_size % (n * multiple) == 0]
    counts = f", of {units[-1]} in all" if units else ""
    fewer = "" if dtype == "F32" else ", or --dtype fp32"
    return f"Give --experts, --top-k and --shared-experts{counts}{fewer}."


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
    if not isinstance(recipe.experts, Split):
        for edit in recipe.experts.edits:
            if isinstance(edit, Fit):
                raise UsageError(
                    f"The edit {edit.edit} fits parts of one FFN to data, and experts.method is "
                    f"{recipe.experts.method}.",
                    "Use --method split, or leave it out.",
                )
    if wanted.shared_experts > 1 and target.shared == "one":
        raise UsageError(
            f"{target.model_type} has one shared expert, got --shared-experts "
            f"{wanted.shared_experts}.",
            "Use --shared-experts 1.",
        )
    _check_fixed_router(recipe, target)
    _check_made_router(recipe)
    check_selection(recipe, family, target)
    layers = _layers(recipe, body)
    if wanted.layers == MEASURED:
        _check_measured(recipe, family, body, target)
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
    shape = with_nulls(shape, recipe.router)
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


MADE_WITH = {"representative": ("cmoe",), "grouped": ("gradient", "learned")}
"""Routers that come out of some strategies, with their groups."""


def _check_made_router(recipe: Recipe) -> None:
    """Refuse a router that is made together with experts which are not there."""
    kind, method = recipe.router.kind, recipe.experts
    strategy = getattr(method, "strategy", None)
    wanted = MADE_WITH.get(kind, (str(strategy),))
    if recipe.router.fitted and not isinstance(method, Split):
        raise UsageError(
            f"A {kind} router is fitted to parts of one FFN, and experts.method is "
            f"{method.method}.",
            "Use --method split, or --router normal.",
        )
    if str(strategy) not in wanted:
        raise UsageError(
            f"A {kind} router comes out of the strategy {' or '.join(wanted)}, and this one is "
            f"{strategy}.",
            "Use --router distill.",
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
