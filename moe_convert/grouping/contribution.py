"""Groups of neurons whose contributions a linear router can predict together.

D hidden size · F FFN neurons · E routed experts · N neurons · T tokens
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_convert.clustering import balanced_kmeans
from moe_convert.ffn import FfnSample, Grouping, Neurons
from moe_convert.grouping.parts import divide, experts, portions, spaced

if TYPE_CHECKING:
    import torch

RIDGE = 0.03
"""Added to the diagonal of the inputs' second moments, relative to its mean."""
ROUNDS = 6


def group(
    neurons: Neurons, sample: FfnSample, num_experts: int, num_shared_neurons: int, seed: int
) -> Grouping:
    """Share the neurons with the largest energy, cluster the others by predicted contribution.

    A neuron contributes |h|·‖w‖ to a token, w its column of `down`; its energy is the mean square
    of that. The others are described by `predictors` and put into balanced clusters of directions,
    seeded. Both look at the inputs of the converted model.
    """
    energy_F, predictor_DF = describe(neurons, spaced(sample.x_TD))
    shared_N, rest_N = divide(energy_F, num_shared_neurons)
    if num_experts == 0 or not len(rest_N):
        return Grouping(shared_N.cpu(), rest_N.cpu().view(num_experts, -1))
    points_ND = _unit(predictor_DF[:, rest_N].T)
    _, labels_N = balanced_kmeans(points_ND, num_experts, seed, rounds=ROUNDS)
    return Grouping(shared_N.cpu(), experts(rest_N, labels_N.to(rest_N.device), num_experts).cpu())


def describe(neurons: Neurons, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the energy of every neuron [F], and what predicts its contribution [D, F], fp32.

    With X the inputs and V the contributions less their mean, the second is L⁻¹ Xᵀ V, where L Lᵀ is
    Xᵀ X plus a small ridge: inner products of its columns are those of the ridge predictions of V.
    """
    import torch

    num_dims, width = x_TD.shape[1], len(neurons.gate_FD)
    length_F = neurons.down_DF.norm(dim=0)
    energy_F, sum_F = length_F.new_zeros(width), length_F.new_zeros(width)
    sum_D = length_F.new_zeros(num_dims)
    moments_DD = length_F.new_zeros(num_dims, num_dims)
    products_DF = length_F.new_zeros(num_dims, width)
    for part_TD in portions(x_TD, width):
        x = part_TD.float()
        value_TF = neurons.hidden(x).abs_().mul_(length_F)
        energy_F += value_TF.square().sum(dim=0)
        sum_F += value_TF.sum(dim=0)
        sum_D += x.sum(dim=0)
        moments_DD.addmm_(x.T, x)
        products_DF.addmm_(x.T, value_TF)
    products_DF -= sum_D.outer(sum_F / len(x_TD))
    factor_DD = torch.linalg.cholesky(damped(moments_DD, RIDGE))
    predictor_DF = torch.linalg.solve_triangular(factor_DD, products_DF.double(), upper=False)
    return energy_F, predictor_DF.float()


def damped(moments_DD: torch.Tensor, ridge: float) -> torch.Tensor:
    """Return a symmetric matrix in fp64 with a share of its mean diagonal added to it."""
    wide_DD = moments_DD.double()
    wide_DD.diagonal().add_(ridge * wide_DD.diagonal().mean().clamp(min=1e-30))
    return wide_DD


def _unit(points_ND: torch.Tensor) -> torch.Tensor:
    from torch.nn.functional import normalize

    return normalize(points_ND, dim=1)
