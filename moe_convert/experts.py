"""Construction methods: which neurons of which checkpoint every expert takes.

Each method is one recipe node: its fields are the YAML, its validation and the algorithm. A method
returns an `Assignment`; weights are moved by `ffn.gather` alone.

D hidden size · F FFN neurons · E routed experts · N neurons per expert
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from moe_convert.ffn import Assignment

if TYPE_CHECKING:
    from moe_convert.targets import MoeShape, MoeTarget


class Method(BaseModel):
    """What every construction method says about itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    paper: ClassVar[str]
    summary: ClassVar[str]

    def expert_size(self, ffn_size: int) -> int:
        """Return the neurons N of one routed expert."""
        raise NotImplementedError

    def exact(self, target: MoeTarget, shape: MoeShape) -> bool:
        """Whether the result computes the dense function at step 0, whatever the router says."""
        raise NotImplementedError

    def assign(self, ffn_size: int, target: MoeTarget, shape: MoeShape) -> Assignment:
        """Return the neurons of every expert of one layer."""
        raise NotImplementedError


class Clone(Method):
    """Sparse upcycling (Komatsuzaki et al. 2022, arXiv 2212.05055): every expert is the dense FFN.

    The weights of the chosen experts add up to one, so the function is the dense one for any
    router. With shared experts the dense output is halved between them and the routed ones, where
    the paper has none.
    """

    method: Literal["clone"] = "clone"
    seed: int = Field(0, ge=0, description="Decides everything random in the experts.")

    paper: ClassVar[str] = "arXiv 2212.05055"
    summary: ClassVar[str] = "copy the dense FFN into every expert"

    def expert_size(self, ffn_size: int) -> int:
        """A clone is as wide as the FFN."""
        return ffn_size

    def exact(self, target: MoeTarget, shape: MoeShape) -> bool:
        """Exact where the selected experts' weights add up to a constant."""
        return target.weights_sum

    def assign(self, ffn_size: int, target: MoeTarget, shape: MoeShape) -> Assignment:
        """Give every expert all neurons; shared copies stand side by side."""
        import torch

        all_F = torch.arange(ffn_size)
        sources = (0,) * shape.num_experts
        if not shape.shared_size:
            return Assignment(all_F.expand(shape.num_experts, -1), None, sources)
        copies = shape.shared_size // ffn_size
        return Assignment(
            routed_EN=all_F.expand(shape.num_experts, -1),
            shared_N=all_F.repeat(copies),
            source_E=sources,
            routed_scale=0.5 if target.scale_key is None else 1.0,
            shared_scale=0.5 / copies / target.shared_weight,
        )

    def routed_scale(self, target: MoeTarget, shared_size: int) -> float:
        """Return what the target's scaling key must hold."""
        return 0.5 if shared_size and target.scale_key else 1.0


ExpertsNode = Clone
"""The union of all construction methods; a recipe's `experts.method` picks one."""

METHODS: dict[str, type[Method]] = {"clone": Clone}
"""Construction methods by name."""
