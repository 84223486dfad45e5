"""Splits that are made of data: layer by layer, along the dense and the converted stream.

D hidden size · F FFN neurons · E routed experts · T tokens
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moe_convert.carving import Carved, part_products, relative_error
from moe_convert.checkpoint import Source
from moe_convert.data.writing import load_writer
from moe_convert.edits import Fit, edited
from moe_convert.experts import Split
from moe_convert.ffn import Experts, Ffn, FfnSample, Grouping, Neurons, Weight, gather, torch_dtype
from moe_convert.gradients import spill_gradients
from moe_convert.grouping.parts import portions
from moe_convert.inputs import Inputs
from moe_convert.manifest import SplitReport
from moe_convert.plan import Plan, blank_experts
from moe_convert.plan.estimate import offload_folder, states_device
from moe_convert.plan.layout import Named, without_ffn
from moe_convert.routers import Routed, States, routed
from moe_convert.runtime import exact_products, products
from moe_convert.selection import balancing_bias, scored, threshold_bias
from moe_convert.streams import ConvertedStream, DenseStream, Room
from moe_convert.targets.base import zero_expert

if TYPE_CHECKING:
    import torch

    from moe_convert.learning import Learning

MEASURED = 8192
"""Tokens on which the error of a layer is measured, evenly spaced."""


@dataclass(frozen=True)
class Made:
    """One layer: the FFN with its fitted values, who has which neurons, the router's rows.

    `bias_E` is what steers the choice, if anything does.
    """

    ffn: Ffn
    grouping: Grouping
    router_ED: torch.Tensor
    bias_E: torch.Tensor | None


class Splitter:
    """Makes the experts and the router of one layer after the other, in their order.

    Every layer is fitted to what it receives from the layers that were made before it, and then run
    as it is stored, through the target's own class.
    """

    def __init__(
        self,
        plan: Plan,
        local: Source,
        weights: Mapping[str, Weight],
        inputs: Inputs,
        is_written: Callable[[int], bool],
        device: str = "cpu",
        learned: Learning | None = None,
    ) -> None:
        """Embed the data; `is_written` says which layers an earlier run has finished."""
        method = plan.recipe.experts
        assert isinstance(method, Split)
        self._plan, self._method, self._weights = plan, method, weights
        self._inputs, self._is_written, self._device = inputs, is_written, device
        self._rest = {
            n: self._alone(named) for n, named in without_ffn(plan.layout, weights).items()
        }
        self._room = Room(states_device(plan, device), offload_folder(plan))
        with self._products():
            self._dense = DenseStream(
                local.config, plan.layout.family, weights, inputs.data_BT, device, self._room
            )
            self._converted = ConvertedStream(
                plan.layout.text_config,
                self._rest[None],
                inputs.data_BT,
                device,
                plan.layout.family.token_tables,
                self._room,
            )
        self._learned = learned
        self._gradients = layer_gradients(local, plan, inputs.data_BT, device)
        self._found: dict[int, Routed] = {}
        self._errors: dict[int, float] = {}
        self._local_errors: dict[int, float] = {}

    @contextlib.contextmanager
    def _products(self) -> Iterator[None]:
        """Compute as the recipe wants it, and remember nothing for gradients."""
        import torch

        runtime = self._plan.recipe.runtime
        with torch.no_grad(), products(self._device, runtime.precision):
            yield

    def __call__(self, layer: int) -> tuple[Experts, Weight]:
        """Return the layer's experts and router rows [E, D]."""
        plan = self._plan
        ffn = plan.layout.family.ffn(layer, self._weights, plan.layout.body).cast(plan.dtype)
        size = (plan.shape.num_experts, plan.layout.body.hidden_size)
        if self._is_written(layer):
            return blank_experts(ffn, plan.shape), Weight.filled(size, 0.0, plan.dtype)
        with self._products():
            made = self._make(layer, ffn)
        assignment = self._method.assigned(made.grouping, plan.target, plan.shape.without_nulls)
        experts = edited(
            gather((made.ffn,), assignment), self._method.edits, self._method.seed, layer
        )
        nulls = (zero_expert(plan.layout.body, plan.shape, plan.dtype),) * plan.shape.null_experts
        experts = Experts(experts.routed + nulls, experts.shared, made.bias_E)
        return experts, Weight.of(made.router_ED, plan.dtype)

    def _alone(self, named: Named) -> dict[str, Weight]:
        """Return tensors by the names that the decoder alone has for them."""
        return {self._plan.target.alone(name): weight for name, weight in named}

    def _make(self, layer: int, ffn: Ffn) -> Made:
        plan, seed = self._plan, self._method.layer_seed(layer)
        neurons = Neurons.of(ffn, self._device)
        sample = self._sample(layer, neurons)
        with exact_products(self._device):
            grouping = self._method.group(plan.shape.without_nulls, layer, neurons, sample)
            rows_ED = self._rows(layer, neurons, grouping, sample.x_TD)
        stored_ED = rows_ED.to(torch_dtype(plan.dtype)).float()
        bias_E, scoring = self._bias(stored_ED, sample.x_TD), plan.target.scoring
        self._found[layer] = routed(stored_ED, sample.x_TD, plan.shape, 1, bias_E, scoring)
        top_k = plan.shape.top_k
        carved = Carved.of(neurons, grouping, stored_ED, top_k, bias_E, scoring)
        with part_products(self._device):
            for edit in self._method.edits:
                if isinstance(edit, Fit):
                    carved = edit.fit(carved, sample, seed)
        part = slice(0, None, max(1, len(sample.x_TD) // MEASURED))
        given_TD = carved(sample.x_TD[part])
        self._local_errors[layer] = relative_error(given_TD, sample.target_TD[part])
        stored = _stored(carved.neurons, ffn)
        return Made(stored, grouping, rows_ED.cpu(), None if bias_E is None else bias_E.cpu())

    def _sample(self, layer: int, neurons: Neurons) -> FfnSample:
        """Bring both streams to a layer; return what its FFN receives and should give."""
        dense_TD = self._dense.reach(layer)
        x_TD = self._converted.enter(layer, self._rest[layer])

        def given_TD() -> torch.Tensor:
            import torch

            parts = portions(dense_TD, len(neurons.gate_FD))
            return torch.cat([neurons.hidden(part_TD) @ neurons.down_DF.T for part_TD in parts])

        gain = self._converted.gain
        if gain is None:
            target_TD = given_TD()
        else:
            target_TD = self._missing_TD(layer).div_(gain).to(self._device)
        gradient = self._gradients.loaders[layer] if self._gradients.loaders else None
        row = self._inputs.data_BT.shape[1]
        learned = self._learned.groups[layer] if self._learned else None
        return FfnSample(x_TD, dense_TD, target_TD, row, gradient, given_TD, learned)

    def _wanted_TD(self, layer: int) -> torch.Tensor:
        """Return what the converted stream should be after a layer, fp32 [T, D]."""
        divisor = self._plan.target.stream_divisor(layer)
        states_TD = self._dense.states_TD
        return states_TD if divisor == 1 else states_TD / divisor

    def _missing_TD(self, layer: int) -> torch.Tensor:
        """Return what the converted stream lacks where the layer's FFN gives nothing."""
        import torch

        left_TD = self._converted.states_TD
        return torch.sub(self._wanted_TD(layer), left_TD, out=self._room.empty(*left_TD.shape))

    def _rows(
        self, layer: int, neurons: Neurons, grouping: Grouping, x_TD: torch.Tensor
    ) -> torch.Tensor:
        """Return the router's rows, scaled so that the chosen experts' weights are as wanted.

        Those of null experts are zero.
        """
        import torch

        router, plan = self._plan.recipe.router, self._plan
        seed = router.seed * 100_003 + layer
        if router.fitted:
            rows_ED = router.fit(neurons, grouping, x_TD, seed)
        else:
            size = (plan.shape.num_experts, plan.layout.body.hidden_size)
            rows_ED = router.rows(*size, layer, States(x_TD.cpu())).to(x_TD.device)
        rows_ED = router.scaled(rows_ED, x_TD, None)
        zeros_ED = rows_ED.new_zeros(plan.shape.null_experts, rows_ED.shape[1])
        return torch.cat([rows_ED, zeros_ED])

    def _bias(self, stored_ED: torch.Tensor, x_TD: torch.Tensor) -> torch.Tensor | None:
        """Return the selection bias of a layer whose router is stored so, fp32 [E], if any."""
        plan, router, shape = self._plan, self._plan.recipe.router, self._plan.shape
        if not router.steers:
            return None
        with exact_products(self._device):
            logits_TE = x_TD.float() @ stored_ED.T
        scores_TE = scored(logits_TE, plan.target.scoring)
        if router.balance is not None:
            return balancing_bias(scores_TE, shape.top_k, router.balance)
        return threshold_bias(scores_TE, shape.null_experts, shape.top_k, shape.used_k)

    def leave(self, layer: int | None, tensors: Named) -> None:
        """Run the converted stream through a layer that was written."""
        if layer is None:
            return
        with self._products():
            self._dense.reach(layer)
            with exact_products(self._device):
                self._converted.leave(layer, self._alone(tensors))
            self._errors[layer] = relative_error(self._converted.states_TD, self._wanted_TD(layer))

    def pass_over(self, layer: int | None, tensors: Named) -> None:
        """Measure the router of a layer that an earlier run wrote, for the report."""
        if layer not in self._plan.shape.moe_layers:
            return
        assert layer is not None
        with self._products():
            self._dense.reach(layer)
            x_TD = self._converted.enter(layer, self._rest[layer])
            target, named = self._plan.target, dict(tensors)
            bias = target.bias_name(layer)
            bias_E = None
            if self._plan.recipe.router.steers:
                assert bias is not None
                bias_E = named[bias].load().flatten().to(x_TD.device)
            rows_ED = named[target.router_name(layer)].load().float().to(x_TD.device)
            scoring = target.scoring
            self._found[layer] = routed(rows_ED, x_TD, self._plan.shape, 1, bias_E, scoring)

    @property
    def found(self) -> dict[int, Routed]:
        """What the routers do with the data, by layer."""
        return self._found

    @property
    def report(self) -> SplitReport:
        """How far the converted stream is from the dense one after every layer."""
        return SplitReport(
            layers=list(self._errors),
            stream_error=list(self._errors.values()),
            layer_error=[self._local_errors.get(layer) for layer in self._errors],
            learning=self._learned.report if self._learned else None,
        )

    def close(self) -> None:
        """Remove what was spilled to disk."""
        self._gradients.close()


class LayerGradients:
    """Loaders of every layer's gradients, and the folder in which they lie."""

    def __init__(self) -> None:
        """Begin with none."""
        self.loaders: tuple[Callable[[], torch.Tensor], ...] = ()
        self._files = contextlib.ExitStack()

    def folder(self, place: Path | None) -> Path:
        """Create a folder that is there until all is closed, in `place` or among temporary ones."""
        return Path(self._files.enter_context(tempfile.TemporaryDirectory(dir=place)))

    def close(self) -> None:
        """Remove the folder."""
        self._files.close()


def layer_gradients(local: Source, plan: Plan, ids_BT: torch.Tensor, device: str) -> LayerGradients:
    """Run the dense model backwards if the method asks for that."""
    found = LayerGradients()
    method = plan.recipe.experts
    if not isinstance(method, Split) or method.needs != "gradients":
        return found
    model = load_writer(local.folder).to(device)
    found.loaders = spill_gradients(
        model, plan.layout.family, ids_BT, found.folder(offload_folder(plan))
    )
    return found


def _stored(neurons: Neurons, like: Ffn) -> Ffn:
    """Return fitted values as a network that is stored as the old one."""
    return Ffn(
        Weight.of(neurons.gate_FD.cpu(), like.gate_FD.dtype),
        Weight.of(neurons.up_FD.cpu(), like.up_FD.dtype),
        Weight.of(neurons.down_DF.cpu(), like.down_DF.dtype),
        like.act,
    )
