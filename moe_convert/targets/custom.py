"""The target of last resort: the dense class, subclassed by a modelling file beside the weights.

It keeps the dense config as it is, has a model type of its own (the dense one would load without
our code, with FFNs that no file holds) and needs `trust_remote_code=True`.

D hidden size · E routed experts
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, cast

from moe_convert.families import Body, Config, layer_name
from moe_convert.families.custom import CUSTOM, CUSTOM_FAMILIES, CustomFamily, ModuleFfn
from moe_convert.ffn import Experts, Ffn, Weight
from moe_convert.targets.base import Engine, MoeShape, MoeTarget, Trap

CODE = "modeling_moe.py"
PREFIX = "moe_convert_"
ENGINES = (
    Engine("transformers", True, (Trap("loads it with trust_remote_code=True only"),)),
    Engine("vLLM", False),
    Engine("SGLang", False),
    Engine("llama.cpp", False),
)


def code_file() -> Path:
    """Return the modelling file that is written beside the weights."""
    return Path(str(resources.files("moe_convert.templates"))) / CODE


@dataclass(frozen=True)
class CustomTarget(MoeTarget):
    """The experts of one custom family; `dense_config` is config.json as the dense model has it."""

    family: CustomFamily = field(kw_only=True)
    dense_config: Config = field(kw_only=True)

    @property
    def recipe_name(self) -> str:
        """One name for all of them."""
        return CUSTOM

    def misfits(self, body: Body) -> list[str]:
        """The dense class holds its own body."""
        return []

    def config(self, body: Body, shape: MoeShape, untie: bool) -> dict[str, Any]:
        """Return the dense config with the keys of `modeling_moe.py`."""
        family = self.family
        return {
            **{k: v for k, v in self.dense_config.items() if k not in REPLACED and k[0] != "_"},
            "base_model_type": family.model_type,
            "decoder_layers": family.layers,
            "ffn_modules": list(family.modules),
            "ffn_size_key": family.size_key,
            "moe_layers": list(shape.moe_layers),
            "num_experts": shape.num_experts,
            "num_experts_per_tok": shape.top_k,
            "moe_intermediate_size": shape.expert_size,
            "tie_word_embeddings": body.tied,
            "auto_map": auto_map(family.model_type),
        }

    def tensors(
        self, layer: int, experts: Experts, router_ED: Weight, body: Body, shape: MoeShape
    ) -> Iterator[tuple[str, Weight]]:
        """Yield router and experts below the first module of the FFN."""
        first, *others = self.family.modules
        yield layer_name(layer, f"{first}.router.weight"), router_ED
        for number, expert in enumerate(experts.routed):
            for name, weight in cast("ModuleFfn", expert).weights.items():
                inner = name if others else name.removeprefix(f"{first}.")
                yield layer_name(layer, f"{first}.experts.{number}.{inner}"), weight

    def dense_tensors(self, layer: int, ffn: Ffn) -> Iterator[tuple[str, Weight]]:
        """Yield an FFN that stays dense."""
        for name, weight in cast("ModuleFfn", ffn).weights.items():
            yield layer_name(layer, name), weight


REPLACED = frozenset({"model_type", "architectures", "auto_map", "torch_dtype", "dtype"})


def auto_map(base: str) -> dict[str, str]:
    """Return which classes of the modelling file transformers loads."""
    module = CODE.removesuffix(".py")
    return {
        "AutoConfig": f"{module}.MoeConfig_{base}",
        "AutoModelForCausalLM": f"{module}.MoeForCausalLM_{base}",
    }


def custom_target(family: CustomFamily, config: Config) -> CustomTarget:
    """Return the target that subclasses the class of a dense config."""
    return CustomTarget(
        model_type=PREFIX + family.model_type,
        architecture=f"MoeForCausalLM_{family.model_type}",
        shape_keys={},
        engines=ENGINES,
        dense_layers="any",
        router_module=f"{family.modules[0]}.router",
        on_disk={old: new for old, new in family.own_names(config).items() if old != new},
        files={CODE: code_file()},
        stock=False,
        family=family,
        dense_config=config,
    )


def written_by_us(folder: Path, config: Config) -> CustomFamily | None:
    """Return the custom family of a folder whose code is byte for byte ours; else None."""
    family = CUSTOM_FAMILIES.get(str(config.get("base_model_type")))
    if family is None or config.get("model_type") != PREFIX + family.model_type:
        return None
    code = folder / CODE
    ours = code.is_file() and code.read_bytes() == code_file().read_bytes()
    return family if ours and config.get("auto_map") == auto_map(family.model_type) else None
