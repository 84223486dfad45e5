"""What every construction method says about itself.

D hidden size · F FFN neurons · E routed experts · N neurons per expert
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from moe_convert.edits import EditNode
from moe_convert.ffn import Assignment

if TYPE_CHECKING:
    import torch

    from moe_convert.targets import MoeShape, MoeTarget


DEFAULT_TAGS = {"method": "clone", "strategy": "contribution"}
"""What a recipe means that leaves out one of the fields which tell the nodes apart."""


def _with_tags(schema: dict[str, Any]) -> None:
    """Require the tags whose default is another node's, so that a schema fits one node alone."""
    found = {tag: schema["properties"].get(tag, {}).get("const") for tag in DEFAULT_TAGS}
    needed = [tag for tag, const in found.items() if const not in {None, DEFAULT_TAGS[tag]}]
    schema["required"] = [*schema.get("required", ()), *needed]


class Method(BaseModel):
    """What every construction method says about itself."""

    model_config = ConfigDict(frozen=True, extra="forbid", json_schema_extra=_with_tags)

    edits: tuple[EditNode, ...] = Field((), description="changes of the values, in order")
    seed: int = Field(0, ge=0, description="decides everything random in the experts")

    paper: ClassVar[str]
    summary: ClassVar[str]

    def expert_size(self, ffn_size: int, num_units: int) -> int:
        """Return the neurons N of one routed expert, of `num_units` routed and shared ones."""
        raise NotImplementedError

    def shared_size(self, ffn_size: int, expert_size: int, shared_experts: int) -> int:
        """Return the neurons of the shared expert."""
        return shared_experts * expert_size

    def check(self, ffn_size: int, target: MoeTarget, shape: MoeShape) -> None:
        """Refuse counts that this method cannot make.

        Raises:
            UsageError: with the reason.
        """

    def exact(self, target: MoeTarget, shape: MoeShape, neutral_router: bool) -> bool:
        """Whether the result computes the dense function at step 0."""
        return self.preserves(target, shape, neutral_router) and all(e.neutral for e in self.edits)

    def preserves(self, target: MoeTarget, shape: MoeShape, neutral_router: bool) -> bool:
        """Whether the assignment alone keeps the dense function."""
        raise NotImplementedError

    def routed_scale(self, target: MoeTarget, shape: MoeShape) -> float:
        """Return what the routed experts' output is multiplied by to keep the function."""
        raise NotImplementedError

    def assign(self, ffn_size: int, target: MoeTarget, shape: MoeShape, layer: int) -> Assignment:
        """Return the neurons of every expert of one layer."""
        raise NotImplementedError

    @property
    def shared_rows(self) -> int:
        """How many consecutive experts share one router row."""
        return 1

    @property
    def num_experts(self) -> int | None:
        """The number of experts that the method itself asks for."""
        return None


def repeated(ffn_size: int, times: int) -> torch.Tensor | range:
    """Return all neurons as often as they are wanted."""
    if times <= 1:
        return range(ffn_size * times)
    import torch

    return torch.arange(ffn_size).repeat(times)


def outside_config(scale: float, target: MoeTarget) -> float:
    """Return the factor that `down` must absorb: all of it where the config has no key for it."""
    return scale if target.scale_key is None else 1.0
