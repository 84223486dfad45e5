"""The converted model's stream, through the target's own layer class.

B rows · T tokens · D hidden size
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moe_convert.checkpoint.names import loaded_names
from moe_convert.ffn import Weight, torch_dtype
from moe_convert.streams.base import Stream, flat, skeleton

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

ROUTER = "router"
"""What a router is called that is not part of the FFN module but stands beside it in the layer."""

FFN_TOKENS = 16_384
"""Tokens that go through experts at once."""


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
    ) -> None:
        """Embed the token ids; `around` are the tensors outside the layers, as they are stored."""
        model = skeleton(config)
        names = loaded_names(model.config, around)
        weights = {loaded: around[stored] for stored, loaded in names.items()}
        super().__init__(model, _layers_of(model), weights, ids, token_tables, device)
        self._left: list[torch.Tensor] = []
        self._received: list[torch.Tensor] = []
        self.gain: float | None = None

    def enter(self, layer: int, tensors: Mapping[str, Weight]) -> torch.Tensor:
        """Run a layer without its FFN; return what this receives, fp32 [T, D].

        `tensors` are the layer's others, as they are stored.
        """
        self._load(tensors)
        module = self._layers[layer]
        names = {n.split(".")[0] for n, p in module.named_parameters() if p.is_meta}
        replaced = {name: module.get_submodule(name) for name in sorted(names)}
        probes = _probes(list(replaced))
        first = next(iter(probes.values()))
        for name, probe in probes.items():
            module.set_submodule(name, probe)
        self._left = [self._run(layer, batch) for batch in range(len(self.states))]
        self._received = list(first.seen)
        self.gain = self._gain(layer, first)
        for name, old in replaced.items():
            module.set_submodule(name, old)
        self._ffns = list(replaced)
        return flat(self._received)

    def _gain(self, layer: int, probe: Any) -> float | None:
        """Return what the layer multiplies its FFN's output by; None if it does more than that."""
        left_BTD = self._left[0]
        probe.gives = left_BTD.roll(1, dims=-1).flip(dims=(1,))
        moved_BTD = self._run(layer, 0) - left_BTD
        gain = float((moved_BTD * probe.gives).sum() / probe.gives.square().sum())
        wrong = (moved_BTD - gain * probe.gives).norm() / probe.gives.norm()
        probe.gives = None
        return gain if float(wrong) < 1e-3 * abs(gain) else None

    @property
    def left_TD(self) -> torch.Tensor:
        """The stream after the layer as if its FFN gave nothing, fp32 [T, D]."""
        return flat(self._left)

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
        if self._left and self.gain is not None:
            ffns = [module.get_submodule(name) for name in self._ffns]
            x_TD = flat(self._received)
            with torch.no_grad():
                given = [
                    sum(_first(ffn(part_TD.unsqueeze(0))) for ffn in ffns).squeeze(0)
                    for part_TD in x_TD.split(FFN_TOKENS)
                ]
            parts = torch.cat(given).split([left.shape[0] * left.shape[1] for left in self._left])
            self.states = [
                left.add_(part_TD.view_as(left), alpha=self.gain)
                for left, part_TD in zip(self._left, parts, strict=True)
            ]
        else:
            for batch in range(len(self.states)):
                self.states[batch] = self._run(layer, batch)
        self._left, self._received = [], []
        module.to("meta")

    def _load(self, tensors: Mapping[str, Weight]) -> None:
        """Load tensors of the files into the model as `from_pretrained` would, rounded, in fp32."""
        import torch
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig

        state = {
            name: weight.load().to(torch_dtype(weight.dtype)).float()
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


def _first(result: Any) -> torch.Tensor:
    """Return the states of a module that may give router logits beside them."""
    states: torch.Tensor = result[0] if isinstance(result, tuple) else result
    return states


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
