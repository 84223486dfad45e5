"""Clusters of one size: the assignment against the optimum of another solver, and k-means."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from moe_convert.clustering import balanced, balanced_kmeans


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clustered(seed: int) -> torch.Tensor:
    """Squared distances of points in ten blobs of very unequal size; some blobs have no centre."""
    generator = draw(seed)
    blob_N = torch.randint(10, (240,), generator=generator).square() // 10
    x_ND = 4 * torch.randn(10, 6, generator=generator)[blob_N]
    x_ND += torch.randn(240, 6, generator=generator)
    return torch.cdist(x_ND, x_ND[:8]).square()


def counted(seed: int) -> torch.Tensor:
    """Small integers with many ties, as between columns of zeros and ones."""
    x_NT = (torch.rand(240, 60, generator=draw(seed)) < 0.05).float()
    return torch.cdist(x_NT, x_NT[:8], p=1)


def repeated(seed: int) -> torch.Tensor:
    """Half of the points are one point."""
    cost_NE = torch.rand(240, 8, generator=draw(seed))
    cost_NE[:120] = cost_NE[0]
    return cost_NE


COSTS: dict[str, Callable[[int], torch.Tensor]] = {
    "uniform": lambda seed: torch.rand(240, 8, generator=draw(seed)),
    "wide": lambda seed: torch.rand(240, 80, generator=draw(seed)),
    "one each": lambda seed: torch.rand(60, 60, generator=draw(seed)),
    "large": lambda seed: 1e9 + 1e6 * torch.randn(240, 8, generator=draw(seed), dtype=torch.double),
    "heavy tails": lambda seed: torch.randn(240, 8, generator=draw(seed)).mul(4).exp(),
    "clustered": clustered,
    "counted": counted,
    "repeated": repeated,
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", COSTS)
def test_the_total_cost_is_the_least_there_is(name: str, seed: int) -> None:
    cost_NE = COSTS[name](seed)
    num_points, num_clusters = cost_NE.shape
    capacity = num_points // num_clusters
    labels_N = balanced(cost_NE, capacity)
    assert labels_N.dtype == torch.int64
    assert labels_N.bincount(minlength=num_clusters).tolist() == [capacity] * num_clusters
    surplus_NE = (cost_NE - cost_NE.min(dim=1, keepdim=True).values).double()
    square_NN = surplus_NE.repeat_interleave(capacity, dim=1).numpy()
    least = square_NN[linear_sum_assignment(square_NN)].sum()
    rounding = num_points * 2.0**-20 * float(surplus_NE.mean())
    total = float(surplus_NE.gather(1, labels_N.unsqueeze(1)).sum())
    assert least - 1e-6 <= total <= least * (1 + 1e-6) + rounding


def test_a_planted_assignment_is_found_exactly() -> None:
    planted_N = torch.randperm(96, generator=draw(3)) % 8
    cost_NE = 1 + torch.rand(96, 8, generator=draw(4))
    cost_NE[torch.arange(96), planted_N] = 0.5
    assert torch.equal(balanced(cost_NE, 12), planted_N)


def test_equal_costs_and_one_cluster_still_give_equal_sizes() -> None:
    assert balanced(torch.full((12, 3), 7.0), 4).bincount().tolist() == [4, 4, 4]
    assert balanced(torch.rand(5, 1), 5).tolist() == [0] * 5


def test_the_assignment_does_not_depend_on_when_it_is_made() -> None:
    cost_NE = COSTS["counted"](0)
    torch.manual_seed(1)
    one = balanced(cost_NE, 30)
    state = torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(one, balanced(cost_NE, 30))
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_has_no_assignment_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="3 clusters of 4 do not hold 11 points"):
        balanced(torch.ones(11, 3), 4)
    with pytest.raises(ValueError, match="costs must be finite"):
        balanced(torch.tensor([[1.0, bad], [2.0, 3.0]]), 1)
    with pytest.raises(ValueError, match="11 points do not form 3 clusters of one size"):
        balanced_kmeans(torch.ones(11, 2), 3, seed=0)


def test_kmeans_finds_planted_clusters_of_one_size() -> None:
    planted_N = torch.randperm(160, generator=draw(0)) % 8
    centres_ED = 100 + 5 * torch.randn(8, 5, generator=draw(1))
    x_ND = centres_ED[planted_N] + 0.1 * torch.randn(160, 5, generator=draw(2))
    found_ED, labels_N = balanced_kmeans(x_ND, 8, seed=0)
    for cluster in range(8):
        assert len(planted_N[labels_N == cluster].unique()) == 1
        torch.testing.assert_close(found_ED[cluster], x_ND[labels_N == cluster].mean(dim=0))
    started = balanced_kmeans(x_ND, 8, seed=0, rounds=1, start_ED=centres_ED)[1]
    assert torch.equal(started, planted_N)


def test_kmeans_lowers_its_distances_round_by_round_and_is_seeded() -> None:
    x_ND = torch.randn(240, 6, generator=draw(5))
    totals = []
    for rounds in (1, 2, 4, 30):
        torch.manual_seed(rounds)
        centres_ED, labels_N = balanced_kmeans(x_ND, 6, seed=9, rounds=rounds)
        assert labels_N.bincount().tolist() == [40] * 6
        totals.append(float((x_ND - centres_ED[labels_N]).square().sum()))
    assert totals == sorted(totals, reverse=True)
    assert totals[0] > totals[-1]
    again = balanced_kmeans(x_ND, 6, seed=9, rounds=30)
    assert torch.equal(again[1], labels_N)
    assert torch.equal(again[0], centres_ED)
    assert not torch.equal(balanced_kmeans(x_ND, 6, seed=8, rounds=30)[1], labels_N)
