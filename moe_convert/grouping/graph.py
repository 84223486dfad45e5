"""A weighted graph cut into parts of one size with little weight between them.

N nodes · E parts · K dimensions
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_convert.clustering import balanced_kmeans

if TYPE_CHECKING:
    import torch

POWER_ROUNDS = 8
SWAP_ROUNDS = 500

ROUNDING = 1e-5
"""The least saving that counts, relative to the most weight between a node and a part."""


def partition(links_NN: torch.Tensor, num_parts: int, seed: int) -> torch.Tensor:
    """Return the part of every node, int64 [N], all equally large; links are symmetric and >= 0.

    Spectral clustering (Ng, Jordan and Weiss 2001) with balanced k-means gives a start, then pairs
    of nodes of different parts change places as long as that lowers the cut (Kernighan and Lin
    1970, but only swaps that help by themselves). The same seed gives the same parts.
    """
    embedded_NK = _embedding(links_NN, num_parts, seed)
    labels_N = balanced_kmeans(embedded_NK, num_parts, seed, rounds=10)[1]
    return _swapped(links_NN, labels_N, num_parts)


def cut(links_NN: torch.Tensor, labels_N: torch.Tensor) -> float:
    """Return the share of the graph's weight that lies between parts."""
    inside = sum(
        float(links_NN[nodes][:, nodes].sum())
        for nodes in ((labels_N == part).nonzero().flatten() for part in labels_N.unique())
    )
    return 1 - inside / float(links_NN.sum())


def _embedding(links_NN: torch.Tensor, dimensions: int, seed: int) -> torch.Tensor:
    """Return rows of the leading eigenvectors of the normalised links, made unit vectors.

    Block power iterations on twice as many vectors, some of which go to negative eigenvalues.
    """
    import torch

    scale_N = links_NN.sum(dim=1).clamp(min=1e-30).rsqrt().unsqueeze(1)
    generator = torch.Generator().manual_seed(seed)
    start_NK = torch.randn(len(links_NN), min(2 * dimensions, len(links_NN)), generator=generator)
    basis_NK = torch.linalg.qr(start_NK.to(links_NN.device)).Q
    for _ in range(POWER_ROUNDS):
        basis_NK = torch.linalg.qr(scale_N * (links_NN @ (scale_N * basis_NK))).Q
    small_KK = basis_NK.T @ (scale_N * (links_NN @ (scale_N * basis_NK)))
    vectors_KK = torch.linalg.eigh((small_KK + small_KK.T) / 2).eigenvectors[:, -dimensions:]
    return torch.nn.functional.normalize(basis_NK @ vectors_KK)


def _swapped(links_NN: torch.Tensor, labels_N: torch.Tensor, num_parts: int) -> torch.Tensor:
    """Return labels after swaps that lower the cut; swaps of disjoint pairs of parts add up."""
    import torch

    labels_N = labels_N.clone()
    to_NE = links_NN @ torch.nn.functional.one_hot(labels_N, num_parts).to(links_NN.dtype)
    for _ in range(SWAP_ROUNDS):
        swaps = _disjoint(*_best_swaps(links_NN, to_NE, labels_N))
        for one, other in swaps:
            a, b = int(labels_N[one]), int(labels_N[other])
            moved_N = links_NN[other] - links_NN[one]
            to_NE[:, a] += moved_N
            to_NE[:, b] -= moved_N
            labels_N[one], labels_N[other] = b, a
        if not swaps:
            break
    return labels_N


def _best_swaps(
    links_NN: torch.Tensor, to_NE: torch.Tensor, labels_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return, for every two parts, the node of the first to swap and what the swap saves, [E, E].

    It is the node that gains most by moving, on either side. What rounding may have made is no
    saving.
    """
    import torch

    gain_NE = to_NE - to_NE.gather(1, labels_N.unsqueeze(1))
    num_parts = to_NE.shape[1]
    members_EM = labels_N.argsort(stable=True).view(num_parts, -1)
    best_EE, place_EE = gain_NE[members_EM].max(dim=1)
    node_EE = members_EM.gather(1, place_EE)
    saved_EE = best_EE + best_EE.T - 2 * links_NN[node_EE, node_EE.T]
    return node_EE, (saved_EE - ROUNDING * to_NE.max()).fill_diagonal_(-torch.inf)


def _disjoint(node_EE: torch.Tensor, saved_EE: torch.Tensor) -> list[tuple[int, int]]:
    """Return pairs of nodes to swap, the best first, each part in one pair at most."""
    saved, order = saved_EE.flatten().sort(descending=True, stable=True)
    used: set[int] = set()
    swaps = []
    for flat in order[saved > 0].tolist():
        a, b = divmod(flat, len(saved_EE))
        if not used & {a, b}:
            used |= {a, b}
            swaps.append((int(node_EE[a, b]), int(node_EE[b, a])))
    return swaps
