"""Construction methods: which neurons of which checkpoint every expert takes.

Each method is one recipe node: its fields are the YAML, its validation and the algorithm. A method
returns an `Assignment`; weights are moved by `ffn.gather` alone.

D hidden size · F FFN neurons · E routed experts · N neurons per expert
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from moe_convert.edits import EditNode
from moe_convert.errors import UsageError
from moe_convert.ffn import Assignment

if TYPE_CHECKING:
    import torch

    from moe_convert.targets import MoeShape, MoeTarget


class Method(BaseModel):
    """What every construction method says about itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")

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


class Clone(Method):
    """Sparse upcycling (Komatsuzaki et al. 2022, arXiv 2212.05055): every expert is the dense FFN.

    The weights of the chosen experts add up to one, so the function is the dense one for any
    router. With granularity G (virtual groups, He et al. 2024, arXiv 2410.07524) each copy is cut
    into G experts that share a router row, so that top-k, a multiple of G, takes whole copies; the
    lost factor G goes on up and down (or into the target's scaling key), where the FFN is
    homogeneous: the paper's cube root on gate, up and down is not exact for gated FFNs. With shared
    experts the dense output is halved between them and the routed ones, where the papers have none.
    `shuffle` permutes the neurons of every copy before it is cut (Qwen2, arXiv 2407.10671).
    """

    method: Literal["clone"] = "clone"
    granularity: int = Field(1, ge=1, description="experts that one copy of the FFN is cut into")
    shuffle: bool = Field(False, description="permute the neurons of every copy before the cut")

    paper: ClassVar[str] = "arXiv 2212.05055"
    summary: ClassVar[str] = "copy the dense FFN into every expert, or every group of G experts"

    @property
    def shared_rows(self) -> int:
        """The experts of one copy share a row."""
        return self.granularity

    def expert_size(self, ffn_size: int, num_units: int) -> int:
        """A copy of the FFN is cut into equal parts.

        Raises:
            UsageError: the FFN does not divide evenly.
        """
        if ffn_size % self.granularity:
            raise UsageError(
                f"An FFN of {ffn_size} neurons cannot be cut into {self.granularity} equal parts.",
                f"Choose a granularity that divides {ffn_size}.",
            )
        return ffn_size // self.granularity

    def check(self, ffn_size: int, target: MoeTarget, shape: MoeShape) -> None:
        """Make sure that whole copies are chosen.

        Raises:
            UsageError: experts, top-k, shared experts or groups are no whole copies.
        """
        parts = self.granularity
        if parts > 1 and target.fixed_top_k:
            raise UsageError(
                f"The router of {target.model_type} shares weights between experts that tie, "
                "as the parts of one copy do.",
                "Use --granularity 1.",
            )
        counts = {"--experts": shape.num_experts, "--top-k": shape.top_k}
        for option, count in counts.items():
            if count % parts:
                raise UsageError(
                    f"{option} {count} is not a multiple of the granularity {parts}: a token would "
                    "use part of a copy, and the dense function would be lost."
                )
        if shape.shared_size % ffn_size:
            raise UsageError(
                f"{shape.num_shared} shared experts of {shape.expert_size} neurons are no whole "
                f"copies of an FFN of {ffn_size}.",
                f"Use a multiple of {parts} for --shared-experts.",
            )
        if (shape.num_experts // shape.num_groups) % parts:
            raise UsageError(
                f"{shape.num_groups} groups would cut a copy of the FFN in two.",
                f"Use groups whose size is a multiple of the granularity {parts}.",
            )

    def preserves(self, target: MoeTarget, shape: MoeShape, neutral_router: bool) -> bool:
        """Exact where the selected experts' weights add up to a constant."""
        return target.weights_sum is not None

    def routed_scale(self, target: MoeTarget, shape: MoeShape) -> float:
        """Undo the constant sum and the cut; with shared experts the routed ones give one half."""
        half = 0.5 if shape.shared_size else 1.0
        return half * self.granularity / (target.weights_sum or 1.0)

    def assign(self, ffn_size: int, target: MoeTarget, shape: MoeShape, layer: int) -> Assignment:
        """Give every copy all neurons, part by part; shared copies stand side by side."""
        import torch

        copies = [
            self._order(ffn_size, layer, replica)
            for replica in range(shape.num_experts // self.granularity)
        ]
        num_shared = shape.shared_size // ffn_size
        scale = _outside_config(self.routed_scale(target, shape), target)
        up_scale = _half_of(self.granularity) if target.scale_key is None else 1.0
        return Assignment(
            routed_EN=torch.stack(copies).view(shape.num_experts, -1),
            shared_N=torch.arange(ffn_size).repeat(num_shared),
            source_E=(0,) * shape.num_experts,
            routed_scale=scale / up_scale,
            up_scale=up_scale,
            shared_scale=0.5 / max(num_shared, 1) / target.shared_weight,
        )

    def _order(self, ffn_size: int, layer: int, replica: int) -> torch.Tensor:
        import torch

        if not self.shuffle:
            return torch.arange(ffn_size)
        seed = (self.seed * 1_009 + layer) * 100_003 + replica
        return torch.randperm(ffn_size, generator=torch.Generator().manual_seed(seed))


class SharedResidual(Clone):
    """The dense FFN stays as the shared expert; the routed ones start as clones adding nothing.

    Their `down` is zero, so the function is exact for any router, any top-k and any target with
    shared experts, and they learn a residual. Composed from the shared-expert designs of
    DeepSeekMoE (Dai et al. 2024, arXiv 2401.06066) and zero-initialised branches; no paper has
    just this.
    """

    method: Literal["shared-residual"] = "shared-residual"  # type: ignore[assignment]

    paper: ClassVar[str] = "arXiv 2401.06066"
    summary: ClassVar[str] = "keep the dense FFN as shared expert, routed experts start at zero"

    def shared_size(self, ffn_size: int, expert_size: int, shared_experts: int) -> int:
        """The shared expert is the whole FFN."""
        return ffn_size

    def preserves(self, target: MoeTarget, shape: MoeShape, neutral_router: bool) -> bool:
        """Nothing is added to the shared expert at step 0."""
        return True

    def check(self, ffn_size: int, target: MoeTarget, shape: MoeShape) -> None:
        """Any count will do: no copy has to be whole."""

    def routed_scale(self, target: MoeTarget, shape: MoeShape) -> float:
        """The routed experts add nothing as it is; once trained they count as they come."""
        return 1.0

    def assign(self, ffn_size: int, target: MoeTarget, shape: MoeShape, layer: int) -> Assignment:
        """Give the shared expert everything and the routed ones a zero `down`."""
        import torch

        per_copy = -(-shape.num_experts // self.granularity)
        orders = [self._order(ffn_size, layer, replica) for replica in range(per_copy)]
        routed_EN = torch.cat(orders).view(-1, shape.expert_size)[: shape.num_experts]
        return Assignment(
            routed_EN=routed_EN,
            shared_N=torch.arange(ffn_size),
            source_E=(0,) * shape.num_experts,
            routed_scale=0.0,
            shared_scale=1.0 / target.shared_weight,
        )


class Split(Method):
    """Carve the FFN: each neuron goes to one expert (MoEfication, Zhang et al. 2021, 2110.01786).

    The sum over all experts is the dense FFN, so with every expert chosen and a neutral router the
    function is exact; with fewer it is not.
    """

    method: Literal["split"] = "split"
    strategy: Literal["contiguous", "random"] = Field(
        "contiguous", description="which neurons go together"
    )
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

    def preserves(self, target: MoeTarget, shape: MoeShape, neutral_router: bool) -> bool:
        """Exact when every expert is chosen with the same weight."""
        equal = neutral_router or target.fixed_top_k is not None
        return equal and shape.top_k == shape.num_experts

    def routed_scale(self, target: MoeTarget, shape: MoeShape) -> float:
        """Make every chosen expert count once."""
        return 1.0 / target.neutral(replace(shape, routed_scale=1.0))

    def assign(self, ffn_size: int, target: MoeTarget, shape: MoeShape, layer: int) -> Assignment:
        """Deal out the neurons: the first ones are shared."""
        import torch

        order_F = torch.arange(ffn_size)
        if self.strategy == "random":
            seed = self.seed * 1_009 + layer
            order_F = torch.randperm(ffn_size, generator=torch.Generator().manual_seed(seed))
        return Assignment(
            routed_EN=order_F[shape.shared_size :].view(shape.num_experts, -1),
            shared_N=order_F[: shape.shared_size],
            source_E=(0,) * shape.num_experts,
            routed_scale=_outside_config(self.routed_scale(target, shape), target),
            shared_scale=1.0 / target.shared_weight,
        )


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
            routed_scale=_outside_config(self.routed_scale(target, shape), target),
            shared_scale=shared / max(num_shared, 1) / target.shared_weight,
        )


def _half_of(factor: int) -> float:
    """Return the part of a factor that `up` takes, `down` takes the rest.

    Powers of two are shared out as powers of two, which no stored dtype rounds.
    """
    if factor & (factor - 1) == 0:
        return float(1 << ((factor.bit_length() - 1) // 2))
    return math.sqrt(factor)


def _outside_config(scale: float, target: MoeTarget) -> float:
    """Return the factor that `down` must absorb: all of it where the config has no key for it."""
    return scale if target.scale_key is None else 1.0


ExpertsNode = Annotated[Clone | SharedResidual | Split | Compose, Field(discriminator="method")]
"""The union of all construction methods; a recipe's `experts.method` picks one."""

METHODS: dict[str, type[Method]] = {
    "clone": Clone,
    "shared-residual": SharedResidual,
    "split": Split,
    "compose": Compose,
}
"""Construction methods by name."""
