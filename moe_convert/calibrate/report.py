"""What a run says while it goes on: a record of every step, and a log file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from moe_convert.manifest import Measured

LOG_NAME = "calibration.jsonl"


@dataclass(frozen=True)
class StepRecord:
    """One optimiser step, over all processes; `load` has each expert's share, layer by layer."""

    step: int
    steps: int
    tokens: int
    loss: float
    terms: Mapping[str, float]
    lr: float
    grad_norm: float
    tokens_per_s: float
    max_violation: float
    dead_experts: int
    load: tuple[tuple[float, ...], ...]

    @property
    def scalars(self) -> dict[str, float]:
        """The figures that a tracker plots."""
        return {
            "loss": self.loss,
            **{f"loss/{name}": value for name, value in self.terms.items()},
            "lr": self.lr,
            "grad_norm": self.grad_norm,
            "tokens": self.tokens,
            "tokens_per_s": self.tokens_per_s,
            "max_violation": self.max_violation,
            "dead_experts": self.dead_experts,
        }


class Watcher(Protocol):
    """Somebody who wants to see how it goes."""

    def phase(self, what: str) -> None:
        """Something of unknown length begins."""

    def measured(self, when: str, found: Measured) -> None:
        """The model was measured, `before` or `after`."""

    def step(self, record: StepRecord) -> None:
        """A step is done."""


class Silent:
    """Nobody watches."""

    def phase(self, what: str) -> None:
        """Say nothing."""

    def measured(self, when: str, found: Measured) -> None:
        """Say nothing."""

    def step(self, record: StepRecord) -> None:
        """Say nothing."""


class Log:
    """`calibration.jsonl`: one line of figures for each step."""

    def __init__(self, folder: Path, step: int) -> None:
        """Open it; lines after `step`, of a run that is now resumed, are dropped."""
        path = folder / LOG_NAME
        lines = path.read_text(encoding="utf-8").splitlines() if step and path.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def step(self, record: StepRecord) -> None:
        """Write one line; a figure that is not finite, as in fp16 when it overflows, is null."""
        values = {n: v if math.isfinite(v) else None for n, v in record.scalars.items()}
        self._file.write(json.dumps({"step": record.step, **values}) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()
