"""Who is chosen: scores as a target computes them, and biases on them that steer the choice alone.

E router rows · T tokens
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Scoring = Literal["softmax", "sigmoid"]

BEYOND = 1.0
"""More than two scores can differ by."""
BALANCE_STEPS = 200
SHRINK = 0.95
"""What each step of balancing is of the one before; all of them reach 20 times the first."""


def scored(logits_TE: torch.Tensor, scoring: Scoring) -> torch.Tensor:
    """Return the scores to which a selection bias is added, fp32 [T, E]."""
    logits_TE = logits_TE.float()
    return logits_TE.sigmoid() if scoring == "sigmoid" else logits_TE.softmax(dim=1)


def balancing_bias(scores_TE: torch.Tensor, top_k: int, tolerance: float) -> torch.Tensor:
    """Return a bias under which the experts are chosen about equally often, fp32 [E].

    Loss-free balancing (Wang et al. 2024, arXiv 2408.15664) on fixed scores: experts that are
    chosen too often lose a step, the others gain one. Here steps start at the spread of the scores
    and shrink, until the busiest expert is chosen at most 1 + `tolerance` times its share; if that
    is never so, the best bias that was met is returned.
    """
    import torch

    num_tokens, num_experts = scores_TE.shape
    mean = num_tokens * top_k / num_experts
    bias_E = best_E = scores_TE.new_zeros(num_experts)
    least, step = float("inf"), float(scores_TE.std())
    for _ in range(BALANCE_STEPS):
        chosen_TK = (scores_TE + bias_E).topk(top_k, dim=1).indices
        counts_E = torch.bincount(chosen_TK.flatten(), minlength=num_experts)
        excess = float(counts_E.max()) / mean - 1
        if excess < least:
            least, best_E = excess, bias_E
        if excess <= tolerance:
            break
        bias_E, step = bias_E + step * (mean - counts_E).sign(), step * SHRINK
    return best_E


def threshold_bias(
    scores_TE: torch.Tensor, null_experts: int, top_k: int, mean_k: int
) -> torch.Tensor:
    """Return the bias of the null experts that lets `mean_k` others be chosen on average, fp32 [E].

    The last `null_experts` have rows and weights of zeros: their scores are the same for all, so
    that with a bias they are a threshold, and to choose one is to choose nobody. Of a token's
    `top_k` best others those count that lie above it, and at least `top_k` less the null experts.
    The threshold is therefore an exact quantile, the cap included. D2DMoE (Szatkowski et al. 2024,
    arXiv 2310.04361) chooses by predicted output norms too, relative to each token's largest; here
    the threshold is absolute, so that tokens which need more of the network get more.
    """
    real = scores_TE.shape[1] - null_experts
    margin_TE = scores_TE[:, :real] - scores_TE[:, real:].mean(dim=1, keepdim=True)
    best_TK = margin_TE.topk(top_k, dim=1).values
    doubtful_N = best_TK[:, top_k - null_experts :].flatten().sort(descending=True).values
    wanted = (mean_k - (top_k - null_experts)) * len(scores_TE)
    bias_E = scores_TE.new_zeros(scores_TE.shape[1])
    if 0 < wanted < len(doubtful_N):
        bias_E[real:] = doubtful_N[wanted - 1 : wanted + 1].mean()
    else:
        bias_E[real:] = -BEYOND if wanted else BEYOND
    return bias_E
