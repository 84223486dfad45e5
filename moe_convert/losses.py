"""What calibration minimises, as pure functions of tensors; and the balancing that needs no loss.

Losses come in nats or as ratios, fp32, averaged over tokens. Nothing here knows of a model.

L layers · T tokens · V vocabulary · E routed experts · K chosen experts
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Loss = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
NO_LABEL = -100
CHUNK_BYTES = {"cpu": 1 << 26, "cuda": 1 << 28}
"""Size of the fp32 copy of some tokens' logits that is held at once, by device."""
NOMINAL_SPREAD = 0.2
"""Spread of scores for which a step of the biases holds as it is given: sigmoids of logits whose
standard deviation is one."""


def distillation(student_TV: torch.Tensor, teacher_TV: torch.Tensor) -> torch.Tensor:
    """Return the mean KL(teacher ‖ student) of a token in nats, fp32, at temperature 1.

    Hinton et al. 2015 (arXiv 1503.02531), without their higher temperature. The teacher gets no
    gradient; memory beyond the gradient itself is that of a few tokens' logits.
    """
    total: torch.Tensor = _Total.apply(student_TV, teacher_TV.detach(), _kl)
    return total / student_TV.shape[0]


def cross_entropy(logits_TV: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
    """Return the mean -log p(label) of a token in nats, fp32.

    Labels are token ids, int64 [T]; those of `NO_LABEL` do not count, and at least one must.
    """
    total: torch.Tensor = _Total.apply(logits_TV, labels_T, _surprise)
    return total / (labels_T != NO_LABEL).sum()


def load_balance(logits_LTE: torch.Tensor, counts_LE: torch.Tensor, sigmoid: bool) -> torch.Tensor:
    """Return E Σ_i f_i P_i of every layer [L]: 1 at balance, E/K where K experts get all.

    f_i is the share of all choices that expert i got, from `counts_LE`, which should hold those of
    the whole global batch (Qiu et al. 2025, arXiv 2501.11873), and P_i the mean score of expert i
    here: softmax of raw logits, or normalised sigmoids. The Switch loss (Fedus et al. 2021, arXiv
    2101.03961) for each layer by itself: over concatenated layers, as transformers has it, layers
    that collapsed onto different experts look balanced.
    """
    logits_LTE = logits_LTE.float()
    if sigmoid:
        scores_LTE = logits_LTE.sigmoid()
        scores_LTE = scores_LTE / scores_LTE.sum(dim=-1, keepdim=True)
    else:
        scores_LTE = logits_LTE.softmax(dim=-1)
    share_LE = counts_LE.float() / counts_LE.sum(dim=-1, keepdim=True)
    return (share_LE * scores_LTE.mean(dim=-2)).sum(dim=-1) * logits_LTE.shape[-1]


def router_z(logits_LTE: torch.Tensor) -> torch.Tensor:
    """Return the mean squared log-sum-exp of logits (ST-MoE, arXiv 2202.08906)."""
    return logits_LTE.float().logsumexp(dim=-1).square().mean()


def hidden_error(
    made_TD: torch.Tensor, dense_TD: torch.Tensor, size: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the squared error of an MoE layer's output over the square of the dense FFN's.

    Both saw the same input; 0 is a perfect match and 1 that of a layer that says nothing. `size` is
    what to divide by where these are some of the tokens: the mean over all such parts.
    """
    dense_TD = dense_TD.detach().float()
    size = dense_TD.square().sum() if size is None else size
    return (made_TD.float() - dense_TD).square().sum() / size.clamp(min=1e-12)


def score_spread(logits_TE: torch.Tensor, sigmoid: bool) -> torch.Tensor:
    """Return the standard deviation of a token's scores over the experts, the mean of all, fp32."""
    logits_TE = logits_TE.float()
    scores_TE = logits_TE.sigmoid() if sigmoid else logits_TE.softmax(dim=-1)
    return scores_TE.std(dim=-1, correction=0).mean()


def bias_step(counts_LE: torch.Tensor, spread_L: torch.Tensor, rate: float) -> torch.Tensor:
    """Return what to add to the selection biases, fp32 [L, E].

    Loss-free balancing (Wang et al. 2024, arXiv 2408.15664), rate · sign(mean count - count):
    experts that got fewer tokens than the mean are chosen a little more often from now on, and
    their weights do not change. Theirs is that for scores of `NOMINAL_SPREAD`; here the step keeps
    its proportion to the spread of a layer's scores, since one that is large beside it replaces
    most choices at once.
    """
    counts_LE = counts_LE.float()
    step_L1 = rate * spread_L[:, None] / NOMINAL_SPREAD
    return step_L1 * (counts_LE.mean(dim=-1, keepdim=True) - counts_LE).sign()


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


def _log_softmax(logits_TV: torch.Tensor) -> torch.Tensor:
    return logits_TV.log_softmax(dim=-1, dtype=torch.float32)


def _kl(log_TV: torch.Tensor, teacher_TV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return KL from log-probabilities, which it overwrites, and the gradient to their logits."""
    teacher_TV = _log_softmax(teacher_TV)
    p_TV = teacher_TV.exp()
    total = teacher_TV.sub_(log_TV).mul_(p_TV).sum()
    return total, log_TV.exp_().sub_(p_TV)


def _surprise(log_TV: torch.Tensor, labels_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the same for cross-entropy."""
    counts_T1 = (labels_T != NO_LABEL)[:, None].to(log_TV.dtype)
    index_T1 = labels_T.clamp(min=0)[:, None]
    total = -(log_TV.gather(1, index_T1) * counts_T1).sum()
    change_TV = log_TV.exp_().scatter_add_(1, index_T1, -torch.ones_like(counts_T1))
    return total, change_TV.mul_(counts_T1)


class _Total(torch.autograd.Function):
    """The sum of a loss over tokens, a few at a time.

    The gradient is made while their probabilities are at hand, in the dtype of the logits, which
    need not be kept then.
    """

    @staticmethod
    def forward(ctx: Any, logits_TV: torch.Tensor, target: torch.Tensor, loss: Loss) -> Any:
        total = torch.zeros((), dtype=torch.float32, device=logits_TV.device)
        wanted = ctx.needs_input_grad[0]
        gradient_TV = torch.empty_like(logits_TV) if wanted else None
        size = max(1, CHUNK_BYTES[logits_TV.device.type] // (4 * logits_TV.shape[-1]))
        for start in range(0, logits_TV.shape[0], size):
            rows = slice(start, start + size)
            found, change_TV = loss(_log_softmax(logits_TV[rows]), target[rows])
            total += found
            if gradient_TV is not None:
                gradient_TV[rows] = change_TV
        ctx.save_for_backward(gradient_TV)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient_TV,) = ctx.saved_tensors
        return gradient_TV.mul_(grad), None, None
