"""k-means on hidden states, with clusters of any size and of one size.

T points · D dimensions · K clusters, and where clusters are equally large N points · E clusters
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from moe_convert.clustering.transport import balanced

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
    x_TD = (x_TD.float() - mean_D).contiguous()  # distances cancel less around the origin
    square_T = _squares(x_TD)
    centres_KD = _seeds(x_TD, square_T, num_clusters, torch.Generator().manual_seed(seed))
    labels_T = torch.full((len(x_TD),), -1, device=x_TD.device)
    for _ in range(MAX_ROUNDS):
        distance_T, new_T = _squared(x_TD, square_T, centres_KD).min(dim=1)
        if torch.equal(new_T, labels_T):
            break
        labels_T = new_T
        centres_KD = _means(x_TD, labels_T, distance_T, num_clusters)
    return centres_KD + mean_D, labels_T


def balanced_kmeans(
    x_ND: torch.Tensor,
    num_clusters: int,
    seed: int,
    rounds: int = 4,
    start_ED: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return centres, fp32 [E, D], and the cluster of every point, int64 [N], equally many in each.

    Lloyd's algorithm with the assignment of `balanced`: every round gives the points to the centres
    at the least total squared distance among all equal partitions, then moves the centres to the
    means, until nothing changes or after so many rounds. It starts from k-means++ seeds, or from
    `start_ED`. The same seed gives the same clusters, on the same device.

    Raises:
        ValueError: the points do not divide evenly.
    """
    import torch

    if len(x_ND) % num_clusters:
        raise ValueError(f"{len(x_ND)} points do not form {num_clusters} clusters of one size")
    mean_D = x_ND.float().mean(dim=0)
    x_ND = (x_ND.float() - mean_D).contiguous()
    square_N = _squares(x_ND)
    if start_ED is None:
        centres_ED = _seeds(x_ND, square_N, num_clusters, torch.Generator().manual_seed(seed))
    else:
        centres_ED = start_ED.float() - mean_D
    labels_N = torch.full((len(x_ND),), -1, device=x_ND.device)
    for _ in range(rounds):
        distance_NE = _squared(x_ND, square_N, centres_ED)
        new_N = balanced(distance_NE, len(x_ND) // num_clusters)
        if torch.equal(new_N, labels_N):
            break
        labels_N = new_N
        centres_ED = _means(x_ND, labels_N, distance_NE[:, 0], num_clusters)
    return centres_ED + mean_D, labels_N


def _seeds(
    x_TD: torch.Tensor, square_T: torch.Tensor, num_clusters: int, generator: torch.Generator
) -> torch.Tensor:
    import torch

    chosen = [int(torch.randint(len(x_TD), (1,), generator=generator))]
    nearest_T = _squared(x_TD, square_T, x_TD[chosen]).squeeze(1)
    for _ in range(num_clusters - 1):
        weights_T = nearest_T if float(nearest_T.sum()) > 0 else torch.ones_like(nearest_T)
        tries = 2 + int(math.log(num_clusters))
        picked = torch.multinomial(weights_T.cpu(), tries, replacement=True, generator=generator)
        distance_TP = _squared(x_TD, square_T, x_TD[picked])
        left = torch.minimum(nearest_T.unsqueeze(1), distance_TP)
        best = int(left.sum(dim=0).argmin())
        chosen.append(int(picked[best]))
        nearest_T = left[:, best]
    return x_TD[chosen]


def _squares(x_TD: torch.Tensor) -> torch.Tensor:
    """Return the squared length of every point [T]."""
    return x_TD.norm(dim=1).square()


def _squared(x_TD: torch.Tensor, square_T: torch.Tensor, centres_KD: torch.Tensor) -> torch.Tensor:
    """Return squared distances [T, K] of points, whose squared lengths are known."""
    square_TK = square_T.unsqueeze(1) + _squares(centres_KD)
    return square_TK.sub_(x_TD @ centres_KD.T, alpha=2).clamp_(min=0)


def _means(
    x_TD: torch.Tensor, labels_T: torch.Tensor, distance_T: torch.Tensor, num_clusters: int
) -> torch.Tensor:
    import torch

    member_TK = torch.nn.functional.one_hot(labels_T, num_clusters).float()
    counts_K = member_TK.sum(dim=0)
    means_KD = (member_TK.T @ x_TD) / counts_K.clamp(min=1).unsqueeze(1)
    empty = (counts_K == 0).nonzero().flatten()
    means_KD[empty] = x_TD[distance_T.argsort(descending=True, stable=True)[: len(empty)]]
    return means_KD
