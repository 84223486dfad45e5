"""k-means on hidden states: deterministic, fp32, no file and no model.

T points · D dimensions · K clusters
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

MAX_ROUNDS = 100


def kmeans(x_TD: torch.Tensor, num_clusters: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return centres, fp32 [K, D], and the cluster of every point, int64 [T].

    Lloyd's algorithm from k-means++ seeds (Arthur and Vassilvitskii 2007), with the usual greedy
    choice among a few candidates. A cluster that runs empty moves to the point that lies farthest
    from its centre. The same seed gives the same centres.

    Raises:
        ValueError: there are fewer points than clusters.
    """
    import torch

    if len(x_TD) < num_clusters:
        raise ValueError(f"{len(x_TD)} points do not form {num_clusters} clusters")
    mean_D = x_TD.float().mean(dim=0)
    x_TD = x_TD.float() - mean_D  # distances cancel less around the origin
    centres_KD = _seeds(x_TD, num_clusters, torch.Generator().manual_seed(seed))
    labels_T = torch.full((len(x_TD),), -1)
    for _ in range(MAX_ROUNDS):
        distance_T, new_T = _squared(x_TD, centres_KD).min(dim=1)
        if torch.equal(new_T, labels_T):
            break
        labels_T = new_T
        centres_KD = _means(x_TD, labels_T, distance_T, num_clusters)
    return centres_KD + mean_D, labels_T


def _seeds(x_TD: torch.Tensor, num_clusters: int, generator: torch.Generator) -> torch.Tensor:
    import torch

    chosen = [int(torch.randint(len(x_TD), (1,), generator=generator))]
    nearest_T = _squared(x_TD, x_TD[chosen]).squeeze(1)
    for _ in range(num_clusters - 1):
        weights_T = nearest_T if float(nearest_T.sum()) > 0 else torch.ones_like(nearest_T)
        tries = 2 + int(math.log(num_clusters))
        picked = torch.multinomial(weights_T, tries, replacement=True, generator=generator)
        left = torch.minimum(nearest_T.unsqueeze(1), _squared(x_TD, x_TD[picked]))
        best = int(left.sum(dim=0).argmin())
        chosen.append(int(picked[best]))
        nearest_T = left[:, best]
    return x_TD[chosen]


def _squared(x_TD: torch.Tensor, centres_KD: torch.Tensor) -> torch.Tensor:
    """Return squared distances [T, K]."""
    product_TK = x_TD @ centres_KD.T
    norms_TK = x_TD.square().sum(dim=1, keepdim=True) + centres_KD.square().sum(dim=1)
    return (norms_TK - 2 * product_TK).clamp(min=0)


def _means(
    x_TD: torch.Tensor, labels_T: torch.Tensor, distance_T: torch.Tensor, num_clusters: int
) -> torch.Tensor:
    import torch

    counts_K = torch.bincount(labels_T, minlength=num_clusters)
    sums_KD = torch.zeros(num_clusters, x_TD.shape[1]).index_add_(0, labels_T, x_TD)
    means_KD = sums_KD / counts_K.clamp(min=1).unsqueeze(1)
    empty = (counts_K == 0).nonzero().flatten()
    means_KD[empty] = x_TD[distance_T.argsort(descending=True, stable=True)[: len(empty)]]
    return means_KD
