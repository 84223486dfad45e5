"""One step of training: a global batch, its losses from logits and routers, and what moves.

B rows · T tokens · V vocabulary · L MoE layers · E routed experts · N loss terms
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch.utils.checkpoint import checkpoint

from moe_convert.calibrate.job import Job
from moe_convert.calibrate.models import selection_biases
from moe_convert.calibrate.watch import Watch
from moe_convert.losses import bias_step, cross_entropy, distillation, load_balance, router_z
from moe_convert.training.batches import labels_of, order
from moe_convert.training.optimizer import Stepper

if TYPE_CHECKING:
    from accelerate import Accelerator
    from transformers import PreTrainedModel


@dataclass
class Models:
    """Everything that a step touches; `wrapped` is the student as processes share it."""

    student: PreTrainedModel
    wrapped: torch.nn.Module
    teacher: PreTrainedModel | None
    watch: Watch
    stepper: Stepper
    biases: list[tuple[str, torch.Tensor]] = field(default_factory=list)

    @property
    def moved(self) -> list[torch.Tensor]:
        """Every tensor that a step changes."""
        return [*(one.master for one in self.stepper.trained), *(bias for _, bias in self.biases)]


class Step:
    """Takes the steps of a job; the host waits for the device once in each."""

    def __init__(
        self, job: Job, rows_BT: torch.Tensor, models: Models, accelerator: Accelerator
    ) -> None:
        """Find the biases that are to be moved."""
        self.job, self.models, self._accelerator = job, models, accelerator
        self._rows_BT, self._section = rows_BT, job.section
        self.weights = job.section.objective.terms if job.section.objective else {}
        self._no_logits = _no_logits(models.student)
        self._spreads: list[torch.Tensor] = []
        if job.section.bias_update:
            models.biases = selection_biases(models.student)

    def take(self, number: int) -> torch.Tensor:
        """Take one step; return its loss terms, their norm and counts in one vector, on the host.

        The balance term of every part of a batch sees the counts of the whole one, on all processes
        (arXiv 2501.11873). Several parts are therefore counted in a pass of their own before.
        """
        parts = list(self._parts(number))
        whole_LE = self._counted(parts) if "aux" in self.weights and len(parts) > 1 else None
        totals, counts_LE = [], []
        for part, ids_BT in enumerate(parts):
            with self._alone(part < len(parts) - 1):
                logits_TV, seen_LE = self._forward(ids_BT)
                counts_LE.append(seen_LE)
                terms = self._terms(ids_BT, logits_TV, seen_LE if whole_LE is None else whole_LE)
                del logits_TV
                if terms:
                    loss = sum(weight * terms[name] for name, weight in self.weights.items())
                    self.models.stepper.backward(loss / len(parts))
                    shares = [terms[name].detach() / len(parts) for name in self.weights]
                    totals.append(torch.stack(shares))
        return self._finish(number, totals, torch.stack(counts_LE).sum(dim=0))

    def _finish(
        self, number: int, totals: list[torch.Tensor], counts_LE: torch.Tensor
    ) -> torch.Tensor:
        """Move the weights and the biases; return what `_step` does."""
        own_N = torch.stack(totals).sum(dim=0) if totals else counts_LE.new_zeros(0)
        sums = torch.cat([own_N / self._accelerator.num_processes, counts_LE.flatten()])
        sums = self._accelerator.reduce(sums, "sum")
        norm = self.models.stepper.step(number) if totals else sums.new_zeros(())
        self._balance(sums[len(own_N) :].view_as(counts_LE))
        return torch.cat([norm.reshape(1), sums]).cpu()

    def _parts(self, number: int) -> Iterator[torch.Tensor]:
        """Yield this process's share of the next global batch, part by part."""
        size, world = self.job.batch_size, self._accelerator.num_processes
        rows = order(len(self._rows_BT), number * size, size, self._section.seed)
        width = size // (world * self._section.grad_accum)
        for part in range(self._section.grad_accum):
            start = (part * world + self._accelerator.process_index) * width
            yield self._rows_BT[rows[start : start + width]].to(self._accelerator.device)

    def _alone(self, alone: bool) -> contextlib.AbstractContextManager[None]:
        """Return where gradients stay with this process, or where they are averaged."""
        if not alone:
            return contextlib.nullcontext()
        found: contextlib.AbstractContextManager[None]
        found = self._accelerator.no_sync(self.models.wrapped)
        return found

    def _counted(self, parts: list[torch.Tensor]) -> torch.Tensor:
        """Return the counts of all parts on all processes, which costs a forward pass of each."""
        counts_LE = []
        for ids_BT in parts:
            with self.models.watch.recording(), torch.no_grad():
                self.models.student(input_ids=ids_BT, use_cache=False, **self._no_logits)
            counts_LE.append(self.models.watch.counts())
        return self._accelerator.reduce(torch.stack(counts_LE).sum(dim=0), "sum")

    def _forward(self, ids_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the student over some rows; return its logits, and this process's counts."""
        watch = self.models.watch
        with watch.recording(), torch.set_grad_enabled(bool(self.weights)):
            logits_BTV = self.models.wrapped(input_ids=ids_BT, use_cache=False).logits
        if self.models.biases:
            self._spreads.append(watch.spread())
        return logits_BTV.flatten(0, 1), watch.counts()

    def _terms(
        self, ids_BT: torch.Tensor, logits_TV: torch.Tensor, counts_LE: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Return the loss terms of the rows that were run."""
        wanted, watch, terms = self.weights, self.models.watch, {}
        if "distill" in wanted:
            assert self.models.teacher is not None
            with torch.no_grad():
                dense_TV = self.models.teacher(input_ids=ids_BT, use_cache=False).logits
            terms["distill"] = distillation(logits_TV, dense_TV.flatten(0, 1))
        if "lm" in wanted:
            terms["lm"] = cross_entropy(logits_TV, labels_of(ids_BT))
        if "aux" in wanted:
            if self._section.grad_accum == 1:
                counts_LE = self._accelerator.reduce(counts_LE, "sum")
            terms["aux"] = self._balance_loss(counts_LE)
        if "z" in wanted:
            terms["z"] = torch.stack(list(map(router_z, watch.logits))).mean()
        watch.forget()
        return terms

    def _balance_loss(self, counts_LE: torch.Tensor) -> torch.Tensor:
        """Return the mean over layers, whose scores are computed again and not kept."""
        watch = self.models.watch
        sigmoid = watch.target.scoring == "sigmoid"
        every = [
            checkpoint(load_balance, logits_TE, counts_E, sigmoid, use_reentrant=False)
            for logits_TE, counts_E in zip(watch.logits, counts_LE, strict=True)
        ]
        return torch.stack(every).mean()

    def _balance(self, counts_LE: torch.Tensor) -> None:
        """Move the selection biases, where the section asks for it."""
        if not self.models.biases:
            return
        spread_L = self._accelerator.reduce(torch.stack(self._spreads).mean(dim=0), "mean")
        self._spreads.clear()
        step_LE = bias_step(counts_LE, spread_L, self._section.bias_update)
        for (_, bias), step_E in zip(self.models.biases, step_LE, strict=True):
            with torch.no_grad():
                bias += step_E.to(bias.device).view_as(bias)


def _no_logits(student: PreTrainedModel) -> dict[str, int]:
    """Return what tells a model to give next to no logits, if it can be told."""
    known = inspect.signature(student.forward).parameters
    return {"logits_to_keep": 1} if "logits_to_keep" in known else {}
