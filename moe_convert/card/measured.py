"""What a card says of measurements and training: rows of its table, and what was trained."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from moe_convert.edits import Fit
from moe_convert.manifest import CalibrationReport, Manifest
from moe_convert.recipe import Recipe
from moe_convert.units import num_params

PARTS = {"router": "routers", "experts": "experts", "norms": "norms", "biases": "selection biases"}
FITTED_ROUTERS = {"distill", "ridge", "representative"}
"""Initialisers that solve for rows on text."""


class Row(NamedTuple):
    """A line of the table: what, of the source, of the result."""

    what: str
    source: str
    result: str


def when(manifest: Manifest) -> str:
    """Return whether the check came before the training that followed it."""
    report = manifest.verify
    early = manifest.calibration is not None and report is not None and not report.calibrated
    return ", before training" if early else ""


def rows(manifest: Manifest) -> Iterator[Row]:
    """Yield the table that compares source and result; only what was measured is there."""
    source, target = manifest.source, manifest.target
    yield Row("architecture", source.architecture, target.architecture)
    dense = num_params(source.params)
    yield Row("parameters", dense, num_params(target.params_total))
    yield Row("active per token", dense, num_params(target.params_active))
    for parity in manifest.verify.parity if manifest.verify else ():
        at = f"({parity.dtype}{when(manifest)})"
        yield Row(f"largest logit difference {at}", "", f"{parity.max_abs_diff:.2e}")
        yield Row(f"KL divergence from the source, nats {at}", "", f"{parity.kl:.2e}")
        yield Row(f"same first choice {at}", "", f"{parity.top1_agreement:.2%}")
        if parity.ppl_ratio is not None:
            yield Row(f"perplexity over the source's {at}", "1", f"{parity.ppl_ratio:.4g}")
    if manifest.split is not None:
        what = f"energy of the hidden state after layer {manifest.split.layers[-1]} that differs"
        yield Row(f"{what}{when(manifest)}", "", f"{manifest.split.stream_error[-1]:.1%}")
    yield from _after_training(manifest)


def _after_training(manifest: Manifest) -> Iterator[Row]:
    if manifest.calibration is None:
        return
    found, on = manifest.calibration.after, f"held-out text ({manifest.calibration.data})"
    yield Row(f"perplexity, {on}", f"{found.dense_perplexity:.4g}", f"{found.perplexity:.4g}")
    yield Row(f"KL divergence from the source, nats, {on}", "", f"{found.kl:.4g}")
    yield Row(f"same first choice, {on}", "", f"{found.top1_agreement:.2%}")


def trained(manifest: Manifest) -> str:
    """Return what was trained and what was not."""
    if not manifest.trainings:
        return _fitted(Recipe.model_validate(manifest.recipe))
    found = "; then ".join(map(_training, manifest.trainings))
    everything = any("all" in one.trained for one in manifest.trainings)
    rest = (
        "" if everything else " Not trained: everything else, which is as the conversion wrote it."
    )
    return f"Trained: {found}.{rest}"


def _training(found: CalibrationReport) -> str:
    """Return what a calibration trained."""
    if "all" in found.trained:
        what = "everything"
    else:
        what = " and ".join(PARTS.get(part, part) for part in found.trained)
    terms = " + ".join(f"{weight:g} {name}" for name, weight in found.objective.items())
    how = f"loss {terms}" if terms else "with no loss: an expert's bias follows its load"
    return (
        f"{what} ({num_params(found.trained_params)} parameters), {found.steps} steps of "
        f"{found.tokens} tokens in all on {found.data}, {how}"
    )


def _fitted(recipe: Recipe) -> str:
    """Return what the conversion itself fitted to text."""
    fits = any(isinstance(edit, Fit) for edit in recipe.experts.edits)
    parts = {"experts": fits, "routers": recipe.router.kind in FITTED_ROUTERS}
    what = " and ".join(part for part, fitted in parts.items() if fitted)
    if not what:
        return "Nothing was trained: neither experts, nor routers, nor anything else."
    return (
        f"The {what} were fitted layer by layer to what the dense model computes on text "
        f"({recipe.data.name}). Nothing was trained end to end, and nothing else at all."
    )


def load(manifest: Manifest) -> tuple[list[int], list[list[float]]]:
    """Return MoE layers and each expert's share of the tokens, after training if there was any."""
    if manifest.calibration is not None:
        return manifest.target.moe_layers, manifest.calibration.after.load
    found = manifest.routing
    return (found.layers, found.load) if found else ([], [])


def routing_line(manifest: Manifest) -> str:
    """Return how evenly the routers spread tokens; empty where nothing was measured."""
    after, found = manifest.calibration, manifest.routing
    if after is not None:
        measured = after.after
        return (
            f"On {measured.tokens} held-out tokens ({after.data}), after training, the busiest "
            f"expert of the worst layer gets {1 + measured.max_violation:.2f} times its fair share "
            f"and {measured.dead_experts} of {measured.num_experts} get next to nothing."
        )
    if found is None:
        return ""
    before = f" ({found.unbalanced:.2f} without selection biases)" if found.unbalanced else ""
    return (
        f"On {found.tokens} tokens ({found.data}) the busiest expert gets "
        f"{found.max_over_mean:.2f} times its fair share{before} and {found.dead_experts} of "
        f"{sum(map(len, found.load))} get next to nothing; the entropy of the load is "
        f"{found.entropy_mean:.1%} of that of an even one."
    )
