"""The layer-local objective: every MoE layer learns the dense FFN's output on what it receives.

The layers are trained one after the other, each on the states that the trained ones before it give,
so that one layer of each model is in memory and nothing is propagated through others. A finished
layer is kept on disk; a run that was killed goes on behind it.

T tokens · D hidden size · E routed experts
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers.core_model_loading import revert_weight_conversion

from moe_convert.calibrate.job import Job
from moe_convert.calibrate.models import modules_of, target_of
from moe_convert.calibrate.report import StepRecord
from moe_convert.calibrate.watch import Watch
from moe_convert.calibration import PARTS, Part, patterns
from moe_convert.checkpoint import open_source, read_folder
from moe_convert.checkpoint.names import full_config, loaded_names
from moe_convert.checkpoint.replace import WORK
from moe_convert.checkpoint.source import read_config
from moe_convert.errors import UsageError, VerificationError
from moe_convert.families import find_family, layer_name
from moe_convert.ffn import Weight
from moe_convert.losses import hidden_error, load_balance, max_violation, num_dead, router_z
from moe_convert.streams import ConvertedStream, skeleton
from moe_convert.training.batches import order
from moe_convert.training.optimizer import Stepper, Trained

if TYPE_CHECKING:
    from accelerate import Accelerator

    from moe_convert.targets import MoeTarget

HINT = "Give the same options again, or start anew with --no-resume."
Weights = Mapping[str, Weight]
Tell = Callable[[StepRecord], None]


@dataclass
class Done:
    """The trained tensors by their names on disk, and each layer's first and last error."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    first: list[float] = field(default_factory=list)
    last: list[float] = field(default_factory=list)
    resumed_from: int | None = None


def check_hidden(job: Job) -> None:
    """Refuse what cannot be trained layer by layer.

    Raises:
        UsageError: with the reason.
    """
    target = target_of(job.folder)
    if not target.stock or "." not in target.router_module or _is_wrapped(job.folder):
        raise UsageError(
            f"The hidden objective needs an FFN module of its own, and {target.model_type} has "
            "none that can be run by itself.",
            "Use --objective distill.",
        )


def _is_wrapped(folder: Path) -> bool:
    return "text_config" in read_config(folder / "config.json")


class Layers:
    """Both checkpoints, read a layer at a time; every process streams a share of the rows."""

    def __init__(self, job: Job, rows_BT: torch.Tensor, accelerator: Accelerator) -> None:
        """Embed the rows; nothing of a layer is read yet."""
        self.job, self.target = job, target_of(job.folder)
        self.num_given, used = len(rows_BT), used_rows(job, len(rows_BT))
        self.places = {row: place for place, row in enumerate(used)}
        rows_BT = rows_BT[used]
        self.accelerator, self._num_rows = accelerator, len(rows_BT)
        own = range(accelerator.process_index, len(rows_BT), accelerator.num_processes)
        rows_BT = rows_BT[[*own] or [0]]
        config = read_config(job.folder / "config.json")
        self._weights = {n: ref.weight() for n, ref in read_folder(job.folder).items()}
        self._names = loaded_names(full_config(config), self._weights)
        around = {n: w for n, w in self._weights.items() if _layer_of(n) is None}
        source = open_source(str(job.dense))
        self._family, _ = find_family(source.config)
        tables = self._family.token_tables
        with torch.no_grad():
            self.stream = ConvertedStream(config, around, rows_BT, job.device, tables)
        self._dense = {name: ref.weight() for name, ref in source.tensors.items()}
        self._dense_model = skeleton(source.config)

    @property
    def numbers(self) -> list[int]:
        """The numbers of all decoder layers."""
        return sorted({n for n in map(_layer_of, self._weights) if n is not None})

    def tensors(self, layer: int) -> tuple[Weights, Weights]:
        """Return a layer's tensors as they are stored: those outside its FFN, and the FFN's."""
        top = (self.target.router_module.split(".")[0], "shared_mlp")
        parts: tuple[dict[str, Weight], dict[str, Weight]] = ({}, {})
        for name, weight in self._weights.items():
            if _layer_of(name) == layer:
                inside = re.split(rf"\.{layer}\.", self._names.get(name, name), maxsplit=1)[-1]
                parts[inside.split(".")[0] in top][name] = weight
        return parts

    def received(self, layer: int) -> torch.Tensor:
        """Return what the FFN of a layer receives for all rows, those of other processes too."""
        outside, _ = self.tensors(layer)
        with torch.no_grad():
            x_BTD = self.stream.enter(layer, outside).unflatten(0, (-1, self.job.width))
        world = self.accelerator.num_processes
        if world == 1:
            return x_BTD
        share = -(-self._num_rows // world)
        padded_BTD = torch.cat([x_BTD, x_BTD[:1].expand(share - len(x_BTD), -1, -1)])
        whole_BTD = self.accelerator.gather(padded_BTD).unflatten(0, (world, share))
        return whole_BTD.transpose(0, 1).flatten(0, 1)[: self._num_rows]

    def dense_ffn(self, layer: int) -> torch.nn.Module:
        """Return the dense FFN of a layer, in fp32."""
        path = f"{self._family.layers}.{layer}.{self._family.ffn_module}"
        prefix = layer_name(layer, f"{self._family.ffn_module}.")
        module: torch.nn.Module = self._dense_model.get_submodule(path)
        state = {
            name.removeprefix(prefix): weight.load().float().to(self.job.device)
            for name, weight in self._dense.items()
            if name.startswith(prefix)
        }
        module.load_state_dict(state, assign=True)
        return module

    @property
    def model(self) -> torch.nn.Module:
        """The converted model, all but empty."""
        return self.stream._model


def _layer_of(name: str) -> int | None:
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else None


def train_hidden(job: Job, rows_BT: torch.Tensor, accelerator: Accelerator, tell: Tell) -> Done:
    """Train every MoE layer for the job's steps; return the new tensors as they are stored.

    Every process takes its share of each batch, and gradients are those of all of it.

    Raises:
        VerificationError: the error of a layer is not finite, or grows.
    """
    layers, done = Layers(job, rows_BT, accelerator), Done()
    routers = modules_of(layers.model, layers.target.router_module)
    numbers = [number for number in map(_layer_of, (f".{n}." for n, _ in routers))]
    moe_layers = [number for number in numbers if number is not None]
    for layer in layers.numbers:
        outside, inside = layers.tensors(layer)
        trained: dict[str, torch.Tensor] = {}
        if layer in moe_layers:
            index = moe_layers.index(layer)
            trained = _kept(job, layer, done) or _train_layer(
                layers, layer, (index, len(moe_layers)), done, tell
            )
            done.tensors |= trained
        new = {n: Weight.of(t, inside[n].dtype) for n, t in trained.items()}
        with torch.no_grad():
            layers.stream.leave(layer, {**outside, **inside, **new})
    return done


def _path(job: Job, layer: int) -> Path:
    return job.folder / WORK / f"layer-{layer:05d}.safetensors"


def num_finished(job: Job) -> int:
    """Return how many layers an earlier run of this job has trained.

    Raises:
        UsageError: they are of a run with other settings, data or weights, or cannot be read.
    """
    paths = sorted((job.folder / WORK).glob("layer-*.safetensors")) if job.resume else []
    for path in paths:
        if _about(path)["fingerprint"] != job.fingerprint:
            raise UsageError(
                f"{job.folder.name} holds layers of a calibration with other settings, data or "
                "weights.",
                HINT,
            )
    return len(paths)


def _about(path: Path) -> dict[str, Any]:
    """Return what is written beside the tensors of a finished layer."""
    try:
        with safe_open(path, "pt") as file:
            found: dict[str, Any] = json.loads(file.metadata()["run"])
    except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
        raise UsageError(f"The finished layer {path.name} cannot be read.", HINT) from error
    return found


def _kept(job: Job, layer: int, done: Done) -> dict[str, torch.Tensor]:
    """Return what an earlier run made of a layer; nothing if it did not get there."""
    path = _path(job, layer)
    if not job.resume or not path.is_file():
        return {}
    found = _about(path)
    done.first.append(found["first"])
    done.last.append(found["last"])
    done.resumed_from = len(done.last) * job.steps
    return dict(load_file(path))


def used_rows(job: Job, num_rows: int) -> list[int]:
    """Return the rows that the steps of a layer get to, in rising order; others are left out."""
    count = min(num_rows, job.steps * job.batch_size)
    return sorted(order(num_rows, 0, count, job.section.seed))


def _train_layer(
    layers: Layers, layer: int, place: tuple[int, int], done: Done, tell: Tell
) -> dict[str, torch.Tensor]:
    """Train one layer on what it receives, keep and return its tensors as they are stored."""
    job, stream = layers.job, layers.stream
    x_BTD = layers.received(layer)
    ffns = stream.ffns(layer, layers.tensors(layer)[1])
    stepper = Stepper(list(_trained(job, layers.target, ffns)), job.section, job.steps)
    run = _Run(job, layers, layer, ffns, stepper)
    for step in range(job.steps):
        taken = order(layers.num_given, step * job.batch_size, job.batch_size, job.section.seed)
        rows = [layers.places[row] for row in taken]
        share = rows[layers.accelerator.process_index :: layers.accelerator.num_processes]
        tell(run.step(x_BTD[share], step, place))
    named = {one.name: one.master.detach() for one in stepper.trained}
    stored = revert_weight_conversion(layers.model, named)
    stored = {name: tensor.to("cpu").contiguous() for name, tensor in stored.items()}
    done.first.append(run.first)
    done.last.append(run.last)
    if layers.accelerator.is_main_process:
        _keep(job, layer, stored, run)
    return stored


def _keep(job: Job, layer: int, stored: dict[str, torch.Tensor], run: _Run) -> None:
    """Write what was made of a layer, whole or not at all."""
    found = {"fingerprint": job.fingerprint, "first": run.first, "last": run.last}
    partial = _path(job, layer).with_suffix(".partial")
    partial.parent.mkdir(exist_ok=True)
    save_file(stored, partial, {"run": json.dumps(found)})
    partial.replace(_path(job, layer))


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
    """The steps of one layer."""

    def __init__(
        self,
        job: Job,
        layers: Layers,
        layer: int,
        ffns: Mapping[str, torch.nn.Module],
        stepper: Stepper,
    ) -> None:
        self._job, self._layer, self._ffns, self._stepper = job, layer, ffns, stepper
        self._accelerator = layers.accelerator
        self._dense = layers.dense_ffn(layer)
        self._watch = Watch(layers.model, layers.target, job.top_k, job.null_experts)
        assert job.section.objective is not None
        self._weights = job.section.objective.terms
        self.first = self.last = float("nan")

    def step(self, x_BTD: torch.Tensor, number: int, place: tuple[int, int]) -> StepRecord:
        """Take one step with this process's share of a batch and say how it went."""
        started, (index, num_layers) = time.monotonic(), place
        values, counts_E = self._moved(x_BTD, number)
        terms = dict(zip(self._weights, values[1:], strict=True))
        loss = self.last = sum(weight * terms[name] for name, weight in self._weights.items())
        if number == 0:
            self.first = loss
        self._judge(number)
        tokens = self._job.batch_size * self._job.width
        done = index * self._job.steps + number + 1
        return StepRecord(
            step=done,
            steps=num_layers * self._job.steps,
            tokens=(number + 1) * tokens,
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
            made = [_first(ffn(x_BTD)) for ffn in self._ffns.values()]
        with torch.no_grad():
            dense_BTD = _first(self._dense(x_BTD))
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
                "The weights are those of the start; use a smaller --lr.",
            )


def _first(result: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    return result[0] if isinstance(result, tuple) else result
