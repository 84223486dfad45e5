"""The training loop: global batches in a fixed order, losses from logits and routers, checkpoints.

B rows · T tokens · V vocabulary · L MoE layers · E routed experts
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from moe_convert.calibrate.job import Job
from moe_convert.calibrate.models import selection_biases
from moe_convert.calibrate.report import StepRecord
from moe_convert.calibrate.watch import Watch
from moe_convert.errors import VerificationError
from moe_convert.losses import (
    bias_step,
    cross_entropy,
    distillation,
    load_balance,
    max_violation,
    num_dead,
    router_z,
)
from moe_convert.training import state
from moe_convert.training.batches import labels_of, order
from moe_convert.training.optimizer import Stepper
from moe_convert.training.stopping import stop_signal

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel

SMOOTHING = 0.9
MIN_LOSS = 0.1
"""Nats below which a first loss is not taken as the measure of a diverging one."""


@dataclass
class Models:
    """Everything that a step touches; `wrapped` is the student as processes share it."""

    student: PreTrainedModel
    wrapped: torch.nn.Module
    teacher: PreTrainedModel | None
    watch: Watch
    stepper: Stepper
    biases: list[tuple[str, torch.Tensor]] = field(default_factory=list)


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
        self.job, self.models, self._accelerator, self._tell = job, models, accelerator, tell
        self._rows_BT, self._section = rows_BT, job.section
        self.position = state.Position(fingerprint=job.fingerprint)
        self.resumed_from: int | None = None
        self.stopped_early = False
        self.last_loss = math.nan
        if job.section.bias_update:
            models.biases = selection_biases(models.student)
        found = state.latest(job.folder, job.fingerprint) if job.resume else None
        if found:
            self.position, tensors = found
            self.resumed_from = self.position.step
            models.stepper.restore(tensors)
            for name, bias in models.biases:
                bias.copy_(tensors[f"bias/{name}"])

    def run(self) -> None:
        """Train to the end.

        Raises:
            VerificationError: the loss is not finite, or far above that of the first step.
            KeyboardInterrupt: a signal asked to stop; a checkpoint has been written.
        """
        with stop_signal() as stop:
            while self.position.step < self.job.steps and not self.stopped_early:
                started = time.monotonic()
                sums = self._step()
                self._after(sums, time.monotonic() - started)
                if self._everywhere(stop.is_set()):
                    self._save()
                    raise KeyboardInterrupt
                if self.position.step % self._section.save_every == 0:
                    self._save()

    def _step(self) -> torch.Tensor:
        """Take one step; return its loss terms and counts in one fp32 vector, on the host.

        Counts of the parts of a batch add up as they come: the balance term of each part sees those
        of all processes and of the parts before it (arXiv 2501.11873).
        """
        accelerator, models = self._accelerator, self.models
        names = [*self._section.objective.terms] if self._section.objective else []
        device = accelerator.device
        totals = torch.zeros(len(names), device=device)
        counts_LE = torch.zeros(models.watch.num_layers, models.watch.num_experts, device=device)
        parts = list(self._parts())
        for number, ids_BT in enumerate(parts):
            last = number == len(parts) - 1
            waits = contextlib.nullcontext() if last else accelerator.no_sync(models.wrapped)
            with waits:
                terms = self._terms(ids_BT.to(device), counts_LE)
                weights = self._section.objective.terms if self._section.objective else {}
                if terms:
                    loss = sum(weights[name] * terms[name] for name in names)
                    accelerator.backward(loss / len(parts))
                    totals += torch.stack([terms[n].detach() for n in names]) / len(parts)
        norm = models.stepper.step(self.position.step) if names else torch.zeros((), device=device)
        self._balance(counts_LE)
        totals = accelerator.reduce(totals, "mean")
        return torch.cat([totals, norm.reshape(1), counts_LE.flatten()]).cpu()

    def _parts(self) -> Iterator[torch.Tensor]:
        """Yield this process's share of the next global batch, part by part."""
        size, world = self.job.batch_size, self._accelerator.num_processes
        rows = order(len(self._rows_BT), self.position.step * size, size, self._section.seed)
        width = size // (world * self._section.grad_accum)
        for part in range(self._section.grad_accum):
            start = (part * world + self._accelerator.process_index) * width
            yield self._rows_BT[rows[start : start + width]]

    def _terms(self, ids_BT: torch.Tensor, counts_LE: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the loss terms of some rows; adds their counts, from all processes."""
        assert self._section.objective is not None
        wanted, watch, terms = self._section.objective.terms, self.models.watch, {}
        with watch.recording(), torch.set_grad_enabled(bool(wanted)):
            logits_TV = self.models.wrapped(input_ids=ids_BT, use_cache=False).logits.flatten(0, 1)
        counts_LE += self._accelerator.reduce(watch.counts(), "sum")
        if "distill" in wanted:
            assert self.models.teacher is not None
            with torch.no_grad():
                dense_TV = self.models.teacher(input_ids=ids_BT, use_cache=False).logits
            terms["distill"] = distillation(logits_TV, dense_TV.flatten(0, 1))
        if "lm" in wanted:
            terms["lm"] = cross_entropy(logits_TV, labels_of(ids_BT))
        if "aux" in wanted:
            sigmoid = watch.target.scoring == "sigmoid"
            pairs = zip(watch.logits, counts_LE, strict=True)
            balance = [load_balance(logits, counts_E, sigmoid) for logits, counts_E in pairs]
            terms["aux"] = torch.stack(balance).mean()
        if "z" in wanted:
            terms["z"] = torch.stack([router_z(logits) for logits in watch.logits]).mean()
        watch.logits, watch.chosen = [], []
        return terms

    def _balance(self, counts_LE: torch.Tensor) -> None:
        """Move the selection biases, where the section asks for it."""
        if not self.models.biases:
            return
        step_LE = bias_step(counts_LE, self._section.bias_update)
        for (_, bias), step_E in zip(self.models.biases, step_LE, strict=True):
            with torch.no_grad():
                bias += step_E.to(bias.device).view_as(bias)

    def _after(self, sums: torch.Tensor, seconds: float) -> None:
        """Record a step and judge it."""
        weights = self._section.objective.terms if self._section.objective else {}
        values = dict(zip(weights, sums.tolist(), strict=False))
        loss = sum(weights[name] * value for name, value in values.items())
        counts_LE = sums[len(weights) + 1 :].view(self.models.watch.num_layers, -1)
        position = self.position
        position.step += 1
        position.tokens += self.job.batch_size * self._rows_BT.shape[1]
        self.last_loss = loss
        if position.loss_first is None:
            position.loss_first = loss
        self._judge(loss)
        self._tell(
            StepRecord(
                step=position.step,
                steps=self.job.steps,
                tokens=position.tokens,
                loss=loss,
                terms=values,
                lr=self.models.stepper.lr,
                grad_norm=float(sums[len(weights)]),
                tokens_per_s=self.job.batch_size * self._rows_BT.shape[1] / seconds,
                max_violation=float(max_violation(counts_LE).max()),
                dead_experts=num_dead(counts_LE),
                load=tuple(map(tuple, (counts_LE / counts_LE.sum(1, keepdim=True)).tolist())),
            )
        )

    def _judge(self, loss: float) -> None:
        """Stop a run that diverges, or that no longer gets better."""
        position, early = self.position, self._section.early_stop
        first = position.loss_first if position.loss_first is not None else loss
        limit = self._section.guards.max_loss_ratio * max(first, MIN_LOSS)
        if not loss <= limit:
            raise VerificationError(
                f"Calibration diverged at step {position.step}: the loss is {loss:.4g}, and it was "
                f"{first:.4g} at the start.",
                "The weights are those of the start; use a smaller --lr.",
            )
        smooth = loss if position.loss_smooth is None else position.loss_smooth
        position.loss_smooth = SMOOTHING * smooth + (1 - SMOOTHING) * loss
        best = position.loss_best
        if best is None or position.loss_smooth < best - early.min_delta:
            position.loss_best, position.best_step = position.loss_smooth, position.step
        elif early.patience and position.step - position.best_step >= early.patience:
            self.stopped_early = True

    def _everywhere(self, stop: bool) -> bool:
        """Return whether any process wants to stop."""
        if self._accelerator.num_processes == 1:
            return stop
        flag = torch.tensor(float(stop), device=self._accelerator.device)
        return bool(self._accelerator.reduce(flag, "sum") > 0)

    def _save(self) -> Path | None:
        """Write a checkpoint, from the main process."""
        tensors = self.models.stepper.tensors()
        tensors |= {f"bias/{name}": bias for name, bias in self.models.biases}
        if not self._accelerator.is_main_process:
            return None
        return state.save(self.job.folder, self.position, tensors, self._section.keep)
