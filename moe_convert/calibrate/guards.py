"""Guards: what a run that diverged is told to do, and what a result has to pass."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from moe_convert.calibrate.job import Job
from moe_convert.calibration import Calibration
from moe_convert.errors import VerificationError
from moe_convert.manifest import Measured

if TYPE_CHECKING:
    import torch


def remedy(section: Calibration, *others: str) -> str:
    """Return what may help a run that diverged; fp16 ends at 65,504, and activations may not."""
    known = {
        "use bf16": section.mixed_precision == "fp16",
        "use a smaller --lr": bool(section.train),
        "use a smaller --bias-update": section.bias_update > 0,
    }
    found = [*(what for what, helps in known.items() if helps), *others]
    return f"The weights are those of the start; {', or '.join(found)}."


def judge_result(
    job: Job, before: Measured, after: Measured, tensors: Iterable[torch.Tensor]
) -> None:
    """Refuse what the last steps wrecked: a loss is known only of the weights before its step.

    Raises:
        VerificationError: a trained tensor or a figure is not finite, or perplexity rose too far.
    """
    rise, limit = after.perplexity / before.perplexity, job.section.guards.max_ppl_rise
    figures = (after.perplexity, after.kl, after.routing_value, after.max_violation)
    finite = all(map(math.isfinite, figures)) and all(bool(t.isfinite().all()) for t in tensors)
    if finite and rise <= limit:
        return
    what, others = "weights or figures are not finite", list[str]()
    if finite:
        what = f"perplexity is {after.perplexity:.4g}, and it was {before.perplexity:.4g} before"
        others = ["allow a larger calibration.guards.max_ppl_rise"]
    raise VerificationError(
        f"Calibration diverged in its last steps: {what}.", remedy(job.section, *others)
    )


def failures(job: Job, after: Measured) -> Iterator[str]:
    """Yield the gates that the result does not pass."""
    guards = job.section.guards
    ratio, dead = after.perplexity / after.dense_perplexity, after.dead_experts / after.num_experts
    if guards.max_ppl_ratio is not None and not ratio <= guards.max_ppl_ratio:
        yield f"perplexity is {ratio:.3f} x the dense model's, allowed {guards.max_ppl_ratio}"
    if guards.max_dead_share is not None and not dead <= guards.max_dead_share:
        yield f"{dead:.1%} of the experts are dead, allowed {guards.max_dead_share:.1%}"
