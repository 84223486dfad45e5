"""CMoE: neurons that are among a token's strongest together become an expert.

D hidden size · F FFN neurons · E routed experts · N neurons per expert · T tokens · K markers
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from moe_convert.clustering import balanced
from moe_convert.ffn import FfnSample, Grouping, Neurons
from moe_convert.grouping.parts import divide, experts, portions

if TYPE_CHECKING:
    import torch

MARKERS = 10
"""Neurons that a token marks as active, Ka in the paper."""


def group(
    neurons: Neurons,
    sample: FfnSample,
    num_experts: int,
    num_shared_neurons: int,
    seed: int,
    *,
    num_markers: int = MARKERS,
    rounds: int = 1,
    distance: Literal["l1", "l2"] = "l1",
) -> Grouping:
    """Return the groups of CMoE (Pei et al. 2025, arXiv 2502.04416), with a representative of each.

    Each token marks the neurons whose activation is largest, with input and rows of gate and up
    normalised. The neurons marked most often are shared. The next ones in that order are the first
    centres; every other neuron, described by the tokens that mark it, goes to a centre such that
    all experts are equally large and the summed distance is least. The representative is the neuron
    nearest to its expert's mean.

    This follows the authors' code where it differs from the paper: the weights are normalised, the
    distance is L1, and there is one assignment. `rounds` and `distance` give the paper's variant.
    The inputs are those of the converted prefix, as there. The assignment is optimal, as theirs; of
    several optimal ones either may be returned. Equal rates go by index. The seed has no effect.
    """
    marked_TK = _markers(neurons, sample.x_TD, num_markers)
    num_neurons = len(neurons.gate_FD)
    rate_F = marked_TK.flatten().bincount(minlength=num_neurons)
    shared_N, rest_N = divide(rate_F, num_shared_neurons)
    first_E = rate_F[rest_N].argsort(descending=True, stable=True)[:num_experts]
    centres_TE = _columns(marked_TK, num_neurons, rest_N[first_E])
    for _ in range(rounds):
        cost_NE = _distances(marked_TK, num_neurons, centres_TE, distance)[rest_N]
        labels_N = balanced(cost_NE, len(rest_N) // num_experts)
        routed_EN = experts(rest_N, labels_N, num_experts)
        centres_TE = _means(marked_TK, num_neurons, routed_EN)
    cost_FE = _distances(marked_TK, num_neurons, centres_TE, distance)
    nearest_E = cost_FE.T.gather(1, routed_EN).argmin(dim=1, keepdim=True)
    return Grouping(shared_N, routed_EN, routed_EN.gather(1, nearest_E).squeeze(1))


def _markers(neurons: Neurons, x_TD: torch.Tensor, num_markers: int) -> torch.Tensor:
    """Return the neurons that each token marks, int64 [T, K]."""
    import torch
    from torch.nn.functional import normalize

    unit = Neurons(normalize(neurons.gate_FD), normalize(neurons.up_FD), neurons.down_DF)
    unit = Neurons(unit.gate_FD, unit.up_FD, unit.down_DF, neurons.act)
    num_markers = min(num_markers, len(neurons.gate_FD))
    return torch.cat(
        [
            unit.hidden(normalize(part_TD.float())).abs_().topk(num_markers, dim=1).indices
            for part_TD in portions(x_TD, len(neurons.gate_FD))
        ]
    )


def _dense(marked_TK: torch.Tensor, num_neurons: int) -> Iterator[torch.Tensor]:
    """Yield the marks as zeros and ones, fp32 [T, F], some tokens at a time."""
    for part_TK in portions(marked_TK, num_neurons):
        zeros_TF = part_TK.new_zeros(len(part_TK), num_neurons).float()
        yield zeros_TF.scatter_(1, part_TK, 1.0)


def _columns(marked_TK: torch.Tensor, num_neurons: int, chosen_E: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.cat([part_TF[:, chosen_E] for part_TF in _dense(marked_TK, num_neurons)])


def _means(marked_TK: torch.Tensor, num_neurons: int, routed_EN: torch.Tensor) -> torch.Tensor:
    """Return the mean column of every expert's neurons, fp32 [T, E]."""
    import torch

    return torch.cat(
        [part_TF[:, routed_EN].mean(dim=2) for part_TF in _dense(marked_TK, num_neurons)]
    )


def _distances(
    marked_TK: torch.Tensor, num_neurons: int, centres_TE: torch.Tensor, distance: str
) -> torch.Tensor:
    """Return distances of columns of zeros and ones to the centres, fp64 [F, E].

    For a in {0, 1} and c in [0, 1], |a - c| = c + a (1 - 2c) and (a - c)² = c² + a (1 - 2c).
    """
    power = 1 if distance == "l1" else 2
    cost_FE = centres_TE.double().pow(power).sum(dim=0).expand(num_neurons, -1).clone()
    start = 0
    for part_TF in _dense(marked_TK, num_neurons):
        centres = centres_TE[start : start + len(part_TF)]
        cost_FE += (part_TF.T @ (1 - 2 * centres)).double()
        start += len(part_TF)
    return cost_FE if distance == "l1" else cost_FE.clamp(min=0).sqrt()
