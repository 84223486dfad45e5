"""A job: everything that a process needs to calibrate, resolved, as one JSON file.

B rows · T tokens
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict

from moe_convert.calibrate.models import target_of
from moe_convert.calibration import STEP_TOKENS, Calibration, Made, check, resolved
from moe_convert.checkpoint import Source, read_folder, sha256_of
from moe_convert.checkpoint.replace import WORK, recover
from moe_convert.checkpoint.source import read_config
from moe_convert.data import Data, SelfWriter, token_ids
from moe_convert.data.settings import SELF
from moe_convert.errors import UsageError
from moe_convert.manifest import Manifest, load_manifest
from moe_convert.provenance import content_sha256, files_of
from moe_convert.recipe import Recipe
from moe_convert.runtime import chosen_device

if TYPE_CHECKING:
    import torch

IDS, JOB = "ids.safetensors", "job.json"
Progress = Callable[[str, int, int], None]
SELF_TOKENS = {"cpu": 131_072, "cuda": 1_048_576}
"""What the source writes to be trained on, by device: minutes on a CPU, half a minute on a GPU."""
HELD_ROWS = 8
HELD_SHARE = 10
"""At most so many rows, and one in so many, are kept out of training to measure on."""
NO_EFFECT = (
    "enabled",
    "save_every",
    "keep",
    "trackers",
    "guards",
    "parallel",
    "teacher",
    "gradient_checkpointing",
    "compile",
)
"""Settings that do not decide what the weights become."""


class Job(BaseModel):
    """What to train, on which rows, beside which dense model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    folder: Path
    dense: Path
    section: Calibration
    data: Data
    fingerprint: str
    steps: int
    batch_size: int
    num_held: int
    width: int
    top_k: int
    null_experts: int = 0
    world_size: int = 1
    resume: bool = True
    device: str = "cpu"

    def save(self, ids_BT: torch.Tensor) -> Path:
        """Write the job and its rows below the folder, for other processes to read."""
        from safetensors.torch import save_file

        root = self.folder / WORK
        root.mkdir(exist_ok=True)
        save_file({"ids": ids_BT.contiguous()}, root / IDS)
        (root / JOB).write_text(self.model_dump_json(), encoding="utf-8")
        return root / JOB


def load_job(path: Path) -> tuple[Job, torch.Tensor]:
    """Read what `Job.save` wrote."""
    from safetensors.torch import load_file

    ids_BT: torch.Tensor = load_file(path.parent / IDS)["ids"]
    return Job.model_validate_json(path.read_text(encoding="utf-8")), ids_BT


@dataclass(frozen=True)
class Request:
    """What a user asks for; the dense source has its files at hand."""

    folder: Path
    source: Source
    section: Calibration
    data: Data
    world_size: int = 1
    resume: bool = True
    device: str = "auto"
    progress: Progress = lambda what, done, total: None


def prepare(request: Request) -> tuple[Job, torch.Tensor]:
    """Resolve and check a request; return the job and its rows [B, T].

    Raises:
        UsageError: a setting cannot work, or the data cannot be read.
        SourceError: the folder was not written by moe-convert.
    """
    folder, device = request.folder, chosen_device(request.device)
    if recover(folder):
        raise UsageError(
            f"An earlier calibration of {folder} was killed while it put the trained weights in "
            "place, which is done now.",
            "Calibrate again only to train it further.",
        )
    manifest = load_manifest(folder)
    made = _made(folder, manifest)
    section = resolved(request.section, made, gpu=device == "cuda")
    check(section, made)
    if section.parallel != "replicate":
        _check_parallel(section.parallel, request)
    assert section.max_tokens is not None
    data = _data(request.data, section.max_tokens, device)
    vocab_size = int(_text_config(folder)["vocab_size"])
    writer = SelfWriter(request.source, request.progress, request.device)
    ids_BT = token_ids(data, request.source.folder, vocab_size, writer)
    num_held = _held(ids_BT)
    rows = _rows(section, ids_BT[num_held:], request.world_size)
    steps = max(1, section.max_tokens // (rows * ids_BT.shape[1]))
    assert request.source.folder is not None
    job = Job(
        folder=folder,
        dense=request.source.folder,
        section=section,
        data=data.public,
        fingerprint=_fingerprint(
            manifest, section, rows, ids_BT, _teacher(request.source, section)
        ),
        steps=min(steps, section.max_steps or steps),
        batch_size=rows,
        num_held=num_held,
        width=ids_BT.shape[1],
        top_k=made.top_k,
        null_experts=made.null_experts,
        world_size=request.world_size,
        resume=request.resume,
        device=device,
    )
    return job, ids_BT


def _check_parallel(parallel: str, request: Request) -> None:
    """Refuse to cut what cannot be cut."""
    if request.world_size == 1:
        raise UsageError(
            f"--parallel {parallel} has no effect on one process.",
            "Start several with --launcher.",
        )
    empty = [name for name, ref in read_folder(request.folder).items() if not ref.num_bytes]
    if empty:
        raise UsageError(
            f"{empty[0]} has no elements, and transformers cannot cut such tensors.",
            "Use --parallel replicate, or convert with --shared-experts 1.",
        )


def _data(data: Data, max_tokens: int, device: str) -> Data:
    """Return the data as training reads it: the source's own text where none is given.

    Its own text takes long to write, so a long run goes over it several times.
    """
    data = data.model_copy(update={"train": SELF if data.train is None else data.train})
    if data.is_self:
        max_tokens = min(max_tokens, SELF_TOKENS[device])
    return data.model_copy(update={"max_tokens": max_tokens})


def _made(folder: Path, manifest: Manifest) -> Made:
    target = target_of(folder)
    return Made(
        method=Recipe.model_validate(manifest.recipe).experts,
        target=target,
        exact=manifest.exact,
        top_k=manifest.target.top_k,
        num_experts=manifest.target.num_experts,
        expert_size=manifest.target.expert_size,
        selection_bias=any(target.keeps_dtype(name) for name in read_folder(folder)),
        null_experts=manifest.target.null_experts,
    )


def _text_config(folder: Path) -> dict[str, Any]:
    config = read_config(folder / "config.json")
    return dict(config.get("text_config", config))


def _held(ids_BT: torch.Tensor) -> int:
    """Return how many rows are kept to measure on.

    Raises:
        UsageError: there is but one.
    """
    if len(ids_BT) == 1:
        raise UsageError(
            f"The data gives one row of {ids_BT.shape[1]} tokens, and there must be others to "
            "measure on.",
            "Use more text, or a smaller --seq-len.",
        )
    return min(HELD_ROWS, -(-len(ids_BT) // HELD_SHARE))


def _rows(section: Calibration, train_BT: torch.Tensor, world_size: int) -> int:
    """Return the rows of one step: a multiple of the parts that processes cut it into.

    Raises:
        UsageError: the number given is none, or more than the data has to train on.
    """
    (num_rows, width), parts = train_BT.shape, world_size * section.grad_accum
    assert section.max_tokens is not None
    usual = min(max(1, min(STEP_TOKENS, section.max_tokens) // width), num_rows)
    rows = section.batch_size or -(-usual // parts) * parts
    if rows % parts:
        raise UsageError(
            f"A batch of {rows} rows cannot be cut into {world_size} processes x "
            f"{section.grad_accum} accumulated parts.",
            f"Use a multiple of {parts} for --batch-size.",
        )
    if rows > num_rows:
        raise UsageError(
            f"A step would have {rows} rows, and the data gives {num_rows} of {width} tokens to "
            "train on.",
            "Use more text, a larger --max-tokens, or a smaller --batch-size or --seq-len.",
        )
    return rows


def _teacher(source: Source, section: Calibration) -> str:
    """Return what tells the dense source from others; nothing where it does not teach."""
    assert section.objective is not None
    if not {"distill", "hidden"} & section.objective.terms.keys():
        return ""
    files = {name: sha256_of(path) for name, path in files_of(source).items()}
    return source.sha or content_sha256(files) or ""


def _fingerprint(
    manifest: Manifest, section: Calibration, rows: int, ids_BT: torch.Tensor, teacher: str
) -> str:
    """Return a hash of everything that decides the result, the number of processes aside."""
    weights = [f.sha256 for f in manifest.target.files if f.path.endswith(".safetensors")]
    settings = section.model_dump_json(exclude=set(NO_EFFECT))
    parts = [settings, str(rows), str(tuple(ids_BT.shape)), teacher, *weights]
    digest = hashlib.sha256("\n".join(parts).encode())
    digest.update(ids_BT.numpy().tobytes())
    return digest.hexdigest()
