"""What a card says, in words: each function reads the manifest and computes nothing new."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from moe_convert.edits import EditNode
from moe_convert.experts import Compose
from moe_convert.families.custom import CUSTOM
from moe_convert.manifest import Manifest, Parity, SourceInfo, TargetInfo
from moe_convert.provenance import calibrations, unnamed
from moe_convert.recipe import Recipe
from moe_convert.routers import Router
from moe_convert.targets import TARGETS
from moe_convert.targets.base import UNREGISTERED

ARXIV = re.compile(r"arXiv (\d{4}\.\d{5})")
NOT_LIMITS = frozenset({"does_not_fit", "verify_skipped", "parity_skipped"})
"""Warnings about the machine that converted, or that the card puts in words of its own."""

NO_OPTIONS = {"method", "strategy", "edits", "sources"}
COMMANDS = {
    "vLLM": "vllm serve {name}",
    "SGLang": "python -m sglang.launch_server --model-path {name}",
    "llama.cpp": "python convert_hf_to_gguf.py {folder} --outfile {folder}.gguf",
}
"""How each engine starts from the files."""


class EngineUse(NamedTuple):
    """How one engine loads the result; an empty command where it does not."""

    name: str
    command: str
    caveats: tuple[str, ...]


def from_hub(info: SourceInfo) -> bool:
    """Whether a source is a Hub repository, which alone has a revision."""
    return info.revision is not None


def link(info: SourceInfo) -> str:
    """Return a source's name, as a link where the Hub has it."""
    return f"[{info.id}](https://huggingface.co/{info.id})" if from_hub(info) else f"`{info.id}`"


def linked(text: str) -> str:
    """Return the text with its arXiv numbers as links."""
    return ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def other_sources(manifest: Manifest) -> list[SourceInfo]:
    """Return the checkpoints that experts come from, less the base, each once."""
    base = manifest.source
    found = {(one.id, one.sha, one.content_sha256): one for one in manifest.expert_sources}
    found.pop((base.id, base.sha, base.content_sha256), None)
    return list(found.values())


def is_custom(manifest: Manifest) -> bool:
    """Whether the result needs the modelling file beside the weights."""
    return bool(manifest.recipe["target"]["architecture"] == CUSTOM)


def is_multimodal(manifest: Manifest) -> bool:
    """Whether the result takes images too."""
    return manifest.target.architecture not in TARGETS and not is_custom(manifest)


def about(manifest: Manifest, name: str) -> str:
    """Return what the model is, in two sentences."""
    target = manifest.target
    shared = f" and {target.shared_experts} shared" if target.shared_experts else ""
    origin = " and ".join(link(one) for one in (manifest.source, *other_sources(manifest)))
    kind = "with its own modelling file" if is_custom(manifest) else "of a stock architecture"
    return (
        f"{name} is a Mixture-of-Experts model {kind} (`{target.architecture}`) with "
        f"{target.num_experts - target.null_experts} routed{shared} experts in each of "
        f"{len(target.moe_layers)} layers, of which {_used(target)}{shared}, made from {origin}. "
        + _how_near(manifest)
    )


def _used(target: TargetInfo) -> str:
    """Return how many routed experts a token uses."""
    if not target.null_experts:
        return f"every token uses {target.top_k}"
    return (
        f"a token uses {target.mean_k} on average and {target.top_k} at most (top-{target.top_k} "
        f"chooses {target.null_experts} experts of zeros in the place of the others)"
    )


def _how_near(manifest: Manifest) -> str:
    trained, parity = manifest.calibration, _fp32(manifest)
    if trained is not None:
        several = f", {len(manifest.trainings)} times" if manifest.earlier else ""
        last = "the last time " if manifest.earlier else ""
        return (
            f"It was trained on {sum(one.tokens for one in manifest.trainings)} tokens after the "
            f"conversion{several}, which {last}took the perplexity on held-out text "
            f"({trained.data}) from {trained.before.perplexity:.4g} to "
            f"{trained.after.perplexity:.4g}; that of the dense model is "
            f"{trained.after.dense_perplexity:.4g}."
        )
    if manifest.exact and manifest.verify is not None and not manifest.verify.passed:
        return "It should compute the function of the dense model, and its check failed."
    if manifest.exact and parity is not None:
        return (
            "Before any training it computes the function of the dense model: the logits of the "
            f"written files differ from it by at most {parity.max_abs_diff:.1e} in fp32."
        )
    if manifest.exact:
        return "It is made to compute the function of the dense model, which was not checked here."
    if parity is not None:
        return (
            "It does not compute the function of the dense model: on the tokens of the check their "
            f"predictions are {parity.kl:.3g} nats apart (KL)."
        )
    return "It does not compute the function of the dense model."


def _fp32(manifest: Manifest) -> Parity | None:
    found = manifest.verify.parity if manifest.verify else []
    return next((parity for parity in found if parity.dtype == "float32"), None)


def methods(manifest: Manifest) -> Iterator[str]:
    """Yield how experts and routers were made, with papers."""
    recipe = Recipe.model_validate(manifest.recipe)
    experts, router = recipe.experts, recipe.router
    chosen = experts.model_dump(exclude_defaults=True, exclude=NO_OPTIONS)
    strategy = getattr(experts, "strategy", "")
    options = f" by {strategy}" if strategy else ""
    options += "".join(f", {key} {value}" for key, value in chosen.items())
    yield linked(f"Experts: `{experts.method}`, {experts.summary}{options} ({experts.paper}).")
    for edit in experts.edits:
        yield linked(f"Edit: `{_options(edit)}`, {edit.summary} ({edit.paper}).")
    spread = "" if router.kind == "zeros" else f", logits of standard deviation {router.logit_std}"
    yield f"Routers: `{router.kind}`, {Router.summaries[router.kind]}{spread}."
    yield from _left_dense(manifest)
    if isinstance(experts, Compose) and experts.attention == "average":
        yield "Everything else is the mean over the sources."
    else:
        yield f"Everything else is {link(manifest.source)}'s."


def _left_dense(manifest: Manifest) -> Iterator[str]:
    """Say which layers a measurement left dense, if one was made."""
    found = manifest.sensitivity
    if found is None:
        return
    numbers = ", ".join(map(str, found.dense_layers))
    kept = f"layers {numbers} keep their dense FFN" if numbers else "no layer keeps its dense FFN"
    yield (
        f"Each layer was first split alone, on {found.tokens} tokens, which moves the model's "
        f"predictions by {min(found.kl):.2g} to {max(found.kl):.2g} nats (KL); {kept}."
    )


def _options(edit: EditNode) -> str:
    values = edit.model_dump(exclude_defaults=True, exclude={"edit"})
    return " ".join([edit.edit, *(f"{key}={value}" for key, value in values.items())])


def engines(manifest: Manifest, name: str) -> list[EngineUse]:
    """Return how serving engines load the result, with what they do differently."""
    found = []
    for engine, notes in manifest.engines.items():
        if engine not in COMMANDS:
            continue
        command = COMMANDS[engine].format(name=name, folder=name.rpartition("/")[2])
        known = notes != [UNREGISTERED]
        found.append(EngineUse(engine, command if known else "", tuple(notes)))
    return found


def limits(manifest: Manifest) -> Iterator[str]:
    """Yield what a user must know before relying on the model."""
    report = manifest.verify
    if report is None:
        yield "The written files were not loaded and compared with the source."
    elif not report.passed:
        yield f"**The check of the written files failed: {'; '.join(report.failures[:3])}.**"
    elif not report.parity:
        yield "The written files were loaded, but not compared with the source."
    failures = manifest.calibration.failures if manifest.calibration else []
    yield from (f"**A quality gate was missed: {failure}.**" for failure in failures)
    passed = report is None or report.passed
    if manifest.exact and passed:
        yield "It is as good as the source and no better until it is trained further."
    if not manifest.exact and manifest.calibration is None:
        yield "Nothing repairs what the conversion changed until it is trained further."
    for note in manifest.warnings:
        if note.code not in NOT_LIMITS:
            yield note.message
    yield f"Whatever {link(manifest.source)} gets wrong or must not be used for holds here too."


def folder_of(name: str) -> str:
    """Return the folder that a model of this name is downloaded into."""
    return name.rpartition("/")[2]


def needed_options(manifest: Manifest) -> str:
    """Return the options with which `reproduce` finds what was recorded by name only."""
    options = [option for option, _ in unnamed(manifest, Recipe.model_validate(manifest.recipe))]
    for recipe in calibrations(manifest):
        options += [option for option, _ in unnamed(manifest, recipe) if option not in options]
    return "".join(f" {option} PATH" for option in options)


def identity(info: SourceInfo) -> str:
    """Return a source with what tells it from any other."""
    if from_hub(info):
        return f"{link(info)} at commit `{info.sha}`"
    return f"{link(info)} (SHA-256 `{info.sha or info.content_sha256}`)"


def versions_line(manifest: Manifest) -> str:
    """Return the versions that made it."""
    return ", ".join(f"{name} {number}" for name, number in manifest.versions.items())
