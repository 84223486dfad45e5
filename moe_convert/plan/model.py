"""What a plan consists of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_convert.checkpoint import Shard, Source, TensorSpec
from moe_convert.compose import ExpertSource
from moe_convert.devices import DeviceRow, device_rows
from moe_convert.families import Body, DenseFamily
from moe_convert.recipe import Recipe
from moe_convert.targets import MoeShape, MoeTarget


@dataclass(frozen=True)
class Note:
    """A warning: a stable code, one sentence, the remedy."""

    code: str
    message: str
    hint: str = ""


@dataclass(frozen=True)
class Estimate:
    """What the conversion will take; sizes in bytes, times in seconds (shortest, longest)."""

    download_bytes: int
    disk_bytes: int
    free_disk_bytes: int
    ram_bytes: int
    verify_ram_bytes: int
    free_ram_bytes: int
    time_s: tuple[float, float]

    @property
    def fits(self) -> bool:
        """Whether disk and memory suffice for the conversion."""
        return self.disk_bytes <= self.free_disk_bytes and self.ram_bytes <= self.free_ram_bytes

    @property
    def verify_fits(self) -> bool:
        """Whether the result can be loaded here to be compared with the dense model."""
        return self.verify_ram_bytes <= self.free_ram_bytes


@dataclass(frozen=True)
class Step:
    """A group of tensors that is written together: one decoder layer, or what lies around them."""

    name: str
    layer: int | None
    specs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class Layout:
    """What decides names, shapes and dtypes of the result.

    With `as_stored` a tensor that the source holds in a wider dtype than the rest keeps it.
    """

    family: DenseFamily
    body: Body
    target: MoeTarget
    shape: MoeShape
    dtype: str
    untie: bool
    as_stored: bool = False

    @property
    def text_config(self) -> dict[str, Any]:
        """The config of the result's decoder alone, without what may lie around it."""
        values = MoeTarget.config(self.target, self.body, self.shape, self.untie)
        return {"model_type": self.target.text_model_type, **values}


@dataclass(frozen=True)
class Plan:
    """A resolved conversion.

    Where a measurement decides which layers stay dense, this is the plan for none of them, and
    `densest` the one for as many as there can be.
    """

    recipe: Recipe
    source: Source
    layout: Layout
    config: Mapping[str, Any]
    output: Path
    steps: tuple[Step, ...]
    shards: tuple[Shard, ...]
    refused: Mapping[str, list[str]]
    params_active: int
    estimate: Estimate
    warnings: tuple[Note, ...]
    experts: tuple[ExpertSource, ...] = ()
    densest: Plan | None = None

    @property
    def target(self) -> MoeTarget:
        """The architecture of the result."""
        return self.layout.target

    @property
    def shape(self) -> MoeShape:
        """Number and size of the experts."""
        return self.layout.shape

    @property
    def dtype(self) -> str:
        """How weights are stored."""
        return self.layout.dtype

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """Every tensor of the result, in the order of writing."""
        return tuple(spec for step in self.steps for spec in step.specs)

    @property
    def params_total(self) -> int:
        """Parameters of the result."""
        return sum(count(spec.shape) for spec in self.specs)

    @property
    def params_dense(self) -> int:
        """Parameters of the source."""
        return sum(count(ref.shape) for ref in self.source.tensors.values())

    @property
    def exact(self) -> bool:
        """Whether the result must compute the dense function before any training."""
        neutral = self.recipe.router.kind == "zeros"
        unchanged = all(expert.same_as(self.source) for expert in self.experts)
        return unchanged and self.recipe.experts.exact(self.target, self.shape, neutral)

    @property
    def devices(self) -> tuple[DeviceRow, ...]:
        """What the result asks of several devices, by their number."""
        routed = [spec for spec in self.specs if self.target.is_routed(spec.name)]
        return device_rows(
            self.layout.body,
            self.shape,
            self.dtype,
            total_bytes=sum(spec.num_bytes for spec in self.specs),
            routed_bytes=sum(spec.num_bytes for spec in routed),
        )

    @property
    def engines(self) -> dict[str, tuple[str, ...]]:
        """Each engine's known traps for these files."""
        return {e.name: e.notes(self.layout.body, self.shape) for e in self.target.engines}


def count(shape: tuple[int, ...]) -> int:
    """Return the number of elements."""
    product = 1
    for size in shape:
        product *= size
    return product


GROUPED_MM_BYTES = 16
"""What the rows of grouped matrix products must be multiples of."""


def bits(dtype: str) -> int:
    """Return the bits of an element, as far as alignment and rounding ask."""
    return {"F32": 32, "F64": 64}.get(dtype, 16)
