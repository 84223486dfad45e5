"""What a user should know before a conversion begins."""

from __future__ import annotations

from collections.abc import Iterator

from moe_convert.compose import notes
from moe_convert.experts import Compose, Split
from moe_convert.ffn import TORCH_NAMES
from moe_convert.inputs import input_notes
from moe_convert.plan.model import Note, Plan
from moe_convert.wrappers import WrappedFamily

LARGE_DROP = 0.5


USABLE = 0.5
"""Share of an FFN below which a split that is not trained says little of what the model knows."""


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
        yield from _licences(plan)
    yield from (Note(*note) for note in input_notes(plan.recipe))
    yield from (Note("recipe_note", text) for text in plan.recipe.notes)


def _licences(plan: Plan) -> Iterator[Note]:
    """Say that no licence can be inherited where the sources have several."""
    sources = [plan.source, *(one.source for one in plan.experts if one.adapter is None)]
    found = sorted({source.license for source in sources if source.license})
    if len(found) > 1 and plan.recipe.output.license == "inherit":
        yield Note(
            "licences",
            f"The sources have different licences, {' and '.join(found)}, so the card names none.",
            "Read them, and say with --license what the result is under.",
        )


def _split_notes(plan: Plan) -> Iterator[Note]:
    """Say what to expect of a split of which only a part fires."""
    shape, method = plan.shape, plan.recipe.experts
    real = shape.without_nulls.num_experts
    if not isinstance(method, Split) or shape.used_k == real:
        return
    fires = shape.shared_size + shape.used_k * shape.expert_size
    share = fires / (shape.shared_size + real * shape.expert_size)
    if not plan.recipe.carves:
        text = "Its experts and routers know nothing of each other, so the output will be noise"
    elif share < USABLE:
        text = "At this share the output is not usable as it is (perplexity of a model of 135 M "
        text += "rose 2.1 to 3.7 times at a quarter)"
    else:
        text = "Expect a clearly higher perplexity (of a model of 135 M 1.4 to 2 times at a half)"
    yield Note(
        "split_quality",
        f"{share:.0%} of every FFN fires for a token. {text} until it is trained.",
        "Let more of it fire."
        if plan.recipe.calibration.enabled
        else "Add --calibrate, or let more of it fire.",
    )


def _null_notes(plan: Plan) -> Iterator[Note]:
    """Say what the experts of zeros cost that make a threshold out of top-k."""
    shape = plan.shape
    if not shape.null_experts:
        return
    sizes = {spec.name: spec.num_bytes for spec in plan.specs}
    routed = sum(size for name, size in sizes.items() if plan.target.is_routed(name))
    share = routed * shape.null_experts / shape.num_experts / sum(sizes.values())
    yield Note(
        "null_experts",
        f"A token uses {shape.used_k} routed experts on average, {shape.top_k} at most and "
        f"{shape.top_k - shape.null_experts} at least; {shape.null_experts} experts of zeros in "
        f"every layer, {share:.0%} of all bytes, are chosen in the place of the others, and stock "
        f"engines compute {shape.top_k} for every token all the same.",
        "Use --select topk for a model that is cheaper to run as it is.",
    )


def _download_notes(plan: Plan) -> Iterator[Note]:
    """Say what a source that stays on the Hub cannot be checked for."""
    if plan.source.streamed and plan.recipe.verify.enabled:
        yield Note(
            "parity_skipped",
            "Without a download the logits are not compared with the dense model's: the check is "
            "of keys, shapes, values, tokenizer and generation.",
            f"Run `moe-convert verify {plan.output} --source {plan.source.name}` where the source "
            "has room.",
        )


def warnings(plan: Plan) -> Iterator[Note]:
    """Yield every warning of a plan."""
    shape, estimate = plan.shape, plan.estimate
    if shape.top_k == 1 and plan.target.weights_sum is not None:
        yield Note(
            "top1_renormalized",
            "With --top-k 1 the chosen expert always weighs one, so the router gets no gradient.",
            "Use --top-k 2 or more if you mean to train it.",
        )
    yield from _honesty(plan)
    yield from _source_notes(plan)
    yield from _split_notes(plan)
    yield from _null_notes(plan)
    yield from _download_notes(plan)
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
