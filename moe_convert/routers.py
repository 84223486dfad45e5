"""Router initialisers: the first rows of every router, scaled to a wanted spread of its logits.

D hidden size · R router rows · E routed experts, several of which may share a row · T tokens
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from moe_convert.clustering import kmeans
from moe_convert.errors import UsageError
from moe_convert.ffn import Grouping, Neurons
from moe_convert.selection import Scoring, scored

if TYPE_CHECKING:
    import torch

    from moe_convert.targets import MoeShape

Prompts = tuple[tuple[str, ...], ...]
"""A list of prompts for every router row."""


@dataclass(frozen=True)
class States:
    """What the FFNs, and so the routers, of one layer receive from the dense model, fp32.

    `data_TD` are the tokens of the data; `positive` and `negative` those of every row's prompts,
    each [T, D] and the negative ones possibly of no token.
    """

    data_TD: torch.Tensor
    positive: tuple[torch.Tensor, ...] = ()
    negative: tuple[torch.Tensor, ...] = ()


class Router(BaseModel):
    """How the routers start.

    `logit_std` is the standard deviation of the router's logits over tokens and experts. With
    `measure` it is set on the hidden states that the dense model really sends into each FFN;
    without, it is worked out from the weight of the norm before the FFN, as if every direction of
    its input were equally strong.

    Hidden states share a strong mean, which gives random rows a constant preference that has
    nothing to do with the token: on a small real model the busiest of 8 experts got 2.0 times its
    share of tokens with Gaussian rows, and 1.2 times with the mean's direction taken out of them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    init: Literal[
        "auto",
        "zeros",
        "normal",
        "orthogonal",
        "centroid",
        "prompts",
        "distill",
        "ridge",
        "mean-gate",
        "representative",
        "grouped",
    ] = "auto"
    logit_std: float = Field(0.5, gt=0, le=100, description="Wanted std of the router's logits.")
    weight_std: float | None = Field(
        None, gt=0, description="Std of the rows themselves, in place of logit_std."
    )
    measure: bool = Field(True, description="Measure it on the dense model's own hidden states.")
    center: bool = Field(
        True, description="Where they are measured, take their mean direction out of random rows."
    )
    prompts: Prompts = Field((), description="init prompts: a list of texts for every expert.")
    negative_prompts: Prompts = Field((), description="Texts that each expert should not get.")
    balance: float | None = Field(
        None,
        gt=0,
        le=1,
        description="split: bias the choice until no expert exceeds its share by more than this",
    )
    select: Literal["topk", "threshold"] = Field(
        "topk",
        description="threshold: split, a ridge router; every expert whose output it predicts to be "
        "longer than the layer's threshold, target.top_k of them on average",
    )
    max_k: int | None = Field(
        None, ge=1, description="select threshold: most experts of a token; null: twice the mean"
    )
    min_k: int = Field(0, ge=0, description="select threshold: fewest experts of a token")
    seed: int = Field(0, ge=0)

    summaries: ClassVar[dict[str, str]] = {
        "auto": "normal; for a split what its strategy uses",
        "zeros": "all rows zero: ties choose the first experts until training moves them",
        "normal": "Gaussian rows",
        "orthogonal": "random rows at right angles to each other (at most hidden size experts)",
        "centroid": "centres of k-means clusters of the router's input on the data",
        "prompts": "mean of the router's input over each expert's prompts, less its negative ones",
        "distill": "split: cross-entropy onto each expert's share of the output energy",
        "ridge": "split: least squares onto the length of each expert's output",
        "mean-gate": "split: mean of each expert's gate rows (arXiv 2602.15521)",
        "representative": "strategy cmoe: its router's scores, projected onto a linear one",
        "grouped": "strategies gradient and learned: what came out with their groups",
    }

    @property
    def kind(self) -> str:
        """The initialiser with `auto` resolved."""
        return "normal" if self.init == "auto" else self.init

    @property
    def steers(self) -> bool:
        """Whether a selection bias is made on data."""
        return self.balance is not None or self.thresholds

    @property
    def thresholds(self) -> bool:
        """Whether a token's number of experts depends on it."""
        return self.select == "threshold"

    @property
    def learns(self) -> bool:
        """Whether the rows are made of hidden states, not drawn."""
        return self.kind in {"centroid", "prompts"}

    @property
    def fitted(self) -> bool:
        """Whether the rows are made for experts that are parts of one FFN."""
        return self.kind in FITTED

    def fit(
        self, neurons: Neurons, grouping: Grouping, x_TD: torch.Tensor, seed: int
    ) -> torch.Tensor:
        """Return unscaled rows for a carved FFN that receives `x_TD`, fp32 [E, D].

        Raises:
            UsageError: the groups do not say what this initialiser needs.
        """
        return FITTED[self.kind](neurons, grouping, x_TD, seed)

    @property
    def needs_input(self) -> bool:
        """Whether the router's real input must be known."""
        measured = self.measure and (self.weight_std is None or self.learns)
        return measured and self.kind != "zeros"

    def rows(
        self, num_rows: int, hidden_size: int, layer: int, states: States | None = None
    ) -> torch.Tensor:
        """Return unscaled rows, fp32 [R, D]; every layer draws from a generator of its own.

        `states` are needed wherever `needs_input` says so.
        """
        import torch

        seed = self.seed * 100_003 + layer
        if self.kind == "zeros":
            return torch.zeros(num_rows, hidden_size)
        if self.learns:
            assert states is not None
            if self.kind == "centroid":
                return centroid_rows(states.data_TD, num_rows, seed)
            return prompt_rows(states.positive, states.negative)
        rows_RD = torch.randn(num_rows, hidden_size, generator=torch.Generator().manual_seed(seed))
        if states is not None and self.center:
            rows_RD = without(rows_RD, states.data_TD.float().mean(dim=0))
        if self.kind == "orthogonal":
            basis_DR, _ = torch.linalg.qr(rows_RD.T)
            return basis_DR.T.contiguous()
        return rows_RD

    def scaled(
        self, rows_ED: torch.Tensor, x_TD: torch.Tensor | None, norm_D: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the rows with the wanted logit std on `x_TD`, or as `norm_D` lets it expect."""
        if self.kind == "zeros":
            return rows_ED
        if self.weight_std is not None:
            return rows_ED * (self.weight_std / float(rows_ED.square().mean().sqrt()))
        if x_TD is not None:
            std = float((x_TD.float() @ rows_ED.T).std())
        elif norm_D is not None:
            std = float((rows_ED * norm_D.float()).square().sum(dim=1).mean().sqrt())
        else:
            std = float(rows_ED.square().sum(dim=1).mean().sqrt())
        return rows_ED * (self.logit_std / max(std, 1e-12))


def _distilled(neurons: Neurons, grouping: Grouping, x_TD: torch.Tensor, seed: int) -> torch.Tensor:
    from moe_convert.grouping.fitted import distilled_rows, expert_energies
    from moe_convert.grouping.parts import spaced

    x_TD = spaced(x_TD)
    return distilled_rows(expert_energies(neurons, grouping.routed_EN, x_TD), x_TD, seed)


def _ridge(neurons: Neurons, grouping: Grouping, x_TD: torch.Tensor, seed: int) -> torch.Tensor:
    from moe_convert.grouping.fitted import expert_energies, ridge_rows

    return ridge_rows(expert_energies(neurons, grouping.routed_EN, x_TD), x_TD)


def _mean_gate(neurons: Neurons, grouping: Grouping, x_TD: torch.Tensor, seed: int) -> torch.Tensor:
    from moe_convert.grouping.routers import mean_gate_rows

    return mean_gate_rows(neurons, grouping.routed_EN)


def _representative(
    neurons: Neurons, grouping: Grouping, x_TD: torch.Tensor, seed: int
) -> torch.Tensor:
    from moe_convert.grouping.routers import representative_rows

    if grouping.representative_E is None:
        raise UsageError(
            "Only the groups of strategy cmoe have representative neurons.", "Use --router distill."
        )
    return representative_rows(neurons, grouping.representative_E, x_TD)


def _grouped(neurons: Neurons, grouping: Grouping, x_TD: torch.Tensor, seed: int) -> torch.Tensor:
    if grouping.router_ED is None:
        raise UsageError(
            "Only the groups of strategies gradient and learned come with a router.",
            "Use --router distill.",
        )
    return grouping.router_ED.to(x_TD)


FITTED = {
    "distill": _distilled,
    "ridge": _ridge,
    "mean-gate": _mean_gate,
    "representative": _representative,
    "grouped": _grouped,
}
"""Initialisers of routers whose experts are parts of one FFN."""


def without(rows_RD: torch.Tensor, direction_D: torch.Tensor) -> torch.Tensor:
    """Return the rows with their part along a direction taken out."""
    square = direction_D @ direction_D
    return rows_RD - ((rows_RD @ direction_D) / square.clamp(min=1e-30)).outer(direction_D)


def centroid_rows(x_TD: torch.Tensor, num_rows: int, seed: int) -> torch.Tensor:
    """Return the centres of k-means clusters less the mean state, fp32 [R, D].

    The direction of the mean is taken out as well: of x · (c - m) it leaves the part that depends
    on the token.
    """
    mean_D = x_TD.float().mean(dim=0)
    centres_RD, _ = kmeans(x_TD, num_rows, seed)
    return without(centres_RD - mean_D, mean_D)


def prompt_rows(
    positive: tuple[torch.Tensor, ...], negative: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    """Return the mean state of each row's prompts less that of its negative ones, fp32 [R, D].

    The direction of the mean over all prompts, each list counted once, is taken out, and the rows
    are made equally long, so that no expert is preferred for how long its prompts are.
    """
    import torch

    means_RD = torch.stack([x_TD.float().mean(dim=0) for x_TD in positive])
    less_RD = torch.zeros_like(means_RD)
    for row, x_TD in enumerate(negative):
        if len(x_TD):
            less_RD[row] = x_TD.float().mean(dim=0)
    used = torch.cat([means_RD, less_RD[less_RD.any(dim=1)]])
    return torch.nn.functional.normalize(without(means_RD - less_RD, used.mean(dim=0)), dim=1)


@dataclass(frozen=True)
class Routed:
    """What one router would do with the tokens of the data.

    `condition` is the ratio of the largest to the smallest singular value of the distinct rows less
    their mean, which softmax does not see; None if they depend on each other. `closest` is the
    largest cosine between two distinct rows. `load_E` is each expert's share of all choices, and
    `unsteered_E` what it would be without the selection bias that balances it. A token uses
    `mean_k` experts on average. Experts of zeros are left out of everything.
    """

    logit_std: float
    condition: float | None
    closest: float
    load_E: torch.Tensor
    mean_k: float
    unsteered_E: torch.Tensor | None = None

    @property
    def max_over_mean(self) -> float:
        """How many times its fair share the busiest expert gets."""
        return busiest(self.load_E)

    @property
    def entropy(self) -> float:
        """Entropy of the load over its largest possible value: 1 is an even load."""
        import torch

        return float(-torch.xlogy(self.load_E, self.load_E).sum()) / math.log(len(self.load_E))

    @property
    def num_dead(self) -> int:
        """Experts that get less than a tenth of their fair share."""
        return int((self.load_E * len(self.load_E) < 0.1).sum())


def busiest(load_E: torch.Tensor) -> float:
    """Return how many times its fair share the busiest expert gets."""
    return float(load_E.max()) * len(load_E)


def routed(
    rows_ED: torch.Tensor,
    x_TD: torch.Tensor,
    shape: MoeShape,
    copies: int,
    bias_E: torch.Tensor | None = None,
    scoring: Scoring = "sigmoid",
) -> Routed:
    """Return what a router does with these states; `copies` neighbours share each row.

    A `bias_E` is added to the scores of a target without groups.
    """
    rows_ED = rows_ED.float()
    logits_TE = x_TD.float() @ rows_ED.T
    counts_E, unsteered_E = _counts(within_groups(logits_TE, shape), shape), None
    if bias_E is not None:
        unsteered_E = None if shape.null_experts else counts_E / counts_E.sum()
        counts_E = _counts(scored(logits_TE, scoring) + bias_E, shape)
    real = len(counts_E)
    distinct_RD = rows_ED[:real:copies]
    return Routed(
        float(logits_TE[:, :real].std()),
        condition(distinct_RD),
        closest(distinct_RD),
        counts_E / counts_E.sum(),
        float(counts_E.sum()) / len(x_TD),
        unsteered_E,
    )


def _counts(choice_TE: torch.Tensor, shape: MoeShape) -> torch.Tensor:
    """Return how often each expert is chosen, those of zeros left out, fp64."""
    import torch

    chosen_TK = choice_TE.topk(shape.top_k, dim=1).indices
    counts_E = torch.bincount(chosen_TK.flatten(), minlength=shape.num_experts)
    return counts_E[: shape.num_experts - shape.null_experts].double()


def within_groups(logits_TE: torch.Tensor, shape: MoeShape) -> torch.Tensor:
    """Return the logits with experts outside the best groups at minus infinity.

    A group counts as much as the sigmoids of its two best experts (DeepSeek-V3, arXiv 2412.19437).
    """
    import torch

    if shape.top_groups == shape.num_groups:
        return logits_TE
    grouped = logits_TE.unflatten(1, (shape.num_groups, -1))
    value_TG = grouped.sigmoid().topk(2, dim=2).values.sum(dim=2)
    best = torch.zeros_like(value_TG, dtype=torch.bool)
    best.scatter_(1, value_TG.topk(shape.top_groups, dim=1).indices, True)
    return grouped.masked_fill(~best.unsqueeze(2), -math.inf).flatten(1)


def condition(rows_RD: torch.Tensor) -> float | None:
    """Return the condition number of the rows less their mean, None if it is not finite."""
    import torch

    num_rows, hidden_size = rows_RD.shape
    if not rows_RD.isfinite().all():
        return None
    centred = (rows_RD - rows_RD.mean(dim=0)).double()
    values = torch.linalg.svdvals(centred)[: max(1, min(num_rows - 1, hidden_size))]
    largest, smallest = float(values[0]), float(values[-1])
    return largest / smallest if smallest > 1e-6 * largest else None


def closest(rows_RD: torch.Tensor) -> float:
    """Return the largest cosine between two of the rows, -1 if there is only one."""
    import torch

    unit_RD = torch.nn.functional.normalize(rows_RD.float(), dim=1)
    cosine_RR = (unit_RD @ unit_RD.T).fill_diagonal_(-1.0)
    return float(cosine_RR.max())
