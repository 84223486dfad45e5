"""MoEfication: neurons with similar weights, or neurons that fire together, become an expert.

D hidden size · F FFN neurons · E routed experts · N neurons per expert · T tokens
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_convert.clustering import balanced_kmeans
from moe_convert.ffn import FfnSample, Grouping, Neurons
from moe_convert.grouping.graph import partition
from moe_convert.grouping.parts import divide, experts, portions

if TYPE_CHECKING:
    import torch

ROUNDS = 20


def weights(
    neurons: Neurons, num_experts: int, num_shared_neurons: int, seed: int, rounds: int = ROUNDS
) -> Grouping:
    """Return the parameter-clustering split of MoEfication (Zhang et al. 2021, arXiv 2110.01786).

    Balanced k-means on the normalised input rows of the neurons. A gated FFN has two of them; the
    gate's are taken, as EMoE (arXiv 2310.10908) and D2DMoE (arXiv 2310.04361) do. MoEfication has
    no shared neurons: those asked for are the ones with the largest product of the norms of their
    three weight vectors.
    """
    from torch.nn.functional import normalize

    up_F, down_F = neurons.up_FD.norm(dim=1), neurons.down_DF.norm(dim=0)
    shared_N, rest_N = divide(neurons.gate_FD.norm(dim=1) * up_F * down_F, num_shared_neurons)
    rows_ND = normalize(neurons.gate_FD[rest_N])
    labels_N = balanced_kmeans(rows_ND, num_experts, seed, rounds)[1]
    return Grouping(shared_N, experts(rest_N, labels_N, num_experts))


def coactivation(
    neurons: Neurons, sample: FfnSample, num_experts: int, num_shared_neurons: int, seed: int
) -> Grouping:
    """Return the co-activation split of MoEfication (Zhang et al. 2021, arXiv 2110.01786).

    Two neurons are linked by the sum, over tokens, of the product of their activations where both
    fire, and the graph is cut into equal parts with as little weight between them as possible.

    A neuron of a gated FFN fires where its gate's activation is positive, with the size of what it
    sends to `down`; with ReLU and no gate this is the paper's rule. The paper cuts with METIS and
    moves what is over at random; see `graph.partition` for what is done here. It has no shared
    neurons: those asked for are the ones with the most weight on their links, which are cut
    wherever they are put. Memory is F x F in fp32.
    """
    links_FF = _links(neurons, sample.dense_TD)
    shared_N, rest_N = divide(links_FF.sum(dim=1), num_shared_neurons)
    if num_shared_neurons:
        links_FF = links_FF[rest_N][:, rest_N]
    labels_N = partition(links_FF, num_experts, seed)
    return Grouping(shared_N, experts(rest_N, labels_N, num_experts))


def _links(neurons: Neurons, x_TD: torch.Tensor) -> torch.Tensor:
    """Return the co-activation of every pair, fp32 [F, F], none of a neuron with itself."""
    num_neurons = len(neurons.gate_FD)
    links_FF = neurons.gate_FD.new_zeros(num_neurons, num_neurons)
    for part_TD in portions(x_TD, num_neurons):
        gate_TF = neurons.gate(part_TD)
        fired_TF = (part_TD.float() @ neurons.up_FD.T).mul_(gate_TF).abs_().mul_(gate_TF > 0)
        links_FF.addmm_(fired_TF.T, fired_TF)
    return links_FF.fill_diagonal_(0)
