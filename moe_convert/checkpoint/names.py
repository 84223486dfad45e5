"""What transformers itself stores for a configuration: names and shapes, with no memory taken."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def full_config(values: Mapping[str, Any]) -> PreTrainedConfig:
    """Return the config object of a config.json, of transformers or of `templates.modeling_moe`."""
    from transformers import CONFIG_MAPPING

    model_type = str(values["model_type"])
    if model_type in CONFIG_MAPPING:
        return CONFIG_MAPPING[model_type].from_dict(dict(values))
    from moe_convert.templates import modeling_moe

    kind = modeling_moe.make_class("MoeConfig", str(values["base_model_type"]))
    config: PreTrainedConfig = kind.from_dict(dict(values))
    return config


def auto_class(config: PreTrainedConfig) -> Any:
    """Return the auto class that loads this config: text models, or text decoders with a tower.

    Decoders that come with a tower only have no head of their own.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
    )

    if config.get_text_config() is not config:
        return AutoModelForImageTextToText
    own = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    causal = own or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForCausalLM if causal else AutoModel


def stored_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor that `save_pretrained` writes for this config."""
    from transformers.core_model_loading import revert_weight_conversion

    model = blueprint(config)
    state = _untied_state(model)
    return {n: tuple(t.shape) for n, t in revert_weight_conversion(model, state).items()}


def loaded_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor as the loaded model calls it."""
    return {n: tuple(t.shape) for n, t in _untied_state(blueprint(config)).items()}


def loaded_names(config: PreTrainedConfig, stored: Iterable[str]) -> dict[str, str]:
    """Return how the loaded model calls each stored tensor; those that it ignores are left out."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    model = blueprint(config)
    state = model.state_dict()
    renamings = [r for r in get_model_conversion_mapping(model) if isinstance(r, WeightRenaming)]
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq"]
    names = {}
    for name in stored:
        loaded, _ = rename_source_key(name, renamings, [], model.base_model_prefix, state)
        if loaded in state or not any(re.search(pattern, loaded) for pattern in ignored):
            names[name] = loaded
    return names


def embedding_name(config: PreTrainedConfig) -> str:
    """Return what the loaded model calls its input embedding."""
    model = blueprint(config)
    embedding = model.get_input_embeddings().weight
    names: list[str] = [name for name, value in model.named_parameters() if value is embedding]
    return names[0]


def blueprint(config: PreTrainedConfig) -> PreTrainedModel:
    """Return the model of a config on the meta device: names and shapes, no values."""
    import torch

    with torch.device("meta"):
        return build(config)


def build(config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    """Return a model of a config, of transformers or of `templates.modeling_moe`."""
    base = getattr(config, "base_model_type", None)
    if base is None:
        model: PreTrainedModel = auto_class(config).from_config(config, **options)
        return model
    from moe_convert.templates import modeling_moe

    made: PreTrainedModel = modeling_moe.make_class("MoeForCausalLM", base)(config)
    return made


def _untied_state(model: PreTrainedModel) -> dict[str, Any]:
    state: dict[str, Any] = model.state_dict()
    for tied in getattr(model, "all_tied_weights_keys", None) or {}:
        state.pop(tied, None)
    return state
