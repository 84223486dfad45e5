"""What the plan refuses where a selection bias is to steer who is chosen."""

from __future__ import annotations

from moe_convert.errors import UsageError
from moe_convert.experts import Split
from moe_convert.families import DenseFamily
from moe_convert.recipe import Recipe
from moe_convert.targets import TARGETS, MoeTarget


def check_selection(recipe: Recipe, family: DenseFamily, target: MoeTarget) -> None:
    """Refuse biases that the target cannot hold or that could steer nothing.

    Raises:
        UsageError: with the reason.
    """
    if not recipe.router.steers:
        return
    what, method = "router.balance", recipe.experts
    if not isinstance(method, Split):
        raise UsageError(
            f"{what} makes biases along the streams of a split, and experts.method is "
            f"{method.method}.",
            "Use --method split, or calibrate with --bias-update.",
        )
    if target.selection_bias is None:
        biased = [name for name, row in TARGETS.items() if row.selection_bias]
        able = [name for name in biased if name in family.targets]
        raise UsageError(
            f"{target.model_type} has no selection bias on fp32 scores, which {what} makes.",
            f"Use --target {' or '.join(able)}."
            if able
            else f"Targets that have one: {', '.join(biased)}.",
        )
    if recipe.target.num_groups > 1:
        raise UsageError(
            f"{what} does not know of groups, and there are {recipe.target.num_groups}.",
            "Leave target.num_groups out.",
        )
    _check_balance(recipe)


def _check_balance(recipe: Recipe) -> None:
    router, counts = recipe.router, recipe.target
    if counts.top_k == counts.num_experts:
        raise UsageError(
            "router.balance has no effect: every expert is chosen.", "Use a smaller --top-k."
        )
    if router.kind == "zeros":
        raise UsageError(
            "With router.init zeros all scores are equal, so no bias can share out the tokens.",
            "Use --router distill.",
        )
