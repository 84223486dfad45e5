"""How the dense model's loss depends on the output of every FFN, kept on disk layer by layer.

B rows · T tokens · D hidden size · V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moe_convert.families import DenseFamily

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

BATCH_TOKENS = 2048
"""Tokens that go through the model at once."""

Loader = Callable[[], "torch.Tensor"]
"""Reads one layer's gradients, [B T, D]."""


def spill_gradients(
    model: PreTrainedModel,
    family: DenseFamily,
    ids_BT: torch.Tensor,
    folder: Path,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
) -> tuple[Loader, ...]:
    """Run a dense model forwards and backwards; return how to read each layer's gradients.

    They are those of the mean cross-entropy over all predicted tokens of all rows with respect to
    what the FFN module of the family returns. The last token of a row predicts nothing, so that its
    own loss is missing. Rows go through in batches, and only one batch's activations are held; the
    gradients lie in `folder` as safetensors, which the caller removes. No gradient is left in the
    model, and its parameters need none.
    """
    predicted = len(ids_BT) * (ids_BT.shape[1] - 1)
    batches = ids_BT.split(max(1, BATCH_TOKENS // ids_BT.shape[1]))
    files = []
    for batch, part_BT in enumerate(batches):
        gradients = _gradients(model, family, part_BT.to(model.device), predicted)
        files.append(_spill(gradients, folder, batch, dtype))
    return tuple(partial(_load, list(paths)) for paths in zip(*files, strict=True))


def _gradients(
    model: PreTrainedModel, family: DenseFamily, ids_BT: torch.Tensor, predicted: int
) -> tuple[torch.Tensor, ...]:
    """Return the gradient of the batch's part of the mean loss for every layer, [B, T, D]."""
    import torch

    outputs: list[torch.Tensor] = []

    def keep(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        outputs.append(output if output.requires_grad else output.requires_grad_())
        return outputs[-1]

    with ExitStack() as hooks, torch.enable_grad():
        for layer in model.get_submodule(family.layers):
            ffn = layer.get_submodule(family.ffn_module)
            hooks.callback(ffn.register_forward_hook(keep).remove)
        logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits_BTV[:, :-1].flatten(0, 1).float(), ids_BT[:, 1:].flatten(), reduction="sum"
        )
        gradients: tuple[torch.Tensor, ...] = torch.autograd.grad(loss / predicted, outputs)
    return gradients


def _spill(gradients: tuple[torch.Tensor, ...], folder: Path, batch: int, dtype: str) -> list[Path]:
    """Write a file per layer, so that a layer can be read alone."""
    import torch
    from safetensors.torch import save_file

    paths = [folder / f"{layer}-{batch}.safetensors" for layer in range(len(gradients))]
    for path, gradient_BTD in zip(paths, gradients, strict=True):
        flat = gradient_BTD.flatten(0, 1).to("cpu", getattr(torch, dtype))
        save_file({"gradient": flat.contiguous()}, path)
    return paths


def _load(paths: list[Path]) -> torch.Tensor:
    import torch
    from safetensors.torch import load_file

    return torch.cat([load_file(path)["gradient"] for path in paths])
