"""Which rows a step takes, and what they predict.

B rows · T tokens
"""

from __future__ import annotations

import torch

from moe_convert.losses import NO_LABEL


def order(num_rows: int, start: int, count: int, seed: int) -> list[int]:
    """Return the rows at `count` positions from `start` on, in passes of a new order each."""
    found: list[int] = []
    while len(found) < count:
        turn, offset = divmod(start + len(found), num_rows)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + turn)
        found += torch.randperm(num_rows, generator=generator)[offset:].tolist()
    return found[:count]


def labels_of(ids_BT: torch.Tensor) -> torch.Tensor:
    """Return the next token at every place, int64 [B * T]; a row's last one has none."""
    labels_BT = ids_BT.roll(-1, dims=1)
    labels_BT[:, -1] = NO_LABEL
    return labels_BT.flatten()
