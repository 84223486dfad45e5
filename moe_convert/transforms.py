"""Value transforms that table rows refer to: small pure functions of one tensor.

D hidden size · H attention heads · C head size · R rotary part of the head size
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from moe_convert.ffn import Weight

if TYPE_CHECKING:
    import torch

STILL = 1e30
"""Divides any position to an angle whose cosine is one and whose sine vanishes in every dtype."""


def plus_one(weight: Weight) -> Weight:
    """Turn a norm weight that is applied as `1 + w` into one that is applied as `w`."""
    return weight.map(lambda tensor: tensor + 1.0)


def half_split(weight: Weight, num_heads: int, rotary_dim: int) -> Weight:
    """Reorder q or k rows (or biases) from interleaved rotary pairs to half-split ones.

    Interleaved rotation pairs entries 2i and 2i + 1 of a head, half-split rotation i and i + R/2;
    entries behind the rotary part stay. The product q k does not change.
    """
    return weight.rows(_head_order(weight.shape[0], num_heads, rotary_dim))


def _head_order(num_rows: int, num_heads: int, rotary_dim: int) -> torch.Tensor:
    import torch

    head_dim = num_rows // num_heads
    rotary = torch.arange(rotary_dim).view(-1, 2).T.flatten()
    order_C = torch.cat([rotary, torch.arange(rotary_dim, head_dim)])
    return (torch.arange(num_heads)[:, None] * head_dim + order_C).flatten()


def split_rows(weight: Weight, sizes: tuple[int, ...]) -> tuple[Weight, ...]:
    """Cut a fused projection into consecutive groups of rows."""
    parts, start = [], 0
    for size in sizes:
        parts.append(weight.rows(range(start, start + size)))
        start += size
    return tuple(parts)


def spread_rotary(weight: Weight, num_heads: int, rotary_dim: int) -> Weight:
    """Reorder q or k rows (or biases) so that a partial rotation becomes part of a full one.

    Half-split rotation of the first R entries of a head pairs i with i + R/2, that of all C entries
    i with i + C/2. Moved there, with frequency zero for all other pairs, the same entries turn and
    the others stay. The product q k does not change.
    """
    return weight.rows(_spread_order(weight.shape[0], num_heads, rotary_dim))


def _spread_order(num_rows: int, num_heads: int, rotary_dim: int) -> torch.Tensor:
    import torch

    head_dim = num_rows // num_heads
    first, second = torch.arange(rotary_dim).chunk(2)
    still, still_too = torch.arange(rotary_dim, head_dim).chunk(2)
    order_C = torch.cat([first, still, second, still_too])
    return (torch.arange(num_heads)[:, None] * head_dim + order_C).flatten()


def spread_wavelengths(theta: float, head_dim: int, rotary_dim: int) -> list[float]:
    """Return the divisor of the position for every pair of a head, see `spread_rotary`.

    Rounded to fp32 as transformers rounds it for a partial rotation, so that the frequencies are
    equal bit by bit; pairs that do not turn have a divisor that leaves any position near zero.
    """
    import torch

    turning = theta ** (torch.arange(0, rotary_dim, 2, dtype=torch.float) / rotary_dim)
    return [*turning.tolist(), *[STILL] * ((head_dim - rotary_dim) // 2)]


def transposed(weight: Weight) -> Weight:
    """Swap rows and columns, for experts whose down projection is stored as its input sees it."""
    shape = (weight.shape[1], weight.shape[0])
    return weight.map(lambda tensor: tensor.T.contiguous(), shape, rounds=False)


def root_scaled(weight: Weight) -> Weight:
    """Multiply a scale per channel [D] by √D, where the target divides by that again.

    For routers: rounding moves tokens between experts and not the function, so it may happen.
    """
    root = math.sqrt(weight.shape[0])
    return weight.map(lambda tensor: tensor * root, rounds=False)


def transparent_norm(norm_eps: float, factor: float) -> float:
    """Return the weight of an RMSNorm that the next RMSNorm undoes, where `factor` comes before it.

    Dense computes N(x) = x / sqrt(m + eps) with m the mean of x², and here a norm comes before:
    N(c N(s x)) = x / sqrt(m (1 + eps / c²) + (eps / c s)²). With c s = sqrt(eps) that is N(x) but
    for m eps / c², which fp32 does not see for c of 4 or more. A factor s = c = 1 would lose eps:
    an error of eps / 2m, large where x is small.
    """
    return math.sqrt(norm_eps) / factor
