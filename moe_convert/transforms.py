"""Value transforms that table rows refer to: small pure functions of one tensor.

D hidden size · H attention heads · C head size · R rotary part of the head size
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_convert.ffn import Weight

if TYPE_CHECKING:
    import torch


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
