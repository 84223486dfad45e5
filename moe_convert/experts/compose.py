"""Experts that come from several checkpoints.

F FFN neurons · E routed experts
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from moe_convert.errors import UsageError
from moe_convert.experts.base import Method, outside_config
from moe_convert.ffn import Assignment

if TYPE_CHECKING:
    from moe_convert.targets import MoeShape, MoeTarget


class ComposeSource(BaseModel):
    """One checkpoint, or LoRA adapter of the base, whose FFNs become experts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(description="as source.model, or the folder of a LoRA adapter of the base")
    revision: str = Field("main", description="branch, tag or commit; the commit is recorded")
    prompts: tuple[str, ...] = Field((), description="texts that this expert is meant for")
    negative_prompts: tuple[str, ...] = Field((), description="texts that it is not meant for")
    scale: float = Field(1.0, description="what its output is multiplied by")


class Compose(Method):
    """Branch-Train-MiX (Sukhbaatar et al. 2024, arXiv 2403.07816): experts of several models.

    Expert e is the FFN of source e, and with more experts than sources the sources repeat in order.
    Everything else comes from the base, or is averaged over the sources as in the paper, which
    lists the base among them if it is to be an expert too. The function is that of no source, so
    the routers have to learn who does what; nothing is exact unless all sources are the base. With
    shared experts the base's FFN is always on and gives one half, the routed ones the other, where
    the paper has none; with `shared_scale` it counts that much and the routed ones in full.
    """

    method: Literal["compose"] = "compose"
    sources: tuple[ComposeSource, ...] = Field(min_length=1, description="one per expert")
    attention: Literal["base", "average"] = Field(
        "base", description="where everything but the FFNs comes from"
    )
    shared_scale: float | None = Field(
        None, description="what the shared expert counts when the routed ones count in full"
    )

    paper: ClassVar[str] = "arXiv 2403.07816"
    summary: ClassVar[str] = "take each expert from another checkpoint or LoRA adapter"

    @property
    def num_experts(self) -> int | None:
        """As many as there are sources, unless the recipe says otherwise."""
        return len(self.sources)

    def expert_size(self, ffn_size: int, num_units: int) -> int:
        """Each expert is a whole FFN."""
        return ffn_size

    def source_of(self, expert: int) -> int:
        """Return which source an expert comes from."""
        return expert % len(self.sources)

    def check(self, ffn_size: int, target: MoeTarget, shape: MoeShape) -> None:
        """Make sure that every source gives equally many experts.

        Raises:
            UsageError: it does not, or a scale has nothing to multiply.
        """
        if shape.num_experts % len(self.sources):
            raise UsageError(
                f"{len(self.sources)} sources cannot give {shape.num_experts} experts equally.",
                f"Use --experts {len(self.sources)} or a multiple of it, or leave it out.",
            )
        if self.shared_scale is not None and not shape.shared_size:
            raise UsageError(
                "experts.shared_scale has no effect without shared experts.",
                "Use --shared-experts 1.",
            )

    def preserves(self, target: MoeTarget, shape: MoeShape, neutral_router: bool) -> bool:
        """Exact if the sources are all the base, which the plan knows, and nothing is scaled."""
        scaled = self.shared_scale is not None or any(s.scale != 1.0 for s in self.sources)
        return target.weights_sum is not None and not scaled

    def routed_scale(self, target: MoeTarget, shape: MoeShape) -> float:
        """Undo the constant sum; beside a shared expert without a scale of its own, one half."""
        half = 0.5 if shape.shared_size and self.shared_scale is None else 1.0
        return half / (target.weights_sum or 1.0)

    def assign(self, ffn_size: int, target: MoeTarget, shape: MoeShape, layer: int) -> Assignment:
        """Give expert e all neurons of source e; source 0 of the assignment is the base."""
        import torch

        num_shared = shape.shared_size // ffn_size
        shared = 0.5 if self.shared_scale is None else self.shared_scale
        return Assignment(
            routed_EN=torch.arange(ffn_size).expand(shape.num_experts, -1),
            shared_N=torch.arange(ffn_size).repeat(num_shared),
            source_E=tuple(1 + self.source_of(e) for e in range(shape.num_experts)),
            routed_scale=outside_config(self.routed_scale(target, shape), target),
            shared_scale=shared / max(num_shared, 1) / target.shared_weight,
        )
