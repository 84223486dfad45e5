"""ExpertWeaver: neurons whose gates open on the same texts become an expert.

D hidden size · F FFN neurons · E routed experts · N neurons per expert · T tokens · R texts
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_convert.clustering import balanced_kmeans
from moe_convert.ffn import FfnSample, Grouping, Neurons
from moe_convert.grouping.parts import divide, experts

if TYPE_CHECKING:
    import torch

ROUNDS = 20


def group(
    neurons: Neurons, sample: FfnSample, num_experts: int, num_shared_neurons: int, seed: int
) -> Grouping:
    """Return the groups of ExpertWeaver (arXiv 2602.15521).

    A neuron's profile is the mean of its gate's activation over each text. The neurons whose gate
    is most active on average, whatever the sign, are shared, and balanced k-means on the profiles,
    from randomly chosen neurons, makes the experts.

    As in the paper the profiles come from the dense model and look at the gate alone. It assigns
    greedily until nothing changes, here each assignment is optimal and there are at most 20; texts
    are the rows of the calibration data, there samples of 48 tasks; and the number of shared
    neurons is the caller's, there each layer has its own (`shared_share`).
    """
    import torch

    mean_RF, size_RF = profiles(neurons, sample)
    shared_N, rest_N = divide(size_RF.mean(dim=0), num_shared_neurons)
    profile_NR = mean_RF.T[rest_N]
    generator = torch.Generator().manual_seed(seed)
    first_E = torch.randperm(len(rest_N), generator=generator)[:num_experts]
    start_ER = profile_NR[first_E.to(profile_NR.device)]
    labels_N = balanced_kmeans(profile_NR, num_experts, seed, ROUNDS, start_ER)[1]
    return Grouping(shared_N, experts(rest_N, labels_N, num_experts))


def profiles(neurons: Neurons, sample: FfnSample) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean of every gate's activation over each text, and of its size, fp32 [R, F]."""
    import torch

    means, sizes = [], []
    for text_TD in sample.dense_TD.split(sample.row_length):
        gate_TF = neurons.gate(text_TD)
        means.append(gate_TF.mean(dim=0))
        sizes.append(gate_TF.abs_().mean(dim=0))
    return torch.stack(means), torch.stack(sizes)


def shared_share(
    size_RF: torch.Tensor, threshold: float = 0.6, least: float = 0.2, most: float = 0.7
) -> float:
    """Return the share of a layer's neurons that the paper would make shared.

    The more neurons specialise - the more their mean size varies from task to task, relative to its
    mean -, the fewer are shared. `size_RF` is the second result of `profiles`, a row per task.
    Stock architectures have one width of the shared expert in all layers, so `group` does not use
    this; its mean over the layers can serve as that width.
    """
    variation_F = size_RF.std(dim=0, correction=0) / (size_RF.mean(dim=0) + 1e-8)
    return most - (most - least) * float((variation_F > threshold).float().mean())
