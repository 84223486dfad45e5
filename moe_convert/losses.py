"""What calibration minimises, as pure functions of tensors; and the balancing that needs no loss.

Losses come in nats or as ratios, fp32, averaged over tokens. Nothing here knows of a model.

L layers · T tokens · V vocabulary · E routed experts · K chosen experts
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

NO_LABEL = -100
CHUNK_BYTES = 1 << 26
"""Size of the fp32 copy of some tokens' logits that is held at once."""


def distillation(student_TV: torch.Tensor, teacher_TV: torch.Tensor) -> torch.Tensor:
    """Return the mean KL(teacher ‖ student) of a token in nats, fp32, at temperature 1.

    Hinton et al. 2015 (arXiv 1503.02531), without their higher temperature. The teacher gets no
    gradient; memory beyond the gradient itself is that of a few tokens' logits.
    """
    mean: torch.Tensor = _Kl.apply(student_TV, teacher_TV.detach())
    return mean


def cross_entropy(logits_TV: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
    """Return the mean -log p(label) of a token in nats, fp32.

    Labels are token ids, int64 [T]; those of `NO_LABEL` do not count, and at least one must.
    """
    mean: torch.Tensor = _CrossEntropy.apply(logits_TV, labels_T)
    return mean


def load_balance(logits_TE: torch.Tensor, counts_E: torch.Tensor, sigmoid: bool) -> torch.Tensor:
    """Return E Σ_i f_i P_i of one layer: 1 at balance, E/K where one set of experts gets all.

    f_i is the share of all choices that expert i got, from `counts_E`, which should hold those of
    the whole global batch (Qiu et al. 2025, arXiv 2501.11873), and P_i the mean score of expert i
    here: softmax of raw logits, or normalised sigmoids. The Switch loss (Fedus et al. 2021, arXiv
    2101.03961) for each layer by itself: over concatenated layers, as transformers has it, layers
    that collapsed onto different experts look balanced.
    """
    logits_TE = logits_TE.float()
    if sigmoid:
        scores_TE = logits_TE.sigmoid()
        scores_TE = scores_TE / scores_TE.sum(dim=-1, keepdim=True)
    else:
        scores_TE = logits_TE.softmax(dim=-1)
    share_E = counts_E.float() / counts_E.sum()
    return (share_E * scores_TE.mean(dim=0)).sum() * logits_TE.shape[-1]


def router_z(logits_TE: torch.Tensor) -> torch.Tensor:
    """Return the mean squared log-sum-exp of one layer's logits (ST-MoE, arXiv 2202.08906)."""
    return logits_TE.float().logsumexp(dim=-1).square().mean()


def hidden_error(made_TD: torch.Tensor, dense_TD: torch.Tensor) -> torch.Tensor:
    """Return the squared error of an MoE layer's output over the square of the dense FFN's.

    Both saw the same input; 0 is a perfect match and 1 that of a layer that says nothing.
    """
    dense_TD = dense_TD.detach().float()
    return (made_TD.float() - dense_TD).square().sum() / dense_TD.square().sum().clamp(min=1e-12)


def bias_step(counts_LE: torch.Tensor, rate: float) -> torch.Tensor:
    """Return what to add to the selection biases: rate · sign(mean count - count), fp32 [L, E].

    Loss-free balancing (Wang et al. 2024, arXiv 2408.15664): experts that got fewer tokens than
    the mean are chosen a little more often from now on, and their weights do not change.
    """
    counts_LE = counts_LE.float()
    return rate * (counts_LE.mean(dim=-1, keepdim=True) - counts_LE).sign()


def max_violation(counts_LE: torch.Tensor) -> torch.Tensor:
    """Return MaxVio of every layer, fp32 [L]: the busiest expert's load over the mean, less 1."""
    counts_LE = counts_LE.float()
    return counts_LE.amax(dim=-1) / counts_LE.mean(dim=-1).clamp(min=1e-12) - 1


def num_dead(counts_LE: torch.Tensor, share: float = 0.1) -> int:
    """Return how many experts of all layers got less than `share` of the mean load."""
    counts_LE = counts_LE.float()
    return int((counts_LE < share * counts_LE.mean(dim=-1, keepdim=True)).sum())


def straight_through(
    sparse_TD: torch.Tensor, outputs_ETD: torch.Tensor, gates_TE: torch.Tensor
) -> torch.Tensor:
    """Return the sparse output with the router gradient of a layer in which all experts fire.

    DenseMixer (Yao et al. 2025): forward is what the chosen experts give, `sparse_TD`, whose gates
    must carry no gradient; backward sees Σ_e g_e o_e over all experts, `outputs_ETD` without
    gradient, so that experts that were not chosen tell the router what they would have given.
    """
    dense_TD = torch.einsum("te,etd->td", gates_TE, outputs_ETD.detach().to(gates_TE.dtype))
    return sparse_TD + (dense_TD - dense_TD.detach()).to(sparse_TD.dtype)


def _chunks(logits_TV: torch.Tensor) -> range:
    size = max(1, CHUNK_BYTES // (4 * logits_TV.shape[-1]))
    return range(0, logits_TV.shape[0], size)


class _Kl(torch.autograd.Function):
    """Goes through the tokens twice, and keeps the logits only."""

    @staticmethod
    def forward(ctx: Any, student_TV: torch.Tensor, teacher_TV: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(student_TV, teacher_TV)
        total = torch.zeros((), dtype=torch.float32, device=student_TV.device)
        steps = _chunks(student_TV)
        for start in steps:
            rows = slice(start, start + steps.step)
            student = student_TV[rows].float().log_softmax(dim=-1)
            teacher = teacher_TV[rows].float().log_softmax(dim=-1)
            total += (teacher.exp() * (teacher - student)).sum()
        return total / student_TV.shape[0]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        student_TV, teacher_TV = ctx.saved_tensors
        result_TV, steps = torch.empty_like(student_TV), _chunks(student_TV)
        for start in steps:
            rows = slice(start, start + steps.step)
            change = student_TV[rows].float().softmax(dim=-1)
            change -= teacher_TV[rows].float().softmax(dim=-1)
            result_TV[rows] = change.mul_(grad / student_TV.shape[0])
        return result_TV, None


class _CrossEntropy(torch.autograd.Function):
    """The same for labels."""

    @staticmethod
    def forward(ctx: Any, logits_TV: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(logits_TV, labels_T)
        ctx.num_labels = (labels_T != NO_LABEL).sum()
        total = torch.zeros((), dtype=torch.float32, device=logits_TV.device)
        steps = _chunks(logits_TV)
        for start in steps:
            rows = slice(start, start + steps.step)
            total += functional.cross_entropy(
                logits_TV[rows].float(), labels_T[rows], reduction="sum"
            )
        return total / ctx.num_labels

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits_TV, labels_T = ctx.saved_tensors
        result_TV, steps = torch.empty_like(logits_TV), _chunks(logits_TV)
        for start in steps:
            rows = slice(start, start + steps.step)
            change = logits_TV[rows].float().softmax(dim=-1)
            counts_T1 = (labels_T[rows] != NO_LABEL)[:, None].to(change.dtype)
            change.scatter_add_(1, labels_T[rows].clamp(min=0)[:, None], -counts_T1)
            result_TV[rows] = change.mul_(counts_T1 * grad / ctx.num_labels)
        return result_TV, None
