"""Layers that are compiled for the time of training, so that what lies between products is fused.

Compiling takes a minute or two and needs a C++ compiler, so that it is nobody's default.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from transformers.modeling_layers import GradientCheckpointingLayer

from moe_convert.calibrate.step import Models

if TYPE_CHECKING:
    import torch

BACKEND = "inductor"
"""What compiles."""


@contextlib.contextmanager
def compiled(models: Models, *, wanted: bool) -> Iterator[None]:
    """Compile the layers of student and teacher, if that is wanted, until the block is left.

    Shapes are taken as they are. Modules of one kind share what was compiled for the first.
    """
    modules: list[torch.nn.Module] = []
    for model in (models.student, models.teacher) if wanted else ():
        for layer in model.modules() if model is not None else ():
            if isinstance(layer, GradientCheckpointingLayer):
                modules += _unhooked(layer)
    try:
        for module in modules:
            module.compile(backend=BACKEND, dynamic=False)
        yield
    finally:
        for module in modules:
            module._compiled_call_impl = None


def _unhooked(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Yield the largest parts of a module that call nothing from outside while they run.

    The routers are watched by hooks, each of a layer, which would be compiled for every layer anew.
    """
    if any(_is_hooked(part) for part in module.modules()):
        for child in () if _is_hooked(module) else module.children():
            yield from _unhooked(child)
    else:
        yield module


def _is_hooked(module: torch.nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"))
