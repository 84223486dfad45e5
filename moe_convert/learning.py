"""A split that is learned: who has which neuron, and the routers, against the dense model's logits.

B rows · T tokens · D hidden size · F FFN neurons · V vocabulary · L MoE layers · E routed experts
N neurons
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import checkpoint

from moe_convert.checkpoint import Source
from moe_convert.errors import VerificationError
from moe_convert.experts import Learned
from moe_convert.families import DenseFamily
from moe_convert.ffn import FfnSample, Grouping, Neurons, Weight
from moe_convert.grouping.contribution import describe
from moe_convert.grouping.learned import (
    fires,
    membership,
    rounded,
    sinkhorn,
    start,
    temperature_at,
)
from moe_convert.grouping.parts import DESCRIBED, divide, experts, spaced
from moe_convert.losses import cross_entropy, distillation, load_balance, router_z
from moe_convert.manifest import LearningReport
from moe_convert.plan import Plan
from moe_convert.runtime import exact_products, products
from moe_convert.streams import DenseStream, skeleton
from moe_convert.training import state
from moe_convert.training.batches import labels_of, order
from moe_convert.training.optimizer import Stepper, Trained
from moe_convert.training.stopping import stop_signal

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moe_convert.targets import MoeShape

WEIGHTS = {"distill": 2.0, "lm": 1.0, "z": 1e-3, "aux": 1e-2}
"""Of the loss terms, as published."""
PART_TOKENS = 2048
"""Tokens that go through the model at once."""
SPREAD = 0.01
"""Standard deviation of affinities and router rows that start at random."""
LEAD = 0.05
"""What a neuron's affinity to the expert that it starts in is larger by."""
SAVE_EVERY = 50
NAME = "learned"
KEPT = ("master/affinity", "start/router", "shared", "rest")
"""What the parts of a start are called in a checkpoint."""
SMOOTHING = 0.9

Progress = Callable[[str, int, int], None]
Weights = Mapping[str, Weight]


@dataclass(frozen=True)
class Learning:
    """The groups of every MoE layer, and how they were found."""

    groups: Mapping[int, Grouping]
    report: LearningReport


@dataclass(frozen=True)
class Start:
    """What is learned, from where it starts, and which neurons it is about, int64."""

    affinity_LNE: torch.Tensor
    router_LED: torch.Tensor
    shared_LN: torch.Tensor
    rest_LN: torch.Tensor


def learn(
    plan: Plan,
    source: Source,
    weights: Weights,
    ids_BT: torch.Tensor,
    folder: Path,
    device: str,
    progress: Progress,
) -> Learning:
    """Learn the groups and routers of all MoE layers together; the dense weights do not change.

    Checkpoints lie in `folder`, from which a run that was interrupted goes on, and one that was
    finished is taken up without running anything.

    Raises:
        VerificationError: the loss is not finite.
        UsageError: the earlier run was to take another number of steps, as on another device.
        KeyboardInterrupt: a signal asked to stop; a checkpoint has been written.
    """
    with products(device, plan.recipe.runtime.precision):
        found = state.latest(folder, _fingerprint(plan, device), _anew(folder))
        if found:
            tensors = {name: tensor.to(device) for name, tensor in found[1].items()}
            begun = Start(*(tensors[name] for name in KEPT))
        else:
            with torch.no_grad():
                begun = _start(plan, source, weights, ids_BT, device)
        run = _Run(plan, begun, ids_BT, folder, device)
        if found:
            run.resume(found[0], tensors)
        if run.position.step < run.steps:
            model = whole(source.config, weights, device)
            run.train(Student(model, plan.layout.family, plan.shape.moe_layers), progress)
        return run.result


def _fingerprint(plan: Plan, device: str) -> str:
    """Return what tells a checkpoint: the folder is the plan's, and a device sets the steps."""
    method = plan.recipe.experts
    assert isinstance(method, Learned)
    return f"{NAME} in {method.num_steps(gpu=device == 'cuda')} steps"


def _anew(folder: Path) -> str:
    return f"Go on where that run began (--device), or delete {folder} to start anew."


def whole(config: Mapping[str, Any], weights: Weights, device: str) -> PreTrainedModel:
    """Return the dense model in fp32, frozen; its layers compute twice to save memory."""
    model = skeleton(config)
    found = {n: weights[n].load().float() for n in model.state_dict() if n in weights}
    model.load_state_dict(found, strict=False, assign=True)
    model.tie_weights()
    return model.to(device).eval().requires_grad_(False)


class Student:
    """The dense model; with a membership only the neurons of the chosen experts fire in it."""

    def __init__(
        self, model: PreTrainedModel, family: DenseFamily, layers: tuple[int, ...]
    ) -> None:
        """Look into the FFNs of some layers."""
        self._model, self._fires = model, torch.empty(0)
        self._member_LFX: torch.Tensor | None = None
        self._router_LED, self._top_k = torch.empty(0), 0
        self._seen: list[torch.Tensor] | None = None
        for index, layer in enumerate(layers):
            block = model.get_submodule(f"{family.layers}.{layer}")
            down = block.get_submodule(family.ffn_names.down.removesuffix(".weight"))
            ffn = block.get_submodule(family.ffn_module)
            ffn.register_forward_pre_hook(functools.partial(self._route, index))
            down.register_forward_pre_hook(functools.partial(self._mask, index))
        for block in model.get_submodule(family.layers).children():
            block.forward = _twice(block.forward)

    def dense(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """Return the logits with all neurons on, [B T, V], without gradient."""
        self._member_LFX = None
        with torch.no_grad():
            return self._logits(ids_BT)

    def masked(
        self,
        ids_BT: torch.Tensor,
        member_LFX: torch.Tensor,
        router_LED: torch.Tensor,
        top_k: int,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the logits [B T, V] and those of the routers, L times [B T, E]."""
        self._member_LFX, self._router_LED, self._top_k = member_LFX, router_LED, top_k
        seen = self._seen = list[torch.Tensor]()
        try:
            return self._logits(ids_BT), seen
        finally:
            self._seen = None

    def _logits(self, ids_BT: torch.Tensor) -> torch.Tensor:
        logits_BTV: torch.Tensor = self._model(input_ids=ids_BT, use_cache=False).logits
        return logits_BTV.flatten(0, 1)

    def _route(self, index: int, module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if self._member_LFX is None:
            return
        x_TD = args[0].flatten(0, -2).float()
        with exact_products(x_TD.device.type):
            logits_TE = x_TD @ self._router_LED[index].T
        if self._seen is not None:
            self._seen.append(logits_TE)
        self._fires = fires(logits_TE, self._top_k)

    def _mask(
        self, index: int, module: torch.nn.Module, args: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...] | None:
        if self._member_LFX is None:
            return None
        mask_TF = self._fires @ self._member_LFX[index].T
        return (args[0] * mask_TF.view_as(args[0]).to(args[0].dtype), *args[1:])


def _twice(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Compute a layer again in the backward pass, in place of keeping what it computed."""
    return functools.partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)


def _start(
    plan: Plan, source: Source, weights: Weights, ids_BT: torch.Tensor, device: str
) -> Start:
    """Look at the dense FFNs on some rows: what is shared, and where the others start."""
    method, shape, layout = plan.recipe.experts, plan.shape, plan.layout
    assert isinstance(method, Learned)
    rows_BT = ids_BT[: -(-DESCRIBED // ids_BT.shape[1])]
    stream = DenseStream(source.config, layout.family, weights, rows_BT, device)
    found = []
    with exact_products(device):
        for layer in shape.moe_layers:
            neurons = Neurons.of(layout.family.ffn(layer, weights, layout.body), device)
            sample = _sample(stream.reach(layer).to(device), ids_BT.shape[1])
            found.append(_layer_start(method, shape, layer, neurons, sample))
    return Start(*(torch.stack(parts) for parts in zip(*found, strict=True)))


def _sample(x_TD: torch.Tensor, row_length: int) -> FfnSample:
    return FfnSample(x_TD, x_TD, x_TD, row_length)


def _layer_start(
    method: Learned, shape: MoeShape, layer: int, neurons: Neurons, sample: FfnSample
) -> tuple[torch.Tensor, ...]:
    """Return affinities [N, E], router rows [E, D], shared and routed neurons of one layer."""
    seed, num_experts, x_TD = method.layer_seed(layer), shape.num_experts, spaced(sample.x_TD)
    draw, device = torch.Generator().manual_seed(seed), x_TD.device
    size = (shape.dense_size - shape.shared_size, num_experts)
    affinity_NE = SPREAD * torch.randn(size, generator=draw).to(device)
    if method.start == "random":
        shared_N, rest_N = divide(describe(neurons, x_TD)[0], shape.shared_size)
        rows_ED = SPREAD * torch.randn(num_experts, x_TD.shape[1], generator=draw)
        return affinity_NE, rows_ED.to(device), shared_N, rest_N
    grouping = start(neurons, sample, num_experts, shape.shared_size, seed)
    flat_N, order_N = grouping.routed_EN.flatten().sort()
    labels_N = (order_N // grouping.routed_EN.shape[1]).to(device)
    affinity_NE[torch.arange(len(labels_N), device=device), labels_N] += LEAD
    assert grouping.router_ED is not None
    return affinity_NE, grouping.router_ED, grouping.shared_N.to(device), flat_N.to(device)


class _Run:
    """The steps of a run, what they change and where it stands."""

    def __init__(
        self, plan: Plan, start: Start, ids_BT: torch.Tensor, folder: Path, device: str
    ) -> None:
        method = plan.recipe.experts
        assert isinstance(method, Learned)
        self._method, self._shape, self._folder = method, plan.shape, folder
        self._ids_BT, self._device, self._start = ids_BT, device, start
        self.steps = method.num_steps(gpu=device == "cuda")
        self._affinity_LNE = torch.nn.Parameter(start.affinity_LNE.clone())
        self._router_LED = torch.nn.Parameter(start.router_LED.clone())
        trained = [
            Trained("affinity", "experts", self._affinity_LNE, self._affinity_LNE),
            Trained("router", "router", self._router_LED, self._router_LED),
        ]
        self._stepper = Stepper(trained, method, self.steps)
        self.position = state.Position(fingerprint=_fingerprint(plan, device))
        self._labels_LN = torch.empty(0)

    def resume(self, position: state.Position, tensors: dict[str, torch.Tensor]) -> None:
        """Go on where an earlier run stopped."""
        self.position, self._labels_LN = position, tensors["labels"]
        self._stepper.restore(tensors)

    def train(self, student: Student, progress: Progress) -> None:
        """Take the steps that are left."""
        position = self.position
        progress("learn", position.step, self.steps)
        with stop_signal() as stop:
            while position.step < self.steps:
                self._judge(self._step(student))
                if stop.is_set() or position.step in {
                    self.steps,
                    *range(0, self.steps, SAVE_EVERY),
                }:
                    self._save()
                if stop.is_set():
                    raise KeyboardInterrupt
                progress("learn", position.step, self.steps)

    def _step(self, student: Student) -> float:
        """Take one step; return its loss."""
        number, method = self.position.step, self._method
        with exact_products(self._device):
            temperature = temperature_at(number, self.steps, method.temperature)
            share_LNE = sinkhorn(self._affinity_LNE, temperature)
            if number % method.refresh == 0:
                self._labels_LN = rounded(share_LNE.detach())
            width = self._shape.dense_size
            member_LFX = membership(self._labels_LN, share_LNE, self._start.rest_LN, width)
        leaf_LFX = member_LFX.detach().requires_grad_()
        counts_LE = share_LNE.new_zeros(len(share_LNE), share_LNE.shape[-1])
        total, parts = 0.0, list(self._parts(number))
        for ids_BT in parts:
            loss = self._loss(student, ids_BT.to(self._device), leaf_LFX, counts_LE) / len(parts)
            loss.backward()
            total += float(loss.detach())
        member_LFX.backward(leaf_LFX.grad)
        self._stepper.step(number)
        return total

    def _parts(self, number: int) -> Iterator[torch.Tensor]:
        """Yield the rows of a step, some at a time."""
        row = self._ids_BT.shape[1]
        size = max(1, min(self._method.tokens // row, len(self._ids_BT)))
        self.position.tokens += size * row
        rows = order(len(self._ids_BT), number * size, size, self._method.seed)
        yield from self._ids_BT[rows].split(max(1, PART_TOKENS // row))

    def _loss(
        self, student: Student, ids_BT: torch.Tensor, leaf: torch.Tensor, counts_LE: torch.Tensor
    ) -> torch.Tensor:
        """Return the weighted loss of some rows; adds up what the experts were chosen."""
        dense_TV = student.dense(ids_BT)
        top_k = self._shape.top_k
        made_TV, logits = student.masked(ids_BT, leaf, self._router_LED, top_k)
        for logits_TE, counts_E in zip(logits, counts_LE, strict=True):
            chosen = logits_TE.topk(top_k, dim=-1).indices.flatten()
            counts_E += torch.bincount(chosen, minlength=len(counts_E))
        balance = [load_balance(*pair, False) for pair in zip(logits, counts_LE, strict=True)]
        terms = {
            "distill": distillation(made_TV, dense_TV),
            "lm": cross_entropy(made_TV, labels_of(ids_BT)),
            "z": torch.stack([router_z(logits_TE) for logits_TE in logits]).mean(),
            "aux": torch.stack(balance).mean(),
        }
        return torch.stack([WEIGHTS[name] * term for name, term in terms.items()]).sum()

    def _judge(self, loss: float) -> None:
        """Take note of a step's loss."""
        position = self.position
        position.step += 1
        if not math.isfinite(loss):
            raise VerificationError(
                f"Learning the split diverged: the loss of step {position.step} is {loss}.",
                "Use a smaller experts.lr.",
            )
        smooth = loss if position.loss_smooth is None else position.loss_smooth
        position.loss_smooth = SMOOTHING * smooth + (1 - SMOOTHING) * loss
        position.loss_first = loss if position.loss_first is None else position.loss_first

    def _save(self) -> None:
        start = (self._start.router_LED, self._start.shared_LN, self._start.rest_LN)
        tensors = self._stepper.tensors() | dict(zip(KEPT[1:], start, strict=True))
        state.save(self._folder, self.position, tensors | {"labels": self._labels_LN}, keep=1)

    @property
    def result(self) -> Learning:
        """What was found."""
        share_LNE = sinkhorn(self._affinity_LNE.detach(), self._method.temperature)
        found = {}
        for index, (layer, labels_N) in enumerate(
            zip(self._shape.moe_layers, rounded(share_LNE), strict=True)
        ):
            shared_N, rest_N = self._start.shared_LN[index], self._start.rest_LN[index]
            routed_EN = experts(rest_N, labels_N, self._shape.num_experts)
            rows_ED = self._router_LED[index].detach()
            found[layer] = Grouping(shared_N.cpu(), routed_EN.cpu(), router_ED=rows_ED)
        position = self.position
        assert position.loss_first is not None
        assert position.loss_smooth is not None
        report = LearningReport(
            steps=position.step,
            tokens=position.tokens,
            loss_first=position.loss_first,
            loss_last=position.loss_smooth,
        )
        return Learning(found, report)
