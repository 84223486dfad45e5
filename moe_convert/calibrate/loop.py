"""The training loop: step after step, each recorded and judged, with checkpoints between them.

B rows · T tokens
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from moe_convert.calibrate.guards import remedy
from moe_convert.calibrate.job import Job
from moe_convert.calibrate.report import StepRecord
from moe_convert.calibrate.saving import Saving
from moe_convert.calibrate.step import Models, Step
from moe_convert.errors import VerificationError
from moe_convert.losses import max_violation, num_dead
from moe_convert.training import state
from moe_convert.training.stopping import stop_signal

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

SMOOTHING = 0.9
MIN_LOSS = 0.1
"""Nats below which a first loss is not taken as the measure of a diverging one."""


class Loop:
    """Runs the steps of a job that are still to be done."""

    def __init__(
        self,
        job: Job,
        rows_BT: torch.Tensor,
        models: Models,
        accelerator: Accelerator,
        tell: Callable[[StepRecord], None],
    ) -> None:
        """Take up the last checkpoint, if the job resumes and there is one."""
        self.job, self.models, self._tell = job, models, tell
        self._rows_BT, self._section = rows_BT, job.section
        self._step = Step(job, rows_BT, models, accelerator)
        self.position = state.Position(fingerprint=job.fingerprint)
        self.resumed_from: int | None = None
        found = state.latest(job.folder, job.fingerprint) if job.resume else None
        if found:
            self._resume(*found)
        self._saving = Saving(job, accelerator, self.position.step)

    def _resume(self, position: state.Position, tensors: dict[str, torch.Tensor]) -> None:
        """Go on where a checkpoint was written."""
        self.position, self.resumed_from = position, position.step
        try:
            self.models.stepper.restore(tensors)
            for name, bias in self.models.biases:
                bias.copy_(tensors[f"bias/{name}"])
        except KeyError as error:
            raise state.unreadable(position.name) from error

    def run(self) -> None:
        """Train to the end, where the last checkpoint is written.

        Raises:
            VerificationError: the loss is not finite, or far above that of the first step.
            KeyboardInterrupt: a signal asked to stop; a checkpoint has been written.
        """
        with stop_signal() as stop:
            while self.position.step < self.job.steps and not self.position.stopped_early:
                started = time.monotonic()
                sums = self._step.take(self.position.step)
                self._after(sums, time.monotonic() - started)
                self._saving.after(self.position, self._tensors, stop=stop.is_set())
            self._saving.save(self.position, self._tensors)

    def _after(self, sums: torch.Tensor, seconds: float) -> None:
        """Record a step and judge it."""
        weights = self._step.weights
        values = dict(zip(weights, sums[1:].tolist(), strict=False))
        loss = sum(weights[name] * value for name, value in values.items())
        counts_LE = sums[len(weights) + 1 :].view(self.models.watch.num_layers, -1)
        position = self.position
        position.step += 1
        position.tokens += self.job.batch_size * self._rows_BT.shape[1]
        position.loss_last = loss
        if position.loss_first is None:
            position.loss_first = loss
        self._tell(
            StepRecord(
                step=position.step,
                steps=self.job.steps,
                tokens=position.tokens,
                loss=loss,
                terms=values,
                lr=self.models.stepper.lr,
                grad_norm=float(sums[0]),
                tokens_per_s=self.job.batch_size * self._rows_BT.shape[1] / seconds,
                max_violation=float(max_violation(counts_LE).max()),
                dead_experts=num_dead(counts_LE),
                load=tuple(map(tuple, (counts_LE / counts_LE.sum(1, keepdim=True)).tolist())),
            )
        )
        self._judge(loss)

    def _judge(self, loss: float) -> None:
        """Stop a run that diverges, or that no longer gets better."""
        position, early = self.position, self._section.early_stop
        first = position.loss_first if position.loss_first is not None else loss
        limit = self._section.guards.max_loss_ratio * max(first, MIN_LOSS)
        if not loss <= limit:
            raise VerificationError(
                f"Calibration diverged at step {position.step}: the loss is {loss:.4g}, and it was "
                f"{first:.4g} at the start.",
                remedy(self._section),
            )
        smooth = loss if position.loss_smooth is None else position.loss_smooth
        position.loss_smooth = SMOOTHING * smooth + (1 - SMOOTHING) * loss
        best = position.loss_best
        if best is None or position.loss_smooth < best - early.min_delta:
            position.loss_best, position.best_step = position.loss_smooth, position.step
        elif early.patience and position.step - position.best_step >= early.patience:
            position.stopped_early = True

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Return what a checkpoint holds; every process must ask."""
        biases = {f"bias/{name}": bias for name, bias in self.models.biases}
        return self.models.stepper.tensors() | biases
