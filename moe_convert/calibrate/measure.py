"""How good a model is beside the dense one, on rows that it was not trained on.

B rows · T tokens · V vocabulary · L MoE layers · E routed experts
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from moe_convert.calibrate.watch import Watch
from moe_convert.losses import cross_entropy, distillation, max_violation, num_dead
from moe_convert.manifest import Measured
from moe_convert.training.batches import labels_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MAX_LOSS = 50.0
PERMUTATION_SEED = 0


def measure(
    student: PreTrainedModel, teacher: PreTrainedModel, watch: Watch, ids_BT: torch.Tensor
) -> Measured:
    """Run both models over the rows, one after the other.

    The routing value is the perplexity with every token routed as another one is, less that of the
    model's own routing: what the choice of experts is worth.
    """
    generator = torch.Generator().manual_seed(PERMUTATION_SEED)
    sums = torch.zeros(5, dtype=torch.float64)
    counts_LE = torch.zeros(watch.num_layers, watch.num_experts)
    for row_1T in ids_BT.split(1):
        with torch.no_grad():
            dense_TV = teacher(input_ids=row_1T, use_cache=False).logits[0]
            with watch.recording():
                made_TV = student(input_ids=row_1T, use_cache=False).logits[0]
            with watch.permuted(row_1T.numel(), generator):
                other_TV = student(input_ids=row_1T, use_cache=False).logits[0]
        counts_LE += watch.counts().cpu()
        labels_T = labels_of(row_1T)
        same = (dense_TV.argmax(-1) == made_TV.argmax(-1)).float().mean()
        found = [cross_entropy(logits, labels_T) for logits in (dense_TV, made_TV, other_TV)]
        sums += torch.stack([*found, distillation(made_TV, dense_TV), same]).double().cpu()
    dense, made, other, kl, same = (sums / len(ids_BT)).tolist()
    return Measured(
        tokens=ids_BT.numel(),
        dense_perplexity=_perplexity(dense),
        perplexity=_perplexity(made),
        kl=0.0 if kl < 0 else kl,
        top1_agreement=same,
        max_violation=float(max_violation(counts_LE).max()),
        dead_experts=num_dead(counts_LE),
        num_experts=counts_LE.numel(),
        routing_value=_perplexity(other) - _perplexity(made),
        load=(counts_LE / counts_LE.sum(dim=-1, keepdim=True)).tolist(),
    )


def _perplexity(loss: float) -> float:
    return math.exp(min(loss, MAX_LOSS))
