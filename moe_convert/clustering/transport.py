"""The transport problem: points go to clusters of one size at the least total cost.

N points · E clusters
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    Ints = NDArray[np.int64]

PRICE_ROUNDS = 10
COOLING = 0.4
COLDEST = 2e-3
"""Temperatures of the prices, relative to the mean cost: from 1 down, by this factor."""

BALANCE = 0.02
"""The share of the points that prices may leave in the wrong place: the exchange moves them."""

QUANTUM = 2.0**-20
"""What costs are rounded to, relative to their mean, so that sums of them are exact."""

UNREACHED = 1 << 60


def balanced(cost_NE: torch.Tensor, capacity: int) -> torch.Tensor:
    """Return the cluster of every point, int64 [N], `capacity` points in each, at the least cost.

    A transport problem, solved in two steps. Newton's method on the entropic dual, at falling
    temperatures, finds a price per cluster (Cuturi 2013, arXiv 1306.0895, solves it by scaling);
    giving every point to its cheapest cluster is then optimal for the sizes that come out. The few
    points too many move along shortest paths between clusters, which keeps that true until the
    sizes are equal. The total is the optimum but for rounding the costs to a millionth of their
    mean; small integers are not rounded. Memory is a few times the costs.

    Raises:
        ValueError: the clusters do not hold exactly the points.
    """
    import torch

    num_points, num_clusters = cost_NE.shape
    if num_points != num_clusters * capacity:
        raise ValueError(f"{num_clusters} clusters of {capacity} do not hold {num_points} points")
    cost_NE = cost_NE.double() - cost_NE.double().min(dim=1, keepdim=True).values
    mean = float(cost_NE.mean())
    if not math.isfinite(mean):
        raise ValueError("costs must be finite")
    if mean == 0:
        return torch.arange(num_clusters, device=cost_NE.device).repeat_interleave(capacity)
    quantum = 2.0 ** math.floor(math.log2(mean * QUANTUM))
    prices_E = _prices(cost_NE.float(), capacity, mean)
    units_NE = (cost_NE / quantum).round().long()
    labels_N = (units_NE + (prices_E.double() / quantum).round().long()).argmin(dim=1)
    moved_N = _exchange(units_NE.cpu().numpy(), labels_N.cpu().numpy(), capacity)
    return torch.from_numpy(moved_N).to(cost_NE.device)


def _prices(cost_NE: torch.Tensor, capacity: int, mean: float) -> torch.Tensor:
    """Return what a place in each cluster costs extra, fp32 [E], to make them equally popular.

    A step that makes the sizes worse is taken back and damped more.
    """
    import torch

    prices_E = torch.zeros(cost_NE.shape[1], device=cost_NE.device)
    temperature = mean
    while temperature > COLDEST * mean:
        share_NE, excess_E = _shares(cost_NE + prices_E, capacity, temperature)
        damping = 1e-3
        for _ in range(PRICE_ROUNDS):
            if float(excess_E.abs().sum()) < BALANCE * len(cost_NE):
                break
            curvature_EE = torch.diag(share_NE.sum(dim=0) + capacity * damping)
            curvature_EE -= share_NE.T @ share_NE
            step_E = torch.linalg.solve(curvature_EE.double(), excess_E.double()).float()
            tried_E = prices_E + temperature * step_E
            tried = _shares(cost_NE + tried_E, capacity, temperature)
            better = bool(tried[1].abs().sum() < excess_E.abs().sum())
            damping *= 0.1 if better else 10
            if better:
                prices_E, (share_NE, excess_E) = tried_E, tried
        temperature *= COOLING
    return prices_E


def _shares(
    cost_NE: torch.Tensor, capacity: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how much of each point each cluster gets, and how much each gets too many."""
    share_NE = (cost_NE / -temperature).softmax(dim=1)
    return share_NE, share_NE.sum(dim=0) - capacity


def _exchange(cost_NE: Ints, labels_N: Ints, capacity: int) -> Ints:
    """Return labels with equal sizes: successive shortest paths in the graph of the clusters.

    The length of an arc is what the cheapest move from one cluster to another adds to the total.
    Points that tie move together. Integer costs keep the graph free of negative cycles.
    """
    import numpy as np

    num_clusters = cost_NE.shape[1]
    labels_N = labels_N.copy()
    counts_E = np.bincount(labels_N, minlength=num_clusters)
    moves_EE = np.stack([_moves(cost_NE, labels_N, e) for e in range(num_clusters)])
    while counts_E.max() > capacity:
        path = _shortest_path(moves_EE, counts_E - capacity)
        arcs = list(pairwise(path))
        tied = [_tied(cost_NE, labels_N, a, b, moves_EE[a, b]) for a, b in arcs]
        room = min(counts_E[path[0]] - capacity, capacity - counts_E[path[-1]])
        units = min(room, *map(len, tied))
        for points, (_, cluster) in zip(tied, arcs, strict=True):
            labels_N[points[:units]] = cluster
        counts_E[path[0]] -= units
        counts_E[path[-1]] += units
        for cluster in path:
            moves_EE[cluster] = _moves(cost_NE, labels_N, cluster)
    return labels_N


def _moves(cost_NE: Ints, labels_N: Ints, cluster: int) -> Ints:
    """Return what the cheapest move out of a cluster to each other one adds, [E]."""
    points = (labels_N == cluster).nonzero()[0]
    added: Ints = cost_NE[points] - cost_NE[points, cluster][:, None]
    cheapest_E: Ints = added.min(axis=0, initial=UNREACHED)
    return cheapest_E


def _tied(cost_NE: Ints, labels_N: Ints, cluster: int, to: int, added: int) -> Ints:
    """Return the points whose move from one cluster to another adds just this much."""
    points = (labels_N == cluster).nonzero()[0]
    tied: Ints = points[cost_NE[points, to] - cost_NE[points, cluster] == added]
    return tied


def _shortest_path(moves_EE: Ints, excess_E: Ints) -> list[int]:
    """Return the cheapest path from a cluster with too many points to one with too few."""
    import numpy as np

    every_E = np.arange(len(excess_E))
    length_E = np.where(excess_E > 0, 0, UNREACHED)
    before_E = np.full(len(excess_E), -1)
    shorter_E = excess_E > 0
    while shorter_E.any():
        through_EE = length_E[:, None] + moves_EE
        nearest_E = through_EE.argmin(axis=0)
        shorter_E = through_EE[nearest_E, every_E] < length_E
        length_E = np.where(shorter_E, through_EE[nearest_E, every_E], length_E)
        before_E = np.where(shorter_E, nearest_E, before_E)
    path = [int(np.where(excess_E < 0, length_E, 2 * UNREACHED).argmin())]
    while before_E[path[-1]] >= 0:
        path.append(int(before_E[path[-1]]))
    return path[::-1]
