"""What selection biases need: a target that has them, a router that they fit, null experts."""

from __future__ import annotations

from dataclasses import replace

from moe_convert.errors import UsageError
from moe_convert.experts import Split
from moe_convert.families import DenseFamily
from moe_convert.recipe import Recipe
from moe_convert.routers import Router
from moe_convert.targets import TARGETS, MoeShape, MoeTarget


def check_selection(recipe: Recipe, family: DenseFamily, target: MoeTarget) -> None:
    """Refuse biases that the target cannot hold or that could steer nothing.

    Raises:
        UsageError: with the reason.
    """
    router, method = recipe.router, recipe.experts
    if not router.thresholds and (router.max_k is not None or router.min_k):
        raise UsageError(
            "router.max_k and router.min_k have no effect: every token gets target.top_k experts.",
            "Use --select threshold, or leave them out.",
        )
    if not router.steers:
        return
    what = "router.select threshold" if router.thresholds else "router.balance"
    if not isinstance(method, Split):
        raise UsageError(
            f"{what} makes biases along the streams of a split, and experts.method is "
            f"{method.method}.",
            "Use --method split.",
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
    if router.thresholds:
        _check_threshold(router)
    else:
        _check_balance(recipe)


def with_nulls(shape: MoeShape, router: Router) -> MoeShape:
    """Return the shape with the null experts that a threshold takes, its top-k being the mean.

    Raises:
        UsageError: the fewest, the mean and the most experts of a token are not in this order.
    """
    if not router.thresholds:
        return shape
    mean, real = shape.top_k, shape.num_experts
    most = min(2 * mean, real) if router.max_k is None else router.max_k
    if not (router.min_k <= mean <= most <= real and router.min_k < most):
        raise UsageError(
            f"A token cannot use between {router.min_k} and {most} of {real} experts and {mean} on "
            "average.",
            "Change router.min_k, router.max_k or --top-k.",
        )
    nulls = most - router.min_k
    return replace(shape, num_experts=real + nulls, top_k=most, null_experts=nulls, mean_k=mean)


def _check_threshold(router: Router) -> None:
    if router.balance is not None:
        raise UsageError(
            "router.balance and router.select threshold both decide over the selection bias.",
            "Leave one of them out.",
        )
    if router.kind != "ridge":
        raise UsageError(
            "A threshold compares predicted output norms of different tokens, and a "
            f"{router.kind} router predicts none.",
            "Use --router ridge.",
        )


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
