"""The layer-local objective: every MoE layer learns the dense FFN's output on what it receives.

The layers are trained one after the other, each on the states that the trained ones before it give,
so that one layer of each model is in memory and nothing is propagated through others. A finished
layer is kept on disk, and so are checkpoints of the one that is trained, so that a run that was
killed goes on where it wrote the last of them.

T tokens · D hidden size · E routed experts
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from transformers.core_model_loading import revert_weight_conversion

from moe_convert.calibrate.finished import Done, begun, keep, kept
from moe_convert.calibrate.guards import remedy
from moe_convert.calibrate.job import Job
from moe_convert.calibrate.layers import Layers
from moe_convert.calibrate.report import StepRecord
from moe_convert.calibrate.saving import Saving
from moe_convert.calibrate.watch import Watch
from moe_convert.calibration import PARTS, Part, patterns
from moe_convert.errors import VerificationError
from moe_convert.ffn import Weight
from moe_convert.losses import hidden_error, load_balance, max_violation, num_dead, router_z
from moe_convert.streams.base import states_of
from moe_convert.training import state
from moe_convert.training.batches import order
from moe_convert.training.optimizer import Stepper, Trained
from moe_convert.training.stopping import stop_signal

if TYPE_CHECKING:
    from accelerate import Accelerator

    from moe_convert.targets import MoeTarget

Tell = Callable[[StepRecord], None]


def train_hidden(job: Job, rows_BT: torch.Tensor, accelerator: Accelerator, tell: Tell) -> Done:
    """Train every MoE layer for the job's steps; return the new tensors as they are stored.

    Every process takes its share of each batch, and gradients are those of all of it.

    Raises:
        VerificationError: the error of a layer is not finite, or grows.
        KeyboardInterrupt: a signal asked to stop; a checkpoint has been written.
    """
    layers, done = Layers(job, rows_BT, accelerator), Done()
    moe_layers = layers.moe_layers
    for layer in layers.numbers:
        outside, inside = layers.tensors(layer)
        trained: dict[str, torch.Tensor] = {}
        if layer in moe_layers:
            index = moe_layers.index(layer)
            trained = kept(job, layer, done) or _train_layer(
                layers, layer, (index, len(moe_layers)), done, tell
            )
            done.tensors |= trained
        new = {n: Weight.of(t, inside[n].dtype) for n, t in trained.items()}
        with torch.no_grad():
            layers.stream.leave(layer, {**outside, **inside, **new})
    return done


def _train_layer(
    layers: Layers, layer: int, place: tuple[int, int], done: Done, tell: Tell
) -> dict[str, torch.Tensor]:
    """Train one layer on what it receives, keep and return its tensors as they are stored."""
    job, stream = layers.job, layers.stream
    x_BTD = layers.received(layer)
    ffns = stream.ffns(layer, layers.tensors(layer)[1])
    stepper = Stepper(list(_trained(job, layers.target, ffns)), job.section, job.steps)
    run = _Run(layers, layer, place, ffns, stepper)
    found = begun(job, place[0])
    if found:
        run.resume(*found)
        done.resumed_from = run.position.step
    run.train(x_BTD, tell)
    named = {one.name: one.master.detach() for one in stepper.trained}
    stored = revert_weight_conversion(layers.model, named)
    stored = {name: tensor.to("cpu").contiguous() for name, tensor in stored.items()}
    done.first.append(run.first)
    done.last.append(run.last)
    if layers.accelerator.is_main_process:
        keep(job, layer, stored, done)
    return stored


def _trained(job: Job, target: MoeTarget, ffns: Mapping[str, torch.nn.Module]) -> Iterator[Trained]:
    assert job.section.train is not None
    found: dict[str, Part] = {}
    parameters = {
        f"{prefix}.{name}": parameter
        for prefix, module in ffns.items()
        for name, parameter in module.named_parameters()
        if parameter.numel()
    }
    for part, pattern in patterns(job.section.train, target).items():
        found |= {n: part for n in parameters if pattern.search(n) and n not in found}
    for name in sorted(found, key=lambda n: (PARTS.index(found[n]), n)):
        yield Trained(name, found[name], parameters[name], parameters[name].requires_grad_(True))


class _Run:
    """The steps of one layer, of which the position counts those of the layers before as well."""

    def __init__(
        self,
        layers: Layers,
        layer: int,
        place: tuple[int, int],
        ffns: Mapping[str, torch.nn.Module],
        stepper: Stepper,
    ) -> None:
        self._job, self._layers, self._layer = layers.job, layers, layer
        self._ffns, self._stepper = ffns, stepper
        self._accelerator = layers.accelerator
        self._dense = layers.dense_ffn(layer)
        self._watch = Watch(layers.model, layers.target, self._job.top_k, self._job.null_experts)
        assert self._job.section.objective is not None
        self._weights = self._job.section.objective.terms
        self._before, self._steps = (count * self._job.steps for count in place)
        self.position = state.Position(fingerprint=self._job.fingerprint, step=self._before)
        self.first = self.last = float("nan")

    def resume(self, position: state.Position, tensors: dict[str, torch.Tensor]) -> None:
        """Go on where a checkpoint of this layer was written."""
        try:
            self._stepper.restore(tensors)
        except KeyError as error:
            raise state.unreadable(position.name) from error
        assert position.loss_first is not None
        assert position.loss_last is not None
        self.position, self.first, self.last = position, position.loss_first, position.loss_last

    def train(self, x_BTD: torch.Tensor, tell: Tell) -> None:
        """Take the steps that are left, with checkpoints between them.

        Raises:
            VerificationError: the error is not finite, or grows.
            KeyboardInterrupt: a signal asked to stop; a checkpoint has been written.
        """
        saving = Saving(self._job, self._accelerator, self.position.step)
        with stop_signal() as stop:
            for number in range(self.position.step - self._before, self._job.steps):
                tell(self._step(x_BTD[self._rows(number)], number))
                saving.after(self.position, self._stepper.tensors, stop=stop.is_set())

    def _rows(self, number: int) -> list[int]:
        """Return this process's share of a batch, as places among the rows that are streamed."""
        size, accelerator = self._job.batch_size, self._accelerator
        taken = order(self._layers.num_given, number * size, size, self._job.section.seed)
        rows = [self._layers.places[row] for row in taken]
        return rows[accelerator.process_index :: accelerator.num_processes]

    def _step(self, x_BTD: torch.Tensor, number: int) -> StepRecord:
        """Take one step with this process's share of a batch and say how it went."""
        started, position = time.monotonic(), self.position
        values, counts_E = self._moved(x_BTD, number)
        terms = dict(zip(self._weights, values[1:], strict=True))
        loss = self.last = sum(weight * terms[name] for name, weight in self._weights.items())
        if number == 0:
            self.first = loss
        self._judge(number)
        tokens = self._job.batch_size * self._job.width
        position.step += 1
        position.tokens = (number + 1) * tokens
        position.loss_first, position.loss_last = self.first, self.last
        return StepRecord(
            step=position.step,
            steps=self._steps,
            tokens=position.tokens,
            loss=loss,
            terms=terms,
            lr=self._stepper.lr,
            grad_norm=values[0],
            tokens_per_s=tokens / (time.monotonic() - started),
            max_violation=float(max_violation(counts_E[None]).max()),
            dead_experts=num_dead(counts_E[None]),
            load=(tuple((counts_E / counts_E.sum()).tolist()),),
        )

    def _moved(self, x_BTD: torch.Tensor, number: int) -> tuple[list[float], torch.Tensor]:
        """Take the step; return the norm of its gradient and its terms, and the counts [E].

        The host waits for the device once.
        """
        with self._watch.recording():
            made = [states_of(ffn(x_BTD)) for ffn in self._ffns.values()]
        with torch.no_grad():
            dense_BTD = states_of(self._dense(x_BTD))
        counts_E = self._accelerator.reduce(self._watch.counts()[0], "sum")
        terms = self._terms(sum(made[1:], made[0]), dense_BTD, counts_E)
        values_N = torch.stack([terms[name] for name in self._weights])
        total = sum(weight * terms[name] for name, weight in self._weights.items())
        self._stepper.backward(torch.as_tensor(total))
        if self._accelerator.num_processes > 1:
            self._average()
        norm = self._stepper.step(number)
        values_N = self._accelerator.reduce(values_N.detach(), "mean")
        sums = torch.cat([norm.reshape(1), values_N, counts_E]).cpu()
        return sums[: -len(counts_E)].tolist(), sums[-len(counts_E) :]

    def _average(self) -> None:
        """Give every process the mean of all gradients, which travel together."""
        every = [one.parameter.grad for one in self._stepper.trained]
        grads = [grad for grad in every if grad is not None]
        mean_N = self._accelerator.reduce(torch.cat([grad.flatten() for grad in grads]), "mean")
        for grad, part_N in zip(grads, mean_N.split([g.numel() for g in grads]), strict=True):
            grad.copy_(part_N.view_as(grad))

    def _terms(
        self, made: torch.Tensor, dense: torch.Tensor, counts_E: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Return this process's terms, whose mean over all is that of the batch."""
        (logits_TE,) = self._watch.logits
        size = self._accelerator.reduce(dense.float().square().sum(), "mean")
        terms = {"hidden": hidden_error(made, dense, size)}
        if "aux" in self._weights:
            sigmoid = self._watch.target.scoring == "sigmoid"
            terms["aux"] = load_balance(logits_TE, counts_E, sigmoid)
        if "z" in self._weights:
            terms["z"] = router_z(logits_TE)
        return terms

    def _judge(self, number: int) -> None:
        limit = self._job.section.guards.max_loss_ratio * max(self.first, 0.1)
        if not self.last <= limit:
            raise VerificationError(
                f"Calibration diverged in layer {self._layer} at step {number + 1}: the error is "
                f"{self.last:.4g}, and it was {self.first:.4g} at the start.",
                remedy(self._job.section),
            )
