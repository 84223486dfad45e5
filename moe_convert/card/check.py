"""Check a card without a network: its metadata against the manifest, its links, its age."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from moe_convert.card.metadata import metadata
from moe_convert.card.write import CARD_NAME, PICTURE_NAME, name_in, render
from moe_convert.checkpoint import sha256_of
from moe_convert.manifest import Manifest, load_manifest
from moe_convert.provenance import license_conflict

PLACEHOLDER = "more information needed"
LINK = re.compile(r"\]\(([^)#\s]+)\)")
TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
REQUIRED = ("library_name", "pipeline_tag", "tags")


@dataclass
class CardCheck:
    """What is wrong with a card, and what a reader may miss in it."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check_card(folder: Path) -> CardCheck:
    """Hold a folder's README.md against its manifest.

    Raises:
        SourceError: the folder has no readable manifest.
    """
    manifest = load_manifest(folder)
    path, found = folder / CARD_NAME, CardCheck()
    if not path.is_file():
        found.problems.append(f"there is no {CARD_NAME}: run `moe-convert card`")
        return found
    text = path.read_text(encoding="utf-8")
    _check_text(text, folder, found)
    _check_metadata(text, manifest, found)
    _check_age(path, text, manifest, found)
    if conflict := license_conflict(manifest):
        found.notes.append(conflict)
    return found


def _check_text(text: str, folder: Path, found: CardCheck) -> None:
    if PLACEHOLDER in text.lower():
        found.problems.append("it says 'More Information Needed'")
    if TOKEN.search(text):
        found.problems.append("it holds what looks like a Hub token")
    for link in LINK.findall(text):
        if "://" not in link and not link.startswith("mailto:") and not (folder / link).exists():
            found.problems.append(f"it links to {link}, which is not there")


def _check_metadata(text: str, manifest: Manifest, found: CardCheck) -> None:
    try:
        data = ModelCard(text).data
    except (ValueError, yaml.YAMLError) as error:
        found.problems.append(f"its metadata cannot be read: {' '.join(str(error).split())}")
        return
    assert isinstance(data, ModelCardData)
    wanted = metadata(manifest, "card")
    found.problems += [f"its metadata has no {key}" for key in REQUIRED if not data.get(key)]
    if data.base_model != wanted.base_model:
        found.problems.append(
            f"base_model is {data.base_model!r}, and the manifest has {wanted.base_model!r}"
        )
    measured = {_key(one): one.metric_value for one in wanted.eval_results or ()}
    for one in data.eval_results or ():
        value = measured.get(_key(one), one.metric_value)
        if value != one.metric_value:
            found.problems.append(f"{one.metric_name} is {one.metric_value}, and {value} measured")


def _key(result: EvalResult) -> tuple[str, str]:
    return result.dataset_name, result.metric_type


def _check_age(path: Path, text: str, manifest: Manifest, found: CardCheck) -> None:
    """A card of ours must be what the manifest would give now."""
    if sha256_of(path) != manifest.card_sha256:
        found.notes.append("it was edited by hand")
        return
    picture = f"({PICTURE_NAME})" in text
    if render(manifest, name_in(path), picture=picture) != text:
        found.problems.append("it is older than the manifest: run `moe-convert card`")
