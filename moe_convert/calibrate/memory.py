"""Whether what a step keeps for its backward pass fits, and layers that are computed twice if not.

B rows · T tokens
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from moe_convert.plan import available_ram_bytes
from moe_convert.runtime import free_gpu_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BYTES_TO_COME = 14
"""Of each trained parameter after loading: two moments, and its gradient, in fp32 and in bf16."""
MARGIN = 1.2
"""For what is needed for a moment only, and for memory that is free and not in one piece."""


@dataclass(frozen=True)
class Need:
    """What a step will take, and what is free for it, in bytes."""

    needed_bytes: int
    free_bytes: int

    @property
    def fits(self) -> bool:
        """Whether there is enough."""
        return self.needed_bytes <= self.free_bytes

    def __str__(self) -> str:
        """Say both."""
        return f"{self.needed_bytes / 1e9:.3g} GB of {self.free_bytes / 1e9:.3g} GB"


def kept_bytes(model: torch.nn.Module, **inputs: Any) -> int:
    """Return what one forward pass keeps for the backward one, the model's own tensors aside."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        held = model(**inputs)  # while it lives no address is given out again
    del held
    return sum(kept.values())


def step_need(
    student: PreTrainedModel, row_1T: torch.Tensor, rows: int, trained: int, processes: int
) -> Need:
    """Return what a step of some rows takes, from one forward pass of one.

    Logits count three times: the student's, the teacher's and their gradient. Processes share the
    memory of a host, and have a GPU each.
    """
    kept = kept_bytes(student, input_ids=row_1T, use_cache=False)
    vocab_size = student.get_output_embeddings().weight.shape[0]
    logits = 3 * row_1T.numel() * vocab_size * student.dtype.itemsize
    needed = int(MARGIN * rows * (kept + logits)) + BYTES_TO_COME * trained
    return Need(needed, free_bytes(row_1T.device, processes))


def free_bytes(device: torch.device, processes: int) -> int:
    """Return the memory of a device that this process can still use."""
    if device.type != "cuda":
        return available_ram_bytes() // processes
    return free_gpu_bytes(device)


def compute_twice(model: PreTrainedModel) -> None:
    """Recompute layers in the backward pass, without the modes of training such as dropout."""
    newer = getattr(model, "activation_checkpointing_enable", None)
    (newer or model.gradient_checkpointing_enable)({"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True
