"""`moe_convert.json`: what a folder is, how it was made and what was measured on it.

It lies beside the weights and is the only state between commands; each command adds its section.
"""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moe_convert import __version__
from moe_convert.errors import SourceError

MANIFEST_NAME = "moe_convert.json"
SCHEMA: Final = "moe-convert/manifest/1"
PACKAGES = ("torch", "transformers", "safetensors", "huggingface-hub", "accelerate")


class Model(BaseModel):
    """A part of the manifest."""

    model_config = ConfigDict(extra="forbid")


class SourceInfo(Model):
    """The dense checkpoint."""

    id: str
    revision: str | None
    sha: str | None
    architecture: str
    params: int
    dtype: str
    license: str | None


class FileInfo(Model):
    """One file of the result."""

    path: str
    size: int
    sha256: str


class TargetInfo(Model):
    """The result."""

    architecture: str
    path: str | None = None
    num_experts: int
    top_k: int
    shared_experts: int
    moe_layers: list[int]
    expert_size: int
    params_total: int
    params_active: int
    files: list[FileInfo] = Field(default_factory=list)


class Parity(Model):
    """Dense and converted logits on the same tokens."""

    dtype: str
    max_abs_diff: float
    kl: float
    top1_agreement: float
    ppl_ratio: float | None = None


class VerifyReport(Model):
    """What loading the written files showed."""

    passed: bool
    failures: list[str] = Field(default_factory=list)
    missing_keys: list[str] = Field(default_factory=list)
    unexpected_keys: list[str] = Field(default_factory=list)
    max_abs_diff: float | None = None
    kl: float | None = None
    top1_agreement: float | None = None
    parity: list[Parity] = Field(default_factory=list)
    parity_expected: bool = True
    tolerance: float = 1e-4
    router_logit_std: list[float] = Field(default_factory=list)
    experts_exercised: float | None = None
    tokenizer_identical: bool | None = None
    generation: list[str] = Field(default_factory=list)


class Routing(Model):
    """What the first routers would do with the data; the lists have an entry per MoE layer.

    `load` is each expert's share of all choices. `condition` is the condition number of the
    distinct rows less their mean, null where they depend on each other, and `closest` the largest
    cosine between two of them. Entropies are those of the load over the largest possible one, and
    an expert is dead that gets less than a tenth of its fair share.
    """

    data: str
    tokens: int
    tokens_sha256: str
    layers: list[int]
    logit_std: list[float]
    condition: list[float | None]
    closest: list[float]
    load: list[list[float]]
    entropy_mean: float
    entropy_min: float
    max_over_mean: float
    dead_experts: int


class Warning_(Model):
    """A warning with a stable code."""

    code: str
    message: str
    hint: str = ""


class Manifest(Model):
    """The whole file."""

    schema_id: Literal["moe-convert/manifest/1"] = Field(SCHEMA, alias="schema")
    state: Literal["converted", "verified", "failed"] = "converted"
    exact: bool
    created_at: str
    recipe: dict[str, Any]
    source: SourceInfo
    expert_sources: list[SourceInfo] = Field(default_factory=list)
    target: TargetInfo
    verify: VerifyReport | None = None
    routing: Routing | None = None
    warnings: list[Warning_] = Field(default_factory=list)
    versions: dict[str, str]
    hardware: dict[str, str]

    def save(self, folder: Path) -> None:
        """Write the manifest into a folder, all or nothing."""
        path = folder / MANIFEST_NAME
        partial = path.with_suffix(".json.partial")
        partial.write_text(self.model_dump_json(by_alias=True, indent=2) + "\n", encoding="utf-8")
        partial.replace(path)


def load_manifest(folder: Path) -> Manifest:
    """Read a folder's manifest.

    Raises:
        SourceError: there is none, or it is not valid.
    """
    path = folder / MANIFEST_NAME
    try:
        return Manifest.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SourceError(
            f"{folder} has no {MANIFEST_NAME}: it was not written by moe-convert.",
            "Give the output folder of `moe-convert upcycle`.",
        ) from error
    except (ValidationError, OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{MANIFEST_NAME} in {folder} is not valid.") from error


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    found = {"moe-convert": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, str]:
    """Return what ran the conversion, without anything that names the machine."""
    return {
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": str(os.cpu_count() or 1),
    }
