"""LLaMA-MoE v2: each cluster of tokens gets the neurons that its loss depends on.

D hidden size · F FFN neurons · E routed experts · N neurons per expert · T tokens
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_convert.clustering import balanced_kmeans
from moe_convert.ffn import FfnSample, Grouping, Neurons
from moe_convert.grouping.parts import portions

if TYPE_CHECKING:
    import torch

ROUNDS = 20


def group(
    neurons: Neurons, sample: FfnSample, num_experts: int, num_shared_neurons: int, seed: int
) -> Grouping:
    """Return the residual split of LLaMA-MoE v2 (Qu et al. 2024, arXiv 2411.15708), with router.

    The dense model's inputs of the FFN form a cluster per expert; its centre is the expert's router
    row, and a token belongs to the centre with the largest logit. A neuron's importance to an
    expert is the mean over the expert's tokens of |h ∂loss/∂h|. Neurons that are among the most
    important ones of most experts are shared; then the highest importance left decides, neuron by
    neuron, among the experts with room.

    This follows the authors' code. There clusters may differ in size by 40 % and the best of 16
    starts is taken, here they are equally large (at most a few tokens are left out) and there is
    one start; there the importance is averaged over other tokens than the clusters are made of.

    Raises:
        ValueError: the sample has no gradients.
    """
    centres_ED = _centres(sample.dense_TD, num_experts, seed)
    importance_EF = importance(neurons, sample, centres_ED)
    size = (len(neurons.gate_FD) - num_shared_neurons) // num_experts
    shared_N = _in_most_lists(importance_EF, size, num_shared_neurons)
    routed_EN = _greedy(importance_EF, shared_N, size)
    return Grouping(shared_N, routed_EN, router_ED=centres_ED)


def importance(neurons: Neurons, sample: FfnSample, centres_ED: torch.Tensor) -> torch.Tensor:
    """Return the mean of |h ∂loss/∂h| over the tokens of each centre, fp32 [E, F].

    An expert without tokens gets zeros.

    Raises:
        ValueError: the sample has no gradients.
    """
    import torch

    if sample.gradient_TD is None:
        raise ValueError("the split by gradients needs the gradients of the dense model")
    num_experts, num_neurons = len(centres_ED), len(neurons.gate_FD)
    sums_EF = neurons.gate_FD.new_zeros(num_experts, num_neurons)
    counts_E = neurons.gate_FD.new_zeros(num_experts)
    inputs = portions(sample.dense_TD, num_neurons)
    gradients = portions(sample.gradient_TD(), num_neurons)
    for x_TD, gradient_TD in zip(inputs, gradients, strict=True):
        passed_TF = gradient_TD.to(neurons.down_DF) @ neurons.down_DF
        passed_TF.mul_(neurons.hidden(x_TD)).abs_()
        owner_T = (x_TD.float() @ centres_ED.T).argmax(dim=1)
        owner_TE = torch.nn.functional.one_hot(owner_T, num_experts).to(passed_TF.dtype)
        sums_EF += owner_TE.T @ passed_TF
        counts_E += owner_TE.sum(dim=0)
    return sums_EF / counts_E.clamp(min=1).unsqueeze(1)


def _centres(x_TD: torch.Tensor, num_experts: int, seed: int) -> torch.Tensor:
    whole = len(x_TD) - len(x_TD) % num_experts
    return balanced_kmeans(x_TD[:whole], num_experts, seed, ROUNDS)[0]


def _in_most_lists(importance_EF: torch.Tensor, size: int, num_shared: int) -> torch.Tensor:
    """Return neurons that are often in the lists of the `size` most important ones, int64 [N].

    Every expert lists its most important neurons that are not shared yet. Those in the most lists
    become shared, the lower index first, and the lists are made anew.
    """
    import torch

    num_neurons = importance_EF.shape[1]
    order_EF = importance_EF.argsort(dim=1, descending=True, stable=True)
    free_F = torch.ones(num_neurons, dtype=torch.bool, device=importance_EF.device)
    missing = num_shared
    while missing:
        left_EF = free_F[order_EF]
        listed_EF = left_EF & (left_EF.cumsum(dim=1) <= size)
        lists_F = order_EF[listed_EF].bincount(minlength=num_neurons)
        chosen = (lists_F == lists_F.max()).nonzero().flatten()[:missing]
        free_F[chosen] = False
        missing -= len(chosen)
    return (~free_F).nonzero().flatten()


def _greedy(importance_EF: torch.Tensor, shared_N: torch.Tensor, size: int) -> torch.Tensor:
    """Return the neurons of every expert, int64 [E, N], each in ascending order.

    The highest importance of any neuron left to any expert with room is served next.
    """
    import torch

    num_experts, num_neurons = importance_EF.shape
    order = importance_EF.flatten().argsort(descending=True, stable=True).tolist()
    free = [True] * num_neurons
    for neuron in shared_N.tolist():
        free[neuron] = False
    members: list[list[int]] = [[] for _ in range(num_experts)]
    for flat in order:
        expert, neuron = divmod(flat, num_neurons)
        if free[neuron] and len(members[expert]) < size:
            free[neuron] = False
            members[expert].append(neuron)
    return torch.tensor(members, device=importance_EF.device).sort(dim=1).values
