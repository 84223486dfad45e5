"""Dense families: what each one's config means and where its feed-forward weights lie.

A family row translates a Hugging Face config into a `Body`, the vocabulary in which every target
says what it can hold, and its tensors into Llama's names. An attribute that no row understands is
refused by name, so nothing is lost in silence. To add a family, add a row to one of the modules.
"""

from __future__ import annotations

from moe_convert.checkpoint.configs import Filled, filled
from moe_convert.errors import UnsupportedError
from moe_convert.families import (
    cohere,
    ernie,
    gemma,
    gemma4,
    glm,
    granite,
    hunyuan,
    lfm2,
    llama,
    ministral,
    olmo,
    phi,
    qwen3_5,
    smollm,
    stablelm,
    youtu,
)
from moe_convert.families.body import Body, Config, DenseFamily, layer_name, order, split_name
from moe_convert.families.custom import custom_hint, custom_reason
from moe_convert.families.refused import refused_reason

MODULES = (
    llama,
    qwen3_5,
    lfm2,
    youtu,
    phi,
    gemma,
    granite,
    olmo,
    smollm,
    gemma4,
    ministral,
    cohere,
    glm,
    ernie,
    hunyuan,
    stablelm,
)

FAMILIES: dict[str, DenseFamily] = {
    row.model_type: row for module in MODULES for row in module.ROWS
}
"""Every dense family, by model type."""


def find_family(config: Config, fill: Filled = filled) -> tuple[DenseFamily, Body]:
    """Return the family row and the body of a config.json, whose defaults `fill` adds.

    Raises:
        UnsupportedError: no row has this model type, or an attribute is not understood.
        SourceError: transformers rejects the config.
    """
    model_type = str(config["model_type"])
    family = FAMILIES.get(model_type)
    if family is None:
        raise UnsupportedError(
            f"No stock MoE architecture is known to hold {model_type} models exactly"
            f"{custom_reason(model_type) or refused_reason(model_type)}.",
            f"{custom_hint(model_type)} Supported: {', '.join(FAMILIES)}; see `moe-convert archs "
            "ls`.".lstrip(),
        )
    return family, family.body(fill(config), config)


__all__ = ["FAMILIES", "Body", "Config", "DenseFamily", "find_family", "layer_name", "order",
           "split_name"]  # fmt: skip
