"""The converted model's stream, through the target's own layer class.

B rows · T tokens · D hidden size
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moe_convert.checkpoint.names import loaded_names
from moe_convert.ffn import Weight, torch_dtype
from moe_convert.streams.base import Stream, skeleton, states_of
from moe_convert.streams.room import Room

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

ROUTER = "router"
"""What a router is called that is not part of the FFN module but stands beside it in the layer."""

FFN_TOKENS = {"cpu": 2048, "cuda": 8192}
"""Tokens that go through experts at once, each as often as it has experts."""


class ConvertedStream(Stream):
    """The converted model's hidden states, run with the tensors that were made so far.

    `enter` runs a layer without its FFN and says what that will receive; once the experts are made
    `leave` adds what they give. Where the layer adds the FFN's output, times a constant, to its
    stream, `gain` is that constant, and nothing is computed twice.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        around: Mapping[str, Weight],
        ids: torch.Tensor | Sequence[torch.Tensor],
        device: str = "cpu",
        token_tables: tuple[str, ...] = (),
        room: Room | None = None,
    ) -> None:
        """Embed the token ids; `around` are the tensors outside the layers, as they are stored."""
        model = skeleton(config)
        if device == "cpu":  # where one expert after the other is faster than all in one product
            model.set_experts_implementation("eager")
        names = loaded_names(model.config, around)
        weights = {loaded: around[stored] for stored, loaded in names.items()}
        super().__init__(model, _layers_of(model), weights, ids, token_tables, device, room)
        self._entered = False
        self.gain: float | None = None

    def enter(self, layer: int, tensors: Mapping[str, Weight]) -> torch.Tensor:
        """Run a layer without its FFN; return what this receives, fp32 [T, D].

        `tensors` are the layer's others, as they are stored. Where there is a gain, the states are
        then those after the layer as if its FFN gave nothing. The next layer overwrites both.
        """
        self._load(tensors)
        module = self._layers[layer]
        names = {n.split(".")[0] for n, p in module.named_parameters() if p.is_meta}
        replaced = {name: module.get_submodule(name) for name in sorted(names)}
        probes = _probes(list(replaced))
        first = next(iter(probes.values()))
        for name, probe in probes.items():
            module.set_submodule(name, probe)
        for batch, states_BTD in enumerate(self.states):
            left_BTD = self._run(layer, batch)
            self._keep(batch, first.seen)
            if batch == 0:
                self.gain = self._gain(layer, first, left_BTD)
            if self.gain is not None:
                states_BTD.copy_(left_BTD)
        for name, old in replaced.items():
            module.set_submodule(name, old)
        self._ffns, self._entered = list(replaced), True
        return self.received_TD

    def _gain(self, layer: int, probe: Any, left_BTD: torch.Tensor) -> float | None:
        """Return what the layer multiplies its FFN's output by; None if it does more than that.

        `left_BTD` is what it makes of the first batch where the FFN gives nothing.
        """
        probe.gives = left_BTD.roll(1, dims=-1).flip(dims=(1,))
        moved_BTD = self._run(layer, 0) - left_BTD
        gain = float((moved_BTD * probe.gives).sum() / probe.gives.square().sum())
        wrong = (moved_BTD - gain * probe.gives).norm() / probe.gives.norm()
        probe.gives = None
        probe.seen.clear()
        return gain if float(wrong) < 1e-3 * abs(gain) else None

    def ffns(self, layer: int, tensors: Mapping[str, Weight]) -> dict[str, torch.nn.Module]:
        """Load the FFN of the layer that was entered; return its modules by name in the model."""
        self._load(tensors)
        prefix = f"{self._at}.{layer}"
        return {f"{prefix}.{n}": self._layers[layer].get_submodule(n) for n in self._ffns}

    def leave(self, layer: int, tensors: Mapping[str, Weight]) -> None:
        """Run on with the whole layer, whose `tensors` are as they are stored."""
        import torch

        self._load(tensors)
        module = self._layers[layer]
        if self._entered and self.gain is not None:
            ffns = [module.get_submodule(name) for name in self._ffns]
            size = FFN_TOKENS[self._device]
            parts = (self._received_TD.split(size), self.states_TD.split(size))
            for x_TD, states_TD in zip(*parts, strict=True):
                x_BTD = x_TD.unsqueeze(0).to(self._device)
                with torch.no_grad():
                    given_BTD = sum(states_of(ffn(x_BTD)) for ffn in ffns)
                states_TD.add_(given_BTD.squeeze(0).to(states_TD.device), alpha=self.gain)
        else:
            for batch, states_BTD in enumerate(self.states):
                states_BTD.copy_(self._run(layer, batch))
        self._entered = False
        module.to("meta")

    def _load(self, tensors: Mapping[str, Weight]) -> None:
        """Load tensors of the files into the model as `from_pretrained` would, rounded, in fp32."""
        import torch
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        state = {
            name: weight.load().to(torch_dtype(weight.dtype)).to(self._device).float()
            for name, weight in tensors.items()
        }
        config = LoadStateDictConfig(
            weight_mapping=get_model_conversion_mapping(self._model),
            device_map={"": self._device},
            dtype=torch.float32,
        )
        convert_and_load_state_dict_in_model(self._model, state, config)


def _probes(names: list[str]) -> dict[str, Any]:
    """Return modules in place of a layer's FFN: the first keeps what it gets, all give nothing.

    A router that the layer itself calls gives three nothings, which go to the experts.
    """
    import torch

    class Probe(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[torch.Tensor] = []
            self.gives: torch.Tensor | None = None

        def forward(self, x_BTD: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            self.seen.append(x_BTD)
            return torch.zeros_like(x_BTD) if self.gives is None else self.gives.view_as(x_BTD)

    class Chooser(torch.nn.Module):
        def forward(self, x_TD: torch.Tensor) -> tuple[None, None, None]:
            return None, None, None

    return {name: Chooser() if name == ROUTER else Probe() for name in names}


def _layers_of(model: PreTrainedModel) -> str:
    """Return where a model has its decoder layers."""
    import torch

    number = model.config.get_text_config().num_hidden_layers
    names = (
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == number
    )
    return str(next(names))
