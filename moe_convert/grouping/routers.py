"""The routers of the published strategies, as scores and as rows of a linear router.

D hidden size · F FFN neurons · E routed experts · N neurons per expert · T tokens
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_convert.ffn import Neurons

if TYPE_CHECKING:
    import torch

PORTION = 8192
"""Tokens that are scored at once."""

RIDGE = 1e-2
"""Added to the diagonal of the inputs' second moments, relative to its mean."""


def representative_scores(
    neurons: Neurons, representative_E: torch.Tensor, x_TD: torch.Tensor
) -> torch.Tensor:
    """Return CMoE's score of every expert (arXiv 2502.04416), fp32 [T, E].

    It is |(û·x) act(ĝ·x)|, with the normalised gate and up rows of the expert's representative.
    No linear router can compute it.
    """
    import torch
    from torch.nn.functional import normalize

    gate_ED, up_ED = neurons.gate_FD[representative_E], neurons.up_FD[representative_E]
    unit = Neurons(normalize(gate_ED), normalize(up_ED), neurons.down_DF, neurons.act)
    return torch.cat([unit.hidden(part_TD).abs_() for part_TD in x_TD.split(PORTION)])


def representative_rows(
    neurons: Neurons, representative_E: torch.Tensor, x_TD: torch.Tensor
) -> torch.Tensor:
    """Return the linear router that comes nearest to CMoE's scores on the sample, fp32 [E, D].

    The scores of `representative_scores` minus their mean over the experts, which no choice of
    experts depends on, are projected onto the inputs by least squares with a small ridge. This is
    not CMoE's router: it keeps of it what a stock router can hold.
    """
    import torch

    num_dims, num_experts = x_TD.shape[1], len(representative_E)
    moments_DD = torch.zeros(num_dims, num_dims, dtype=torch.float64, device=x_TD.device)
    products_DE = torch.zeros(num_dims, num_experts, dtype=torch.float64, device=x_TD.device)
    for part_TD in x_TD.split(PORTION):
        score_TE = representative_scores(neurons, representative_E, part_TD)
        score_TE -= score_TE.mean(dim=1, keepdim=True)
        moments_DD += (part_TD.float().T @ part_TD.float()).double()
        products_DE += (part_TD.float().T @ score_TE).double()
    moments_DD.diagonal().add_(RIDGE * moments_DD.diagonal().mean())
    rows_ED: torch.Tensor = torch.linalg.solve(moments_DD, products_DE).T.float()
    return rows_ED


def mean_gate_rows(neurons: Neurons, routed_EN: torch.Tensor) -> torch.Tensor:
    """Return the mean of the gate rows of every expert's neurons, fp32 [E, D].

    The router of ExpertWeaver (arXiv 2602.15521); its logit is the mean of the gates before their
    activation, the avg-k score of EMoE (arXiv 2310.10908).
    """
    import torch

    return torch.stack([neurons.gate_FD[neurons_N].mean(dim=0) for neurons_N in routed_EN])
