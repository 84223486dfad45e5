"""What the strategies share: tokens in portions, the shared neurons, and labels as experts.

D hidden size · F FFN neurons · E routed experts · N neurons per expert · T tokens
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PORTION = 1 << 22
"""Elements of a matrix of activations that are held at once."""
DESCRIBED = 16_384
"""Tokens from which neurons are described and routers fitted: more change little and cost much."""


def portions(tensor_TX: torch.Tensor, num_neurons: int) -> tuple[torch.Tensor, ...]:
    """Return the tokens in parts whose activations [T, F] fit in memory."""
    parts: tuple[torch.Tensor, ...] = tensor_TX.split(max(1, PORTION // num_neurons))
    return parts


def spaced(x_TD: torch.Tensor) -> torch.Tensor:
    """Return evenly spaced tokens, about `DESCRIBED` of them or all."""
    return x_TD[:: max(1, len(x_TD) // DESCRIBED)]


def divide(score_F: torch.Tensor, num_shared: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the neurons with the highest scores and the others, int64, each in their order.

    Of equal scores the lower index counts as higher.
    """
    order_F = score_F.argsort(descending=True, stable=True)
    return order_F[:num_shared].sort().values, order_F[num_shared:].sort().values


def experts(neurons_N: torch.Tensor, labels_N: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Return the neurons of each label as rows [E, N], in the order in which they came."""
    return neurons_N[labels_N.argsort(stable=True)].view(num_experts, -1)
