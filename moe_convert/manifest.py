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
from moe_convert.errors import SourceError, VerificationError

MANIFEST_NAME = "moe_convert.json"
SCHEMA: Final = "moe-convert/manifest/1"
PACKAGES = ("torch", "transformers", "safetensors", "huggingface-hub", "accelerate")


class Model(BaseModel):
    """A part of the manifest."""

    model_config = ConfigDict(extra="forbid")


class SourceInfo(Model):
    """The dense checkpoint.

    Of a local one, which no commit names, `files` are the SHA-256 of every file that was read and
    `content_sha256` is one of them all.
    """

    id: str
    revision: str | None
    sha: str | None
    architecture: str
    params: int
    dtype: str
    license: str | None
    license_name: str | None = None
    license_link: str | None = None
    languages: list[str] = Field(default_factory=list)
    files: dict[str, str] = Field(default_factory=dict)
    content_sha256: str | None = None


class FileInfo(Model):
    """One file of the result."""

    path: str
    size: int
    sha256: str


class TargetInfo(Model):
    """The result; `float32` are tensors kept in that wider dtype, as the source stores them.

    The last `null_experts` of `num_experts` are zeros, which `top_k` chooses in the place of
    others: a token uses `mean_k` of these on average where the number depends on the token.
    """

    architecture: str
    path: str | None = None
    num_experts: int
    top_k: int
    shared_experts: int
    moe_layers: list[int]
    expert_size: int
    null_experts: int = 0
    mean_k: int | None = None
    params_total: int
    params_active: int
    float32: list[str] = Field(default_factory=list)
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
    calibrated: bool = False


class LearningReport(Model):
    """How a split was learned: the loss of the first step, and that of the last ones smoothed."""

    steps: int
    tokens: int
    loss_first: float
    loss_last: float


class SplitReport(Model):
    """How near a split that was fitted to data comes to the dense model, on that data.

    By layer: the share of the dense stream's energy that the converted stream differs by after it,
    and the share of what its experts should add that they miss (null where an earlier run made it).
    """

    layers: list[int]
    stream_error: list[float]
    layer_error: list[float | None]
    learning: LearningReport | None = None


class Sensitivity(Model):
    """What splitting one layer alone does to the model, by which some layers stay dense.

    By layer: KL(dense ‖ with that layer split) of a token in nats, on `tokens` tokens. Layers above
    `bar` stay dense as far as the target has a place for them.
    """

    tokens: int
    kl: list[float]
    bar: float
    dense_layers: list[int]


class Routing(Model):
    """What the first routers would do with the data; the lists have an entry per MoE layer.

    `load` is each expert's share of all choices. `condition` is the condition number of the
    distinct rows less their mean, null where they depend on each other, and `closest` the largest
    cosine between two of them. Entropies are those of the load over the largest possible one, and
    an expert is dead that gets less than a tenth of its fair share. `unbalanced` is what
    `max_over_mean` would be without the selection bias that balances the load, null without one.
    `mean_k` is how many experts a token uses, null where that is the same for all; experts of zeros
    are left out of everything.
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
    unbalanced: float | None = None
    mean_k: list[float] | None = None


class Measured(Model):
    """A model beside the dense one on `tokens` tokens.

    `kl` is KL(dense ‖ model) of a token in nats, `max_violation` the busiest expert's load over the
    mean less 1, of the worst layer, and `routing_value` what perplexity rises by when every token
    is routed as another one is. `load` has each expert's share of all choices, layer by layer.
    """

    tokens: int
    dense_perplexity: float
    perplexity: float
    kl: float
    top1_agreement: float
    max_violation: float
    dead_experts: int
    num_experts: int
    routing_value: float
    load: list[list[float]]


class CalibrationReport(Model):
    """What the last calibration did; losses are those of a step, the weighted terms added up.

    `settings` are the recipe's sections `calibration` and `data` as the run resolved them.
    """

    steps: int
    tokens: int
    loss_first: float
    loss_last: float
    stopped_early: bool = False
    resumed_from: int | None = None
    trained: list[str]
    trained_params: int
    objective: dict[str, float]
    data: str
    num_processes: int
    before: Measured
    after: Measured
    failures: list[str] = Field(default_factory=list)
    settings: dict[str, Any] = Field(default_factory=dict)


class Warning_(Model):
    """A warning with a stable code."""

    code: str
    message: str
    hint: str = ""


class Manifest(Model):
    """The whole file; `recipe` made the folder, which `earlier` calibrations trained and the last.

    `exact` says that the function is the dense one, up to rounding.
    """

    schema_id: Literal["moe-convert/manifest/1"] = Field(SCHEMA, alias="schema")
    state: Literal["converted", "verified", "calibrated", "failed"] = "converted"
    exact: bool
    created_at: str
    recipe: dict[str, Any]
    source: SourceInfo
    expert_sources: list[SourceInfo] = Field(default_factory=list)
    target: TargetInfo
    verify: VerifyReport | None = None
    routing: Routing | None = None
    split: SplitReport | None = None
    sensitivity: Sensitivity | None = None
    calibration: CalibrationReport | None = None
    earlier: list[CalibrationReport] = Field(default_factory=list)
    warnings: list[Warning_] = Field(default_factory=list)
    versions: dict[str, str]
    hardware: dict[str, str]
    engines: dict[str, list[str]] = Field(default_factory=dict)
    card_sha256: str | None = None

    @property
    def trainings(self) -> list[CalibrationReport]:
        """Every calibration, in their order."""
        return [*self.earlier, self.calibration] if self.calibration else []

    def as_json(self) -> str:
        """Return the text of the file."""
        return self.model_dump_json(by_alias=True, indent=2) + "\n"

    def checked_json(self) -> str:
        """Return the text of the file, which has been read again.

        Raises:
            VerificationError: a figure is not finite, which JSON has no word for.
        """
        text = self.as_json()
        try:
            Manifest.model_validate_json(text)
        except ValidationError as error:
            where = ".".join(map(str, error.errors()[0]["loc"]))
            raise VerificationError(f"{where} is not finite, so nothing was written.") from error
        return text

    def save(self, folder: Path) -> None:
        """Write the manifest into a folder, all or nothing."""
        path = folder / MANIFEST_NAME
        partial = path.with_suffix(".json.partial")
        partial.write_text(self.as_json(), encoding="utf-8")
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
    import torch

    found = {
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": str(os.cpu_count() or 1),
    }
    if torch.cuda.is_available():
        found["gpu"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return found
