"""Router initialisers: the first rows of every router, scaled to a wanted spread of its logits.

D hidden size · E routed experts · T tokens
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    import torch


class Router(BaseModel):
    """How the routers start.

    `logit_std` is the standard deviation of the router's logits over tokens and experts. With
    `measure` it is set on the hidden states that the dense model really sends into each FFN;
    without, it is worked out from the weight of the norm before the FFN, as if every direction of
    its input were equally strong.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    init: Literal["auto", "zeros", "normal", "orthogonal"] = "auto"
    logit_std: float = Field(0.5, gt=0, le=100, description="Wanted std of the router's logits.")
    measure: bool = Field(True, description="Measure it on the dense model's own hidden states.")
    seed: int = Field(0, ge=0)

    summaries: ClassVar[dict[str, str]] = {
        "auto": "normal",
        "zeros": "all rows zero: ties choose the first experts until training moves them",
        "normal": "Gaussian rows",
        "orthogonal": "random rows at right angles to each other (at most hidden size experts)",
    }

    @property
    def kind(self) -> str:
        """The initialiser with `auto` resolved."""
        return "normal" if self.init == "auto" else self.init

    @property
    def needs_input(self) -> bool:
        """Whether the router's real input must be known."""
        return self.measure and self.kind != "zeros"

    def rows(self, num_experts: int, hidden_size: int, layer: int) -> torch.Tensor:
        """Return unscaled rows, fp32 [E, D]; every layer draws from a generator of its own."""
        import torch

        if self.kind == "zeros":
            return torch.zeros(num_experts, hidden_size)
        generator = torch.Generator().manual_seed(self.seed * 100_003 + layer)
        rows_ED = torch.randn(num_experts, hidden_size, generator=generator)
        if self.kind == "orthogonal":
            basis_DE, _ = torch.linalg.qr(rows_ED.T)
            return basis_DE.T.contiguous()
        return rows_ED

    def scaled(
        self, rows_ED: torch.Tensor, x_TD: torch.Tensor | None, norm_D: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the rows with the wanted logit std on `x_TD`, or as `norm_D` lets it expect."""
        if self.kind == "zeros":
            return rows_ED
        if x_TD is not None:
            std = float((x_TD.float() @ rows_ED.T).std())
        elif norm_D is not None:
            std = float((rows_ED * norm_D.float()).square().sum(dim=1).mean().sqrt())
        else:
            std = float(rows_ED.square().sum(dim=1).mean().sqrt())
        return rows_ED * (self.logit_std / max(std, 1e-12))
