"""MoE targets: the stock architectures, what each can hold, and its names on disk.

A row is data: which Body features have a place in its config, how its router weighs experts, how
its expert tensors are called on disk (the hub's names, which every engine reads) and what serving
engines do differently with the same files. To add a target, add a row to one of the modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_convert.families import Body, DenseFamily
from moe_convert.targets import (
    cohere,
    deepseek,
    ernie,
    gemma,
    gemma4,
    glm,
    granite,
    hunyuan,
    lfm2,
    mellum,
    mixtral,
    olmo,
    phimoe,
    qwen,
    qwen3_5,
)
from moe_convert.targets.base import MoeShape, MoeTarget

MODULES = (
    mixtral,
    qwen,
    glm,
    qwen3_5,
    lfm2,
    deepseek,
    granite,
    olmo,
    gemma,
    gemma4,
    mellum,
    ernie,
    cohere,
    hunyuan,
    phimoe,
)

TARGETS: dict[str, MoeTarget] = {row.model_type: row for module in MODULES for row in module.ROWS}
"""Every target, by model type."""

LEGACY_KEYS = {"num_local_experts": "num_experts"}
"""Keys of transformers 5 and the older names that some tools still read."""


def with_legacy_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Add the keys of older releases: both spellings load alike."""
    result = dict(config)
    rope = dict(result.get("rope_parameters") or {})
    if "rope_theta" in rope:
        result["rope_theta"] = rope.pop("rope_theta")
        kind = rope.get("rope_type", "default")
        rope.pop("partial_rotary_factor", None)
        plain = kind == "default" and not rope.keys() - {"rope_type"}
        result["rope_scaling"] = None if plain else {**rope, "type": kind}
    for key, old in LEGACY_KEYS.items():
        if key in result:
            result[old] = result[key]
    if "text_config" in result:
        result["text_config"] = with_legacy_keys(result["text_config"])
    return result


def candidates(family: DenseFamily, body: Body) -> dict[str, list[str]]:
    """Return each target proved for this family with the reasons why it does not fit this body."""
    return {name: TARGETS[name].misfits(body) for name in family.targets}


__all__ = ["TARGETS", "MoeShape", "MoeTarget", "candidates", "with_legacy_keys"]
