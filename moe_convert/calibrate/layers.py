"""Both models a layer at a time: what every MoE layer receives, and the dense FFN it is to match.

B rows · T tokens · D hidden size
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from moe_convert.calibrate.job import Job
from moe_convert.calibrate.models import modules_of, target_of
from moe_convert.checkpoint import open_source, read_folder
from moe_convert.checkpoint.names import full_config, loaded_names
from moe_convert.checkpoint.source import read_config
from moe_convert.errors import UsageError
from moe_convert.families import find_family, layer_name
from moe_convert.ffn import Weight
from moe_convert.streams import ConvertedStream, skeleton
from moe_convert.training.batches import order

if TYPE_CHECKING:
    from accelerate import Accelerator

Weights = Mapping[str, Weight]


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
    def moe_layers(self) -> list[int]:
        """The numbers of those that have experts."""
        routers = modules_of(self.model, self.target.router_module)
        numbers = (_layer_of(f".{name}.") for name, _ in routers)
        return [number for number in numbers if number is not None]

    @property
    def model(self) -> torch.nn.Module:
        """The converted model, all but empty."""
        return self.stream._model


def _layer_of(name: str) -> int | None:
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else None


def used_rows(job: Job, num_rows: int) -> list[int]:
    """Return the rows that the steps of a layer get to, in rising order; others are left out."""
    count = min(num_rows, job.steps * job.batch_size)
    return sorted(order(num_rows, 0, count, job.section.seed))
