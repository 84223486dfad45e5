"""A carved FFN in memory, and what fits its values to the dense one: least squares, descent.

D hidden size · F FFN neurons · E routed experts · T tokens
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from moe_convert.ffn import Grouping, Neurons
from moe_convert.runtime import exact_products
from moe_convert.selection import Scoring, scored

if TYPE_CHECKING:
    import torch

PORTION = 8192
"""Tokens whose neurons are held at once."""
GRAM_BLOCKS = 8
"""Blocks of rows of a Gram matrix, of which only what is right of the diagonal is computed."""
ILL_CONDITIONED = 1e5
"""Bound on a condition number from which fp32 would lose the solution."""
WARM_UP = 0.1
"""Share of the steps over which descent reaches its rate."""


@dataclass(frozen=True)
class Carved:
    """A dense FFN of which only the shared neurons and those of the chosen experts fire.

    `group_F` is the expert of every neuron, E for the shared ones; a token's `top_k` experts are
    those with the largest logits `router_ED` · x or, with a `bias_E`, the largest sum of it and
    their score, and each counts once.
    """

    neurons: Neurons
    group_F: torch.Tensor
    router_ED: torch.Tensor
    top_k: int
    bias_E: torch.Tensor | None = None
    scoring: Scoring = "sigmoid"

    @classmethod
    def of(
        cls,
        neurons: Neurons,
        grouping: Grouping,
        router_ED: torch.Tensor,
        top_k: int,
        bias_E: torch.Tensor | None = None,
        scoring: Scoring = "sigmoid",
    ) -> Carved:
        """Carve an FFN; rows beyond the groups are of experts that have no neurons."""
        num_experts = len(router_ED)
        group_F = neurons.gate_FD.new_full((len(neurons.gate_FD),), num_experts).long()
        for expert, neurons_N in enumerate(grouping.routed_EN):
            group_F[neurons_N.to(group_F.device)] = expert
        return cls(neurons, group_F, router_ED.to(neurons.gate_FD), top_k, bias_E, scoring)

    def fires(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Return one for every neuron that fires and zero for the others, fp32 [T, F]."""
        with exact_products(x_TD.device.type):
            scores_TE = x_TD.float() @ self.router_ED.T
        if self.bias_E is not None:
            scores_TE = scored(scores_TE, self.scoring) + self.bias_E
        fires = scores_TE.new_zeros(len(x_TD), scores_TE.shape[1] + 1)
        fires.scatter_(1, scores_TE.topk(self.top_k, dim=1).indices, 1.0)
        fires[:, -1] = 1.0
        return fires[:, self.group_F]

    def hidden(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Return what the neurons send to `down`, zero where they do not fire, fp32 [T, F]."""
        return self.neurons.hidden(x_TD).mul_(self.fires(x_TD))

    def __call__(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Return the output, fp32 [T, D]."""
        import torch

        parts = [self.hidden(part_TD) @ self.neurons.down_DF.T for part_TD in x_TD.split(PORTION)]
        return torch.cat(parts)


def refit(
    carved: Carved, x_TD: torch.Tensor, target_TD: torch.Tensor, ridge: float
) -> torch.Tensor:
    """Return all columns of `down` by ridge least squares, fp32 [D, F].

    Minimises |target - hidden · downᵀ|² + λ |down - its present value|² over the tokens, with λ
    `ridge` times the mean diagonal of the Gram matrix. What does not fire is zero in it.
    """
    import torch

    down_DF = carved.neurons.down_DF
    width = down_DF.shape[1]
    block = -(-width // GRAM_BLOCKS)
    gram_FF, cross_FD = down_DF.new_zeros(width, width), down_DF.new_zeros(width, len(down_DF))
    for x, target in _portions(x_TD, target_TD):
        hidden_TF = carved.hidden(x)
        for start in range(0, width, block):
            part_TB = hidden_TF[:, start : start + block]
            gram_FF[start : start + block, start:].addmm_(part_TB.T, hidden_TF[:, start:])
        cross_FD.addmm_(hidden_TF.T, target.float())
    gram_FF = gram_FF.triu() + gram_FF.triu(1).T
    damping = ridge * float(gram_FF.diagonal().mean())
    if damping <= 0:
        return down_DF
    cross_FD += damping * down_DF.T
    largest = float(gram_FF.abs().sum(dim=1).max())
    gram_FF.diagonal().add_(damping)
    wide = torch.float64 if largest / damping > ILL_CONDITIONED else torch.float32
    factor_FF = torch.linalg.cholesky(gram_FF.to(wide))
    solved_FD: torch.Tensor = torch.cholesky_solve(cross_FD.to(wide), factor_FF)
    return solved_FD.T.float().contiguous()


def tune(
    carved: Carved,
    x_TD: torch.Tensor,
    target_TD: torch.Tensor,
    *,
    steps: int,
    tokens: int,
    rate: float,
    seed: int,
) -> Neurons:
    """Return the neurons after some steps of Adam on the layer's own squared error.

    Each step takes `tokens` tokens, without putting one back before all had their turn. `rate` is
    relative to each matrix's root mean square; it rises over the first tenth of the steps and falls
    along a cosine. Who is chosen does not change.
    """
    import torch

    neurons = carved.neurons
    parts = [
        torch.nn.Parameter(part.clone())
        for part in (neurons.gate_FD, neurons.up_FD, neurons.down_DF)
    ]
    live = Neurons(parts[0], parts[1], parts[2], neurons.act)
    groups = [{"params": [p], "lr": rate * float(p.detach().square().mean().sqrt())} for p in parts]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    norm = float(target_TD.square().sum(dim=1).mean())
    if norm == 0:
        return neurons
    for chosen_T in _draws(len(x_TD), tokens, steps, seed):
        index = chosen_T.to(x_TD.device)
        x, fires_TF = x_TD[index], carved.fires(x_TD[index])
        with torch.enable_grad():
            given = (live.hidden(x) * fires_TF) @ live.down_DF.T
            loss = (given - target_TD[index]).square().sum(dim=1).mean() / norm
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    gate_FD, up_FD, down_DF = (part.detach() for part in parts)
    return Neurons(gate_FD, up_FD, down_DF, neurons.act)


def _rate(step: int, steps: int) -> float:
    rising = min(1.0, (step + 1) / max(1.0, WARM_UP * steps))
    return rising * 0.5 * (1 + math.cos(math.pi * step / steps))


def _draws(num_tokens: int, wanted: int, steps: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield indices of tokens: a shuffled pass over all of them, and another when it is through."""
    import torch

    generator, left_T = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        while len(left_T) < wanted:
            left_T = torch.cat([left_T, torch.randperm(num_tokens, generator=generator)])
        yield left_T[:wanted]
        left_T = left_T[wanted:]


def relative_error(given_TD: torch.Tensor, target_TD: torch.Tensor) -> float:
    """Return the share of the target's energy that is missed: 0 is perfect, 1 is nothing."""
    missed = (given_TD - target_TD).square().sum()
    return float(missed / target_TD.square().sum().clamp(min=1e-30))


def with_down(carved: Carved, down_DF: torch.Tensor) -> Carved:
    """Return the same with another `down`."""
    return replace(carved, neurons=replace(carved.neurons, down_DF=down_DF))


def _portions(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    return zip(*(tensor.split(PORTION) for tensor in tensors), strict=True)
