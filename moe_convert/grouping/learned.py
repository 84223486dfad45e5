"""DOT-MoE's differentiable partition of neurons, and its hard form (2026, arXiv 2606.01666).

F FFN neurons · N routed ones · E experts · T tokens · X leading dimensions, such as layers
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from moe_convert.ffn import FfnSample, Grouping, Neurons
from moe_convert.grouping import contribution
from moe_convert.grouping.fitted import distilled_rows, expert_energies
from moe_convert.grouping.parts import spaced

ITERATIONS = 50
HOTTEST = 1.0
COOLING = 0.2
"""Share of the steps over which the temperature falls from the hottest to that of the strategy."""


def start(
    neurons: Neurons, sample: FfnSample, num_experts: int, num_shared_neurons: int, seed: int
) -> Grouping:
    """Return groups and a router to start from: those of `contribution`, with a distilled one."""
    grouping = contribution.group(neurons, sample, num_experts, num_shared_neurons, seed)
    x_TD = spaced(sample.x_TD)
    energy_TE = expert_energies(neurons, grouping.routed_EN, x_TD)
    return replace(grouping, router_ED=distilled_rows(energy_TE, x_TD, seed))


def temperature_at(step: int, steps: int, coldest: float) -> float:
    """Return the temperature of step 0, 1, …: down along a line, and then constant."""
    passed = min(1.0, step / max(1.0, COOLING * steps))
    return HOTTEST + (coldest - HOTTEST) * passed


def sinkhorn(affinity_XNE: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return how much of every neuron belongs to every expert, fp32 [X, N, E].

    Rows sum to 1 and columns to N/E, the latter as nearly as 50 rounds of scaling in the log domain
    bring it. The gradient is that of the limit, by the implicit function theorem: it takes one
    system of E equations and keeps nothing of the rounds.
    """
    found: torch.Tensor = _Sinkhorn.apply(affinity_XNE, temperature)
    return found


class _Sinkhorn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, affinity_XNE: torch.Tensor, temperature: float) -> torch.Tensor:
        scaled_XNE = affinity_XNE.float() / temperature
        num_neurons, num_experts = scaled_XNE.shape[-2:]
        room = math.log(num_neurons / num_experts)
        price_XNE = scaled_XNE.new_zeros((*scaled_XNE.shape[:-2], 1, num_experts))
        for _ in range(ITERATIONS):
            own_XNE = -(scaled_XNE + price_XNE).logsumexp(dim=-1, keepdim=True)
            price_XNE = room - (scaled_XNE + own_XNE).logsumexp(dim=-2, keepdim=True)
        share_XNE = (scaled_XNE + price_XNE).softmax(dim=-1)
        ctx.save_for_backward(share_XNE)
        ctx.temperature = temperature
        return share_XNE

    @staticmethod
    def backward(ctx: Any, grad_XNE: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Take from M ∘ G what would change the sums: M ∘ (G - a - b) with rows and columns zero.

        Eliminating a leaves (diag(Mᵀ1) - MᵀM) b = (M ∘ G)ᵀ1 - Mᵀ((M ∘ G) 1), which determines b up
        to a constant.
        """
        share_XNE = ctx.saved_tensors[0].double()
        pull_XNE = share_XNE * grad_XNE
        rows_XN1, sums_X1E = pull_XNE.sum(-1, keepdim=True), pull_XNE.sum(-2, keepdim=True)
        flipped_XEN = share_XNE.transpose(-1, -2)
        system_XEE = torch.diag_embed(share_XNE.sum(dim=-2)) - flipped_XEN @ share_XNE
        system_XEE += share_XNE.shape[-2] / share_XNE.shape[-1] ** 2
        wanted_XE1 = sums_X1E.transpose(-1, -2) - flipped_XEN @ rows_XN1
        price_XE1 = torch.linalg.solve(system_XEE, wanted_XE1)
        own_XN1 = rows_XN1 - share_XNE @ price_XE1
        change_XNE = pull_XNE - share_XNE * (own_XN1 + price_XE1.transpose(-1, -2))
        return (change_XNE / ctx.temperature).float(), None


def rounded(share_XNE: torch.Tensor) -> torch.Tensor:
    """Return the expert of every neuron, int64 [X, N], N/E neurons in each.

    The published greedy rule: the largest share first, if the neuron is free and the expert has
    room; of equal ones the first. As both sides prefer larger shares its result is the one stable
    matching, which offers find for all layers at once: every neuron asks its best expert that has
    not turned it away, and an expert keeps the best that ever asked.
    """
    num_neurons, num_experts = share_XNE.shape[-2:]
    order = share_XNE.flatten(-2).argsort(dim=-1, descending=True, stable=True)
    value = torch.arange(num_neurons * num_experts, 0, -1, device=order.device)
    worth_XNE = torch.zeros_like(order).scatter_(-1, order, value.expand_as(order))
    worth_XNE = worth_XNE.view(share_XNE.shape)
    while True:
        asks_XNE = worth_XNE == worth_XNE.amax(dim=-1, keepdim=True)
        best_XCE = (worth_XNE * asks_XNE).topk(num_neurons // num_experts, dim=-2).values
        turned = asks_XNE & (worth_XNE < best_XCE.amin(dim=-2, keepdim=True))
        if not turned.any():
            return worth_XNE.argmax(dim=-1)
        worth_XNE = worth_XNE.masked_fill(turned, 0)


def straight_through(hard: torch.Tensor, soft: torch.Tensor) -> torch.Tensor:
    """Return the value of one with the gradient of the other."""
    return hard + (soft - soft.detach())


def membership(
    labels_XN: torch.Tensor, share_XNE: torch.Tensor, rest_XN: torch.Tensor, width: int
) -> torch.Tensor:
    """Return who has which neuron, ones and zeros of [X, F, E + 1], the last column being shared.

    `rest_XN` are the neurons that are routed. Gradients go to their shares.
    """
    hard_XNE = torch.nn.functional.one_hot(labels_XN, share_XNE.shape[-1]).to(share_XNE)
    routed_XNE = straight_through(hard_XNE, share_XNE)
    everyone = share_XNE.new_zeros(*labels_XN.shape[:-1], width, share_XNE.shape[-1] + 1)
    everyone[..., -1] = 1.0
    index_XNE = rest_XN.unsqueeze(-1).expand(*rest_XN.shape, everyone.shape[-1])
    routed_XNE = torch.nn.functional.pad(routed_XNE, (0, 1))
    return everyone.scatter(-2, index_XNE, routed_XNE)


def fires(logits_TE: torch.Tensor, top_k: int) -> torch.Tensor:
    """Return ones for the chosen experts, and for what is shared in the last column, [T, E + 1].

    Gradients go to the softmax of the logits.
    """
    soft_TE = logits_TE.softmax(dim=-1)
    best_TK = logits_TE.topk(top_k, dim=-1).indices
    hard_TE = torch.zeros_like(soft_TE).scatter_(-1, best_TK, 1.0)
    chosen_TE = straight_through(hard_TE, soft_TE)
    return torch.nn.functional.pad(chosen_TE, (0, 1), value=1.0)
