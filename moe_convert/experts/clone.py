"""Experts that are copies of the dense FFN.

F FFN neurons · E routed experts · N neurons per expert
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from moe_convert.errors import UsageError
from moe_convert.experts.base import Method, outside_config, repeated
from moe_convert.ffn import Assignment

if TYPE_CHECKING:
    import torch

    from moe_convert.targets import MoeShape, MoeTarget


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
        num_shared = shape.shared_size // ffn_size
        scale = outside_config(self.routed_scale(target, shape), target)
        up_scale = _half_of(self.granularity) if target.scale_key is None else 1.0
        return Assignment(
            routed_EN=self._parts(ffn_size, shape, layer),
            shared_N=repeated(ffn_size, num_shared),
            source_E=(0,) * shape.num_experts,
            routed_scale=scale / up_scale,
            up_scale=up_scale,
            shared_scale=0.5 / max(num_shared, 1) / target.shared_weight,
        )

    def _parts(
        self, ffn_size: int, shape: MoeShape, layer: int
    ) -> torch.Tensor | tuple[range, ...]:
        """Return the neurons of every routed expert: consecutive ones unless they are shuffled."""
        if self.shuffle:
            import torch

            num_copies = shape.num_experts // self.granularity
            orders = [self._order(ffn_size, layer, replica) for replica in range(num_copies)]
            return torch.stack(orders).view(shape.num_experts, -1)
        size = ffn_size // self.granularity
        starts = (expert % self.granularity * size for expert in range(shape.num_experts))
        return tuple(range(start, start + size) for start in starts)

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


def _half_of(factor: int) -> float:
    """Return the part of a factor that `up` takes, `down` takes the rest.

    Powers of two are shared out as powers of two, which no stored dtype rounds.
    """
    if factor & (factor - 1) == 0:
        return float(1 << ((factor.bit_length() - 1) // 2))
    return math.sqrt(factor)
