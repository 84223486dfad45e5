"""Where the work is done: the recipe's `runtime`, and the device that it means here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from moe_convert.errors import UsageError

if TYPE_CHECKING:
    import torch


class Runtime(BaseModel):
    """What runs the model where one has to be run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: a GPU if there is one"
    )
    precision: Literal["auto", "full"] = Field(
        "auto",
        description="auto: what measures and fits multiplies in bf16 or TF32 where that is faster",
    )
    offload_dir: str | None = Field(
        None,
        description="split: folder on whose disk the hidden states live, not in memory; without "
        "it beside the output, where they would take more than half of the free memory",
    )


def bf16_is_fast() -> bool:
    """Whether the CPU multiplies in bf16 itself; where it must convert, fp32 is faster."""
    import torch

    found: dict[str, bool] = torch.cpu.get_capabilities()
    return any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "amx_tile"))


@contextlib.contextmanager
def products(device: str, precision: str) -> Iterator[None]:
    """Set how matrices are multiplied while this lasts; see `Runtime.precision`."""
    import torch

    before = torch.get_float32_matmul_precision()
    fast = precision == "auto"
    torch.set_float32_matmul_precision("high" if fast and device == "cuda" else "highest")
    wanted = fast and (device == "cuda" or bf16_is_fast())
    try:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=wanted):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def exact_products(device: str) -> Iterator[None]:
    """Multiply fp32 matrices as fp32 inside `products`, or with the bits of TF32 on a GPU."""
    import torch

    with torch.autocast(device, enabled=False):
        yield


def free_gpu_bytes(device: torch.device | None = None) -> int:
    """Return what this process can still take on a GPU: what PyTorch holds unused is free to it."""
    import torch

    unused: int = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused


def chosen_device(wanted: str) -> str:
    """Return cpu or cuda.

    Raises:
        UsageError: a GPU was asked for and there is none.
    """
    import torch

    if wanted == "cuda" and not torch.cuda.is_available():
        raise UsageError("torch sees no CUDA device here.", "Use --device cpu.")
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return wanted
