"""LoRA adapters that peft saved: read by their headers, merged tensor by tensor when one is loaded.

A adapter rows [r, in] · B adapter columns [out, r] · W weight [out, in]
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_convert.checkpoint.safetensors import TensorRef, read_header
from moe_convert.errors import SourceError, UnsupportedError
from moe_convert.ffn import Weight

if TYPE_CHECKING:
    import torch

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
PLAIN_INITS = (None, True, False, "gaussian", "orthogonal", "eva")
"""Initialisations that leave the base's weights as they are; the others subtract from them."""

FAN_IN = "only layers that store their weight as [in, out] have it, and none here does"
REASONS = {
    "use_dora": "DoRA also rescales each row by a learned magnitude",
    "lora_bias": "it adds a bias, and expert FFNs have none",
    "fan_in_fan_out": FAN_IN,
    "modules_to_save": "it replaces whole modules instead of adding a low-rank change",
    "trainable_token_indices": "it replaces rows of the embedding",
    "target_parameters": "it changes parameters that are no linear layers",
    "layer_replication": "it repeats layers of the base",
    "use_qalora": "QA-LoRA changes quantised groups",
    "alora_invocation_tokens": "activated LoRA depends on the tokens of the prompt",
}
"""Why settings that mean more than W + scale · B A are refused."""

HARMLESS = frozenset({
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config",
    "ensure_weight_tying", "eva_config", "exclude_modules", "inference_mode", "init_lora_weights",
    "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout",
    "lora_ga_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r",
    "rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_rslora",
})  # fmt: skip
"""Settings that are either used here or only matter while an adapter is trained."""


@dataclass(frozen=True)
class Change:
    """What an adapter adds to one weight: scale · B A."""

    a: TensorRef
    b: TensorRef
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight that it fits, [out, in]."""
        return self.b.shape[0], self.a.shape[1]

    def merged(self, weight: Weight) -> Weight:
        """Return W + scale · B A, computed in fp32 when it is loaded."""

        def add(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.addmm(self.b.read().float(), self.a.read().float(), alpha=self.scale)

        return weight.map(add)


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: its changes by the name of the tensor that each belongs to."""

    name: str
    folder: Path
    base: str | None
    changes: Mapping[str, Change]

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """Every tensor of its file."""
        return tuple(ref for change in self.changes.values() for ref in (change.a, change.b))

    @property
    def num_params(self) -> int:
        """Number of elements of its matrices."""
        return sum(math.prod(ref.shape) for ref in self.refs)

    def merged(self, base: Mapping[str, Weight]) -> dict[str, Weight]:
        """Return the base's tensors with the changes added, nothing read."""
        changes = self.changes
        return {n: changes[n].merged(w) if n in changes else w for n, w in base.items()}


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model of its own."""
    return (folder / CONFIG_NAME).is_file() and not list(folder.glob("model*.safetensors"))


def open_adapter(folder: Path) -> Adapter:
    """Open an adapter folder by its headers.

    Raises:
        SourceError: a file is missing or broken.
        UnsupportedError: it does more than add scale · B A to weights; the sentence says what.
    """
    name = folder.resolve().name
    config = _read_config(folder / CONFIG_NAME, name)
    _check_plain(config, name)
    if not (folder / WEIGHTS_NAME).is_file():
        raise SourceError(
            f"The adapter {name} has no {WEIGHTS_NAME}.", "Save it with safe_serialization=True."
        )
    refs = read_header(folder / WEIGHTS_NAME)
    changes = dict(_changes(refs, config, name))
    return Adapter(name, folder, config.get("base_model_name_or_path"), changes)


def _read_config(path: Path, name: str) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, UnicodeDecodeError) as error:
        raise SourceError(f"{CONFIG_NAME} of the adapter {name} cannot be read.") from error
    if not isinstance(config, dict):
        raise SourceError(f"{CONFIG_NAME} of the adapter {name} is no JSON object.")
    return config


def _check_plain(config: Mapping[str, Any], name: str) -> None:
    """Refuse adapters that are more than a sum of low-rank products."""
    kind = str(config.get("peft_type"))
    if kind != "LORA":
        raise UnsupportedError(
            f"The adapter {name} is of type {kind}; only LORA can be merged into an FFN here.",
            "Merge it with peft's merge_and_unload first.",
        )
    init = config.get("init_lora_weights")
    if init not in PLAIN_INITS:
        raise UnsupportedError(
            f"The adapter {name} was initialised with {init!r}, which changes the base's weights, "
            "so it does not fit the base as it is.",
            "Convert it with peft's path_initial_model_for_weight_conversion.",
        )
    if config.get("bias", "none") != "none":
        raise UnsupportedError(
            f"The adapter {name} has bias={config['bias']!r}: it trains biases, and expert FFNs "
            "have no place for them."
        )
    wanting = [key for key, value in config.items() if value and key not in HARMLESS]
    if wanting:
        key = wanting[0]
        reason = REASONS.get(key, "what it changes is not known here")
        raise UnsupportedError(
            f"The adapter {name} sets {key}={config[key]!r}: {reason}.",
            "Merge it with peft's merge_and_unload first.",
        )


def _changes(
    refs: Mapping[str, TensorRef], config: Mapping[str, Any], name: str
) -> Mapping[str, Change]:
    found: dict[str, Change] = {}
    for key, a in refs.items():
        match = re.fullmatch(rf"(?:{re.escape(PREFIX)})?(.+)\.lora_(A|B)\.weight", key)
        if match is None:
            raise UnsupportedError(
                f"The adapter {name} holds {key}, which is no LoRA matrix of a linear layer.",
                "Merge it with peft's merge_and_unload first.",
            )
        if match[2] == "B":
            if key.replace("lora_B", "lora_A") not in refs:
                raise SourceError(f"The adapter {name} has {key} without its lora_A.")
            continue
        b = refs.get(key.replace("lora_A", "lora_B"))
        rank = int(_pattern(config, "rank_pattern", match[1], config.get("r")))
        if b is None or len(a.shape) != 2 or a.shape[0] != rank or b.shape[1:] != (rank,):
            shapes = f"{list(a.shape)} and {list(b.shape) if b else 'no lora_B'}"
            raise SourceError(
                f"The adapter {name} has {key} with {shapes}, and its config says rank {rank}."
            )
        alpha = float(_pattern(config, "alpha_pattern", match[1], config.get("lora_alpha")))
        root = math.sqrt(rank) if config.get("use_rslora") else rank
        found[f"{match[1]}.weight"] = Change(a, b, alpha / root)
    return found


def _pattern(config: Mapping[str, Any], field: str, module: str, default: Any) -> Any:
    """Return a module's own value: the first pattern that matches the end of its name, as peft."""
    for pattern, value in (config.get(field) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
