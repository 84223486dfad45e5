"""Tensors that are cut over processes (FSDP2, expert parallel), seen whole and filled again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.distributed
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

if TYPE_CHECKING:
    from transformers.distributed import DistributedConfig


def config_of(parallel: str, world_size: int, *, bf16: bool) -> DistributedConfig:
    """Return how the student is cut: all of it, and with `experts` each process has some experts.

    Every process has data of its own, so that gradients are those of the global batch. What is cut
    stays fp32; with `bf16` products are computed in it.
    """
    from transformers.distributed import DistributedConfig

    experts = {"ep_size": world_size} if parallel == "experts" else {}
    return DistributedConfig(fsdp_size=world_size, fsdp_mixed_precision=bf16, **experts)


def is_cut(tensor: torch.Tensor) -> bool:
    """Whether this process has only a part of a tensor."""
    return isinstance(tensor, DTensor)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return all of a tensor; every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def fill(tensor: torch.Tensor, full: torch.Tensor) -> None:
    """Give a tensor new values, of which this process keeps its part."""
    if not isinstance(tensor, DTensor):
        tensor.copy_(full)
        return
    sizes, offsets = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    part = tuple(slice(at, at + size) for at, size in zip(offsets, sizes, strict=True))
    tensor.to_local().copy_(full[part])


def clip(tensors: Iterable[torch.Tensor], limit: float) -> torch.Tensor:
    """Scale gradients down to a norm of all of them together; return what it was.

    Tensors may be cut over different meshes, each over all processes.
    """
    gradients = [tensor.grad for tensor in tensors if tensor.grad is not None]
    own = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
    total = torch.stack([part.float().square().sum() for part in own]).sum()
    torch.distributed.all_reduce(total)
    norm = total.sqrt()
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    for part in own:
        part.mul_(factor)
    return norm
