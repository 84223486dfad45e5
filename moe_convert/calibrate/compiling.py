"""Layers that are compiled for the time of training, so that what lies between products is fused.

Compiling takes a minute or two and needs a C++ compiler, so that it is nobody's default.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch._dynamo.exc import TorchDynamoException
from transformers.modeling_layers import GradientCheckpointingLayer

from moe_convert.calibrate.step import Models
from moe_convert.errors import MissingDependencyError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BACKEND = "inductor"
"""What compiles."""
VARIANTS = 64
"""How often one function may be compiled: transformers' wrappers count as one for all layers."""


@contextlib.contextmanager
def compiled(models: Models, *, wanted: bool) -> Iterator[None]:
    """Compile the layers of student and teacher, if that is wanted, until the block is left.

    Shapes are taken as they are. Modules of one kind share what was compiled for the first.

    Raises:
        MissingDependencyError: there is no compiler that works.
    """
    if not wanted:
        yield
        return
    modules = [*_parts(models.student), *_parts(models.teacher)]
    for module in modules:
        module.compile(backend=BACKEND, dynamic=False)
    try:
        with torch._dynamo.config.patch(recompile_limit=VARIANTS):
            yield
    except TorchDynamoException as error:
        reason = " ".join(str(error).splitlines()[:2]).strip().rstrip(".")
        raise MissingDependencyError(
            f"The layers cannot be compiled here: {reason}.",
            "Install a C++ compiler, and Triton for a GPU, or leave --compile out.",
        ) from error
    finally:
        for module in modules:
            module._compiled_call_impl = None
        torch.compiler.reset()


def _parts(model: PreTrainedModel | None) -> Iterator[torch.nn.Module]:
    """Yield what can be compiled of all layers."""
    for layer in model.modules() if model is not None else ():
        if isinstance(layer, GradientCheckpointingLayer):
            yield from _unhooked(layer)


def _unhooked(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Yield the largest parts of a module that call nothing from outside while they run.

    The routers are watched by hooks, each of a layer, which would be compiled for every layer anew;
    and experts that are not transformers' own may loop over numbers of tokens, which differ.
    """
    if not any(_is_hooked(part) for part in module.modules()):
        yield module
        return
    for name, child in () if _is_hooked(module) else module.named_children():
        if name != "experts" or getattr(child, "has_gate", None) is not None:
            yield from _unhooked(child)


def _is_hooked(module: torch.nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"))
