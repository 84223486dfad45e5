"""mergekit-moe YAML files as recipes: what they say, and what has no counterpart here.

Keys and meaning are those of mergekit-moe 0.1.5. That program ignores keys that it does not know;
here they are errors.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from moe_convert.errors import UsageError

SCHEMA = "moe-convert/recipe/1"
KEYS = (
    "base_model", "experts", "gate_mode", "dtype", "experts_per_token", "shared_experts",
    "architecture",
)  # fmt: skip
EXPERT_KEYS = (
    "source_model", "positive_prompts", "negative_prompts", "noise_scale", "residual_scale",
)  # fmt: skip
DTYPES = {None: "auto", "bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
RANDOM_MODES = ("random", "uniform_random")
PROMPT_MODES = ("hidden", "hidden_avg", "hidden_last", "cheap_embed")
ARCHITECTURES = {"mixtral": "mixtral", "qwen moe": "qwen2_moe", "qwen3 moe": "qwen3_moe"}
DEEPSEEK = "deepseek moe"

HALF = (
    "mergekit-moe gates its shared expert with a row like the routers' in Qwen models; here that "
    "gate is constant, so the shared expert counts residual_scale for every token."
)
SATURATED = (
    "gate_mode random draws router weights with std 1, so the logits have a std of about the root "
    "of the hidden size and the softmax saturates; remove router.weight_std for logits of std 0.5."
)
UNIFORM = (
    "gate_mode uniform_random (weights uniform in ±1/sqrt(hidden size)) becomes normal rows with "
    "the same logit std, 0.577 for an input of unit size."
)
HIDDEN = (
    "Prompt rows are taken at the router's real input, from every token, with the mean direction "
    "removed, and scaled to router.logit_std; mergekit-moe normalises sums of raw hidden states."
)
CHEAP = "gate_mode cheap_embed has no counterpart: hidden states are used for the prompts instead."


def is_mergekit(data: Mapping[str, Any]) -> bool:
    """Whether parsed YAML is a file for mergekit-moe."""
    return "schema" not in data and "base_model" in data


def imported(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe, as plain data, that builds what a mergekit-moe file describes.

    Its `notes` say in which respects the result differs.

    Raises:
        UsageError: a key is unknown, or it asks for something that cannot be expressed.
    """
    _known(data, KEYS, "")
    base, revision, lora = _reference(data["base_model"], "base_model")
    if lora:
        raise UsageError(
            f"base_model has a LoRA adapter, {lora}, which is not merged into a base here.",
            "Merge it with peft's merge_and_unload first.",
        )
    experts = [_expert(e, f"experts[{n}]") for n, e in enumerate(_list(data, "experts"))]
    if not experts:
        raise UsageError("The mergekit-moe file lists no experts.")
    notes: list[str] = []
    target: dict[str, Any] = {
        "architecture": _architecture(data, notes),
        "num_experts": len(experts),
        "top_k": data.get("experts_per_token", 2),
        "dtype": _dtype(data.get("dtype")),
    }
    method: dict[str, Any] = {"method": "compose"}
    prompted = data.get("gate_mode", "hidden") not in RANDOM_MODES
    method["sources"] = [_source(expert, base, revision, prompted) for expert in experts]
    shared = _shared_scale(data, base, revision, notes)
    if shared is not None:
        target["shared_experts"] = 1
        method["shared_scale"] = shared
    router = _router(data, experts, notes)
    plain = {"model": base, **({"revision": revision} if revision else {})}
    if shared is None and all(source == plain for source in method["sources"]):
        method = {"method": "clone"}
    method |= _noise(experts)
    return {
        "schema": SCHEMA,
        "notes": notes,
        "source": plain,
        "target": target,
        "experts": method,
        "router": router,
    }


def _known(node: object, keys: tuple[str, ...], place: str) -> None:
    if not isinstance(node, Mapping):
        raise UsageError(f"{place or 'The file'} must be a mapping, got {node!r}.")
    for key in node:
        if key not in keys:
            near = difflib.get_close_matches(str(key), keys, n=1)
            where = f"{place}." if place else ""
            raise UsageError(
                f"mergekit-moe has no key {where}{key}, and would ignore it.",
                f"Did you mean {near[0]}?" if near else f"It knows {', '.join(keys)}.",
            )


def _list(data: Mapping[str, Any], key: str) -> list[Any]:
    value = data.get(key) or []
    if not isinstance(value, list):
        raise UsageError(f"{key} must be a list, got {value!r}.")
    return value


def _expert(node: Any, place: str) -> Mapping[str, Any]:
    _known(node, EXPERT_KEYS, place)
    if "source_model" not in node:
        raise UsageError(f"{place} needs source_model.")
    return {**node, "place": place}


def _reference(value: Any, place: str) -> tuple[str, str | None, str | None]:
    """Return path, revision and LoRA of MODEL[@REV][+LORA] or of the same as a mapping."""
    if isinstance(value, Mapping):
        _known(value, ("model", "lora", "override_architecture"), place)
        if value.get("override_architecture"):
            raise UsageError(f"{place}.override_architecture cannot be expressed.")
        path, revision = _path(value.get("model"), place)
        return path, revision, _path(value["lora"], place)[0] if value.get("lora") else None
    model, _, lora = str(value).partition("+")
    return *_path(model, place), lora or None


def _path(value: Any, place: str) -> tuple[str, str | None]:
    if isinstance(value, Mapping):
        _known(value, ("path", "revision"), place)
        return str(value.get("path")), value.get("revision")
    if not isinstance(value, str) or not value:
        raise UsageError(f"{place} must name a model, got {value!r}.")
    path, _, revision = value.partition("@")
    return path, revision or None


def _source(
    expert: Mapping[str, Any], base: str, revision: str | None, prompted: bool
) -> dict[str, Any]:
    place = f"{expert['place']}.source_model"
    model, at, lora = _reference(expert["source_model"], place)
    if lora and (model, at) != (base, revision):
        raise UsageError(
            f"{place} puts the adapter {lora} on {model}, and adapters are merged into the base "
            f"{base} only.",
            "Merge it with peft's merge_and_unload first.",
        )
    source: dict[str, Any] = {"model": lora or model}
    if at and not lora:
        source["revision"] = at
    if prompted and expert.get("positive_prompts"):
        source["prompts"] = list(expert["positive_prompts"])
    if prompted and expert.get("negative_prompts"):
        source["negative_prompts"] = list(expert["negative_prompts"])
    scale = expert.get("residual_scale")
    if scale is not None and scale != 1.0:
        source["scale"] = scale
    return source


def _shared_scale(
    data: Mapping[str, Any], base: str, revision: str | None, notes: list[str]
) -> float | None:
    """Return what the shared expert is multiplied by; None without one."""
    listed = _list(data, "shared_experts")
    shared = [_expert(node, f"shared_experts[{n}]") for n, node in enumerate(listed)]
    if not shared:
        return None
    if len(shared) > 1:
        raise UsageError(
            f"shared_experts lists {len(shared)} experts, and mergekit-moe takes one at most."
        )
    if _reference(shared[0]["source_model"], "shared_experts[0]") != (base, revision, None):
        raise UsageError(
            f"The shared expert comes from {shared[0]['source_model']}; here it is the FFN of the "
            f"base {base}.",
            "Use base_model as the source_model of shared_experts.",
        )
    if shared[0].get("noise_scale"):
        raise UsageError("noise_scale of a shared expert cannot be expressed: it stays as it is.")
    notes.append(HALF)
    scale = shared[0].get("residual_scale")
    return 1.0 if scale is None else float(scale)


def _architecture(data: Mapping[str, Any], notes: list[str]) -> str:
    """Return the target for an architecture, of which mergekit-moe takes the beginning."""
    wanted = data.get("architecture")
    if wanted is None:
        if data.get("shared_experts"):
            notes.append(
                "Without `architecture`, mergekit-moe writes a DeepSeek MoE that needs remote code "
                "for a Llama with a shared expert; here a stock architecture is chosen."
            )
        return "auto"
    names = [n for n in (*ARCHITECTURES, DEEPSEEK) if n.startswith(str(wanted).lower())]
    fitting = [n for n in names if (n == "qwen moe") == bool(data.get("shared_experts"))] or names
    if not names:
        near = difflib.get_close_matches(str(wanted).lower(), [*ARCHITECTURES, DEEPSEEK], n=1)
        raise UsageError(
            f"mergekit-moe has no architecture {wanted!r}.",
            f"Did you mean {near[0]}?" if near else "",
        )
    if fitting[0] == DEEPSEEK:
        raise UsageError(
            "The architecture DeepSeek MoE needs remote code, and only stock architectures are "
            "written here.",
            "Remove `architecture`, or set target.architecture to one of `archs ls`.",
        )
    return ARCHITECTURES[fitting[0]]


def _dtype(wanted: Any) -> str:
    name = wanted.removeprefix("torch.") if isinstance(wanted, str) else wanted
    if name not in DTYPES:
        known = ", ".join(str(key) for key in DTYPES if key)
        raise UsageError(f"dtype {wanted!r} cannot be written.", f"Use one of {known}.")
    return DTYPES[name]


def _noise(experts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the edit for a noise scale, which must be the same for every expert."""
    experts = list(experts)
    scales = {float(expert.get("noise_scale") or 0.0) for expert in experts}
    if len(scales) > 1:
        raise UsageError(
            f"noise_scale differs between the experts ({', '.join(map(str, sorted(scales)))}), and "
            "edits work on all of them alike.",
            "Give every expert the same noise_scale.",
        )
    noise = scales.pop()
    if not noise:
        return {}
    if any(expert.get("residual_scale") not in {None, 1.0} for expert in experts):
        raise UsageError(
            "noise_scale together with residual_scale cannot be expressed: mergekit-moe scales the "
            "noise too, and here it is added at the end.",
            "Use one of them.",
        )
    return {"edits": [{"edit": "noise", "std": noise, "relative": False}]}


def _router(
    data: Mapping[str, Any], experts: list[Mapping[str, Any]], notes: list[str]
) -> dict[str, Any]:
    mode = data.get("gate_mode", "hidden")
    if mode == "random":
        notes.append(SATURATED)
        return {"init": "normal", "weight_std": 1.0}
    if mode == "uniform_random":
        notes.append(UNIFORM)
        return {"init": "normal", "logit_std": 0.577, "measure": False}
    if mode not in PROMPT_MODES:
        near = difflib.get_close_matches(str(mode), [*RANDOM_MODES, *PROMPT_MODES], n=1)
        raise UsageError(
            f"mergekit-moe has no gate_mode {mode!r}.", f"Did you mean {near[0]}?" if near else ""
        )
    for expert in experts:
        if not expert.get("positive_prompts"):
            raise UsageError(f"gate_mode {mode} needs positive_prompts for {expert['place']}.")
    notes.append(CHEAP if mode == "cheap_embed" else HIDDEN)
    return {"init": "prompts"}
