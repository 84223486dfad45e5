"""Construction methods: which neurons of which checkpoint every expert takes.

Each method is one recipe node: its fields are the YAML, its validation and the algorithm. A method
returns an `Assignment`; weights are moved by `ffn.gather` alone.

D hidden size · F FFN neurons · E routed experts · N neurons per expert
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from moe_convert.errors import UsageError
from moe_convert.ffn import Assignment

if TYPE_CHECKING:
    from moe_convert.targets import MoeShape, MoeTarget


class Method(BaseModel):
    """What every construction method says about itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    paper: ClassVar[str]
    summary: ClassVar[str]

    def expert_size(self, ffn_size: int, num_units: int) -> int:
        """Return the neurons N of one routed expert, of `num_units` routed and shared ones."""
        raise NotImplementedError

    def exact(self, target: MoeTarget, shape: MoeShape, neutral_router: bool) -> bool:
        """Whether the result computes the dense function at step 0."""
        raise NotImplementedError

    def routed_scale(self, target: MoeTarget, shape: MoeShape) -> float:
        """Return what the routed experts' output is multiplied by to keep the function."""
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

    def expert_size(self, ffn_size: int, num_units: int) -> int:
        """A clone is as wide as the FFN."""
        return ffn_size

    def exact(self, target: MoeTarget, shape: MoeShape, neutral_router: bool) -> bool:
        """Exact where the selected experts' weights add up to a constant."""
        return target.weights_sum is not None

    def routed_scale(self, target: MoeTarget, shape: MoeShape) -> float:
        """Undo the constant sum; with shared experts the routed ones give one half."""
        return (0.5 if shape.shared_size else 1.0) / (target.weights_sum or 1.0)

    def assign(self, ffn_size: int, target: MoeTarget, shape: MoeShape) -> Assignment:
        """Give every expert all neurons; shared copies stand side by side."""
        import torch

        all_F = torch.arange(ffn_size)
        copies = shape.shared_size // ffn_size
        return Assignment(
            routed_EN=all_F.expand(shape.num_experts, -1),
            shared_N=all_F.repeat(copies),
            source_E=(0,) * shape.num_experts,
            routed_scale=_outside_config(self.routed_scale(target, shape), target),
            shared_scale=0.5 / max(copies, 1) / target.shared_weight,
        )


class Split(Method):
    """Carve the FFN: each neuron goes to one expert (MoEfication, Zhang et al. 2021, 2110.01786).

    The sum over all experts is the dense FFN, so with every expert chosen and a neutral router the
    function is exact; with fewer it is not.
    """

    method: Literal["split"] = "split"
    strategy: Literal["contiguous", "random"] = Field(
        "contiguous", description="Which neurons go together."
    )
    seed: int = Field(0, ge=0, description="Decides everything random in the experts.")

    paper: ClassVar[str] = "arXiv 2110.01786"
    summary: ClassVar[str] = "cut the dense FFN into experts"

    def expert_size(self, ffn_size: int, num_units: int) -> int:
        """All units are equally wide.

        Raises:
            UsageError: the FFN does not divide evenly.
        """
        if ffn_size % num_units:
            raise UsageError(
                f"An FFN of {ffn_size} neurons cannot be cut into {num_units} equal experts.",
                f"Choose a divisor of {ffn_size} as routed + shared experts.",
            )
        return ffn_size // num_units

    def exact(self, target: MoeTarget, shape: MoeShape, neutral_router: bool) -> bool:
        """Exact when every expert is chosen with the same weight."""
        return neutral_router and shape.top_k == shape.num_experts

    def routed_scale(self, target: MoeTarget, shape: MoeShape) -> float:
        """Make every chosen expert count once."""
        return 1.0 / target.neutral(replace(shape, routed_scale=1.0))

    def assign(self, ffn_size: int, target: MoeTarget, shape: MoeShape) -> Assignment:
        """Deal out the neurons: the first ones are shared."""
        import torch

        order_F = torch.arange(ffn_size)
        if self.strategy == "random":
            order_F = torch.randperm(ffn_size, generator=torch.Generator().manual_seed(self.seed))
        return Assignment(
            routed_EN=order_F[shape.shared_size :].view(shape.num_experts, -1),
            shared_N=order_F[: shape.shared_size],
            source_E=(0,) * shape.num_experts,
            routed_scale=_outside_config(self.routed_scale(target, shape), target),
            shared_scale=1.0 / target.shared_weight,
        )


def _outside_config(scale: float, target: MoeTarget) -> float:
    """Return the factor that `down` must absorb: all of it where the config has no key for it."""
    return scale if target.scale_key is None else 1.0


ExpertsNode = Annotated[Clone | Split, Field(discriminator="method")]
"""The union of all construction methods; a recipe's `experts.method` picks one."""

METHODS: dict[str, type[Method]] = {"clone": Clone, "split": Split}
"""Construction methods by name."""
