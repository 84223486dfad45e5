"""The metadata of a card: what the Hub reads, from the manifest and nothing else."""

from __future__ import annotations

from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from moe_convert.card.facts import from_hub, is_multimodal, other_sources
from moe_convert.card.measured import when
from moe_convert.experts import Compose, Method
from moe_convert.manifest import Manifest
from moe_convert.provenance import calibrations, license_of
from moe_convert.recipe import Recipe

TAGS = ("moe", "mixture-of-experts", "moe-convert")
METHOD_TAGS = {
    "clone": "sparse-upcycling",
    "split": "ffn-split",
    "compose": "merge",
    "shared-residual": "shared-residual",
}
EDIT_TAGS = {"drop": "drop-upcycling"}
METRICS = {
    "kl_divergence": "KL divergence from the source, nats",
    "top1_agreement": "same first choice as the source",
    "perplexity_ratio": "perplexity over the source's",
    "perplexity": "perplexity",
}


def metadata(manifest: Manifest, name: str) -> ModelCardData:
    """Return the card's metadata; fields without a value are left out."""
    recipe = Recipe.model_validate(manifest.recipe)
    known = license_of(manifest)
    hubs = [one.data.given.hub for one in (recipe, *calibrations(manifest))]
    fields: dict[str, Any] = {
        "license": known and known.id,
        "license_name": known and known.name,
        "license_link": known and known.link,
        **_base_model(manifest),
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text" if is_multimodal(manifest) else "text-generation",
        "tags": tags(recipe.experts),
        "language": manifest.source.languages,
        "datasets": list(dict.fromkeys(hub.hub for hub in hubs if hub)),
    }
    results = eval_results(manifest)
    if results:
        fields |= {"model_name": name, "eval_results": results}
    return ModelCardData(**{key: value for key, value in fields.items() if value})


def _base_model(manifest: Manifest) -> dict[str, Any]:
    """Return the Hub's sources and the relation to them; nothing where none is from the Hub."""
    others = other_sources(manifest)
    found = [one.id for one in (manifest.source, *others) if from_hub(one)]
    names = list(dict.fromkeys(found))
    if not names:
        return {}
    relation = "merge" if others else "finetune"
    return {
        "base_model": names if len(names) > 1 else names[0],
        "base_model_relation": relation,
    }


def tags(experts: Method) -> list[str]:
    """Return the tags of a construction method and its edits."""
    method = experts.model_dump()["method"]
    found = [*TAGS, METHOD_TAGS.get(method, method)]
    found += [EDIT_TAGS[edit.edit] for edit in experts.edits if edit.edit in EDIT_TAGS]
    if isinstance(experts, Compose):
        found.append("branch-train-mix")
    return list(dict.fromkeys(found))


def eval_results(manifest: Manifest) -> list[EvalResult]:
    """Return what was measured as the Hub's evaluation results."""
    found = []
    for parity in manifest.verify.parity if manifest.verify else ():
        where = f"built-in text and random tokens ({parity.dtype}{when(manifest)})"
        found += [
            _result("moe-convert-check", where, "kl_divergence", parity.kl),
            _result("moe-convert-check", where, "top1_agreement", parity.top1_agreement),
        ]
        if parity.ppl_ratio is not None:
            found.append(_result("moe-convert-check", where, "perplexity_ratio", parity.ppl_ratio))
    if manifest.calibration is not None:
        after, data = manifest.calibration.after, manifest.calibration.data
        values = {
            "perplexity": after.perplexity,
            "kl_divergence": after.kl,
            "top1_agreement": after.top1_agreement,
        }
        where = f"held-out text ({data})"
        found += [_result("held-out", where, kind, value) for kind, value in values.items()]
    return found


def _result(kind: str, where: str, metric: str, value: float) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type=kind,
        dataset_name=where,
        metric_type=metric,
        metric_name=METRICS[metric],
        metric_value=value,
    )
