"""What transformers itself stores for a configuration: names and shapes, with no memory taken."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def stored_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor that `save_pretrained` writes for this config."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    state = model.state_dict()
    for tied in getattr(model, "all_tied_weights_keys", None) or {}:
        state.pop(tied, None)
    return {n: tuple(t.shape) for n, t in revert_weight_conversion(model, state).items()}
