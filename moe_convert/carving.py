"""A carved FFN in memory, and what fits its values to the dense one: least squares, descent.

D hidden size · F FFN neurons · E routed experts · T tokens
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from moe_convert.ffn import Grouping, Neurons
from moe_convert.runtime import exact_products
from moe_convert.selection import Scoring, scored

if TYPE_CHECKING:
    import torch

PORTION = {"cpu": 2048, "cuda": 8192}
"""Tokens whose neurons are held at once: few enough to stay near a processor's cores."""
MASKED = ("cuda",)
"""Devices that compute all neurons and mask them faster than they do many small products."""
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

    def by_expert(self) -> tuple[Carved, torch.Tensor]:
        """Return the same with the shared neurons first, then each expert's side by side.

        Their old places are returned as well, [F].
        """
        num_shared = int((self.group_F == len(self.router_ED)).sum())
        order_F = self.group_F.argsort(stable=True).roll(num_shared)
        return self.with_neurons(_taken(self.neurons, order_F), self.group_F[order_F]), order_F

    def with_neurons(self, neurons: Neurons, group_F: torch.Tensor | None = None) -> Carved:
        """Return the same with other neurons, in the same experts or others."""
        return replace(self, neurons=neurons, group_F=self.group_F if group_F is None else group_F)

    def chosen(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Return one for every expert that is chosen, and for the shared neurons, fp32 [T, E+1]."""
        with exact_products(x_TD.device.type):
            scores_TE = x_TD.float() @ self.router_ED.T
        if self.bias_E is not None:
            scores_TE = scored(scores_TE, self.scoring) + self.bias_E
        chosen_TE = scores_TE.new_zeros(len(x_TD), scores_TE.shape[1] + 1)
        chosen_TE.scatter_(1, scores_TE.topk(self.top_k, dim=1).indices, 1.0)
        chosen_TE[:, -1] = 1.0
        return chosen_TE

    def parts(self, x_TD: torch.Tensor) -> Iterator[tuple[Neurons, slice, torch.Tensor]]:
        """Yield the shared neurons and those of every expert, their place, their tokens.

        Neurons must be `by_expert`. Only what fires is computed this way: a quarter of the work
        where a quarter fires.
        """
        chosen_TE = self.chosen(x_TD).roll(1, dims=1)
        tokens = chosen_TE.T.nonzero()[:, 1].split(chosen_TE.sum(dim=0).long().tolist())
        sizes = self.group_F.bincount(minlength=chosen_TE.shape[1]).roll(1).tolist()
        start = 0
        for neurons, token_N in zip(_divided(self.neurons, sizes), tokens, strict=True):
            stop = start + len(neurons.gate_FD)
            if stop > start:
                yield neurons, slice(start, stop), token_N
            start = stop

    def fired(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Return what every neuron sends to `down`, zero where it does not fire, fp32 [T, F]."""
        return self.neurons.hidden(x_TD) * self.chosen(x_TD)[:, self.group_F]

    def given(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Return the output of neurons that are `by_expert`, fp32 [T, D]."""
        neurons = self.neurons
        if x_TD.device.type in MASKED:
            return (self.fired(x_TD) @ neurons.down_DF.T).float()
        given_TD = neurons.gate_FD.new_zeros(x_TD.shape)
        for part, _, token_N in self.parts(x_TD):
            hidden_TN = part.hidden(x_TD.index_select(0, token_N))
            given_TD.index_add_(0, token_N, (hidden_TN @ part.down_DF.T).float())
        return given_TD

    def __call__(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Return the output, fp32 [T, D]."""
        import torch

        ordered, _ = self.by_expert()
        with part_products(x_TD.device.type):
            return torch.cat([ordered.given(part_TD) for (part_TD,) in _portions(x_TD)])


def part_products(device: str) -> AbstractContextManager[None]:
    """Multiply as it suits the parts of a carved FFN: for small products casts cost a CPU most."""
    return nullcontext() if device in MASKED else exact_products(device)


def _taken(neurons: Neurons, index_N: torch.Tensor) -> Neurons:
    gate_FD, up_FD = neurons.gate_FD[index_N], neurons.up_FD[index_N]
    return Neurons(gate_FD, up_FD, neurons.down_DF[:, index_N], neurons.act)


def _divided(neurons: Neurons, sizes: list[int]) -> Iterator[Neurons]:
    """Yield so many adjacent neurons after the other."""
    parts = (neurons.gate_FD.split(sizes), neurons.up_FD.split(sizes))
    for gate_ND, up_ND, down_DN in zip(*parts, neurons.down_DF.split(sizes, dim=1), strict=True):
        yield Neurons(gate_ND, up_ND, down_DN, neurons.act)


def refit(
    carved: Carved, x_TD: torch.Tensor, target_TD: torch.Tensor, ridge: float
) -> torch.Tensor:
    """Return all columns of `down` by ridge least squares, fp32 [D, F].

    Minimises |target - hidden · downᵀ|² + λ |down - its present value|² over the tokens, with λ
    `ridge` times the mean diagonal of the Gram matrix. What does not fire is zero in it.
    """
    import torch

    ordered, order_F = carved.by_expert()
    down_DF = ordered.neurons.down_DF
    width = down_DF.shape[1]
    gram_FF, cross_FD = down_DF.new_zeros(width, width), down_DF.new_zeros(width, len(down_DF))
    add = _add_masked if x_TD.device.type in MASKED else _add_parts
    for x, target in _portions(x_TD, target_TD):
        add(gram_FF, cross_FD, ordered, x, target.float())
    gram_FF = gram_FF.tril() + gram_FF.tril(-1).T
    damping = ridge * float(gram_FF.diagonal().mean())
    if damping <= 0:
        return carved.neurons.down_DF
    cross_FD += damping * down_DF.T
    largest = float(gram_FF.abs().sum(dim=1).max())
    gram_FF.diagonal().add_(damping)
    wide = torch.float64 if largest / damping > ILL_CONDITIONED else torch.float32
    factor_FF = torch.linalg.cholesky(gram_FF.to(wide))
    solved_FD: torch.Tensor = torch.cholesky_solve(cross_FD.to(wide), factor_FF)
    return solved_FD[order_F.argsort()].T.float().contiguous()


def _add_masked(
    gram_FF: torch.Tensor,
    cross_FD: torch.Tensor,
    ordered: Carved,
    x_TD: torch.Tensor,
    target_TD: torch.Tensor,
) -> None:
    """Add some tokens' products of what fires, with itself and with the target."""
    fired_TF = ordered.fired(x_TD)
    gram_FF.addmm_(fired_TF.T, fired_TF)
    cross_FD.addmm_(fired_TF.T, target_TD)


def _add_parts(
    gram_FF: torch.Tensor,
    cross_FD: torch.Tensor,
    ordered: Carved,
    x_TD: torch.Tensor,
    target_TD: torch.Tensor,
) -> None:
    """Add the products of `_add_masked` expert by expert, and none above the diagonal.

    The shared neurons, which all tokens need, come first: there the fewest lie below it.
    """
    fired_TF = x_TD.new_zeros(len(x_TD), len(gram_FF))
    for part, place, token_N in ordered.parts(x_TD):
        value_TN = part.hidden(x_TD.index_select(0, token_N))
        fired_TF[:, place].index_copy_(0, token_N, value_TN)
        upto_TF = fired_TF[:, : place.stop].index_select(0, token_N)
        gram_FF[place, : place.stop].addmm_(value_TN.T, upto_TF)
        cross_FD[place].addmm_(value_TN.T, target_TD.index_select(0, token_N))


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

    ordered, order_F = carved.by_expert()
    neurons = ordered.neurons
    parts = [torch.nn.Parameter(part) for part in (neurons.gate_FD, neurons.up_FD, neurons.down_DF)]
    live = ordered.with_neurons(Neurons(parts[0], parts[1], parts[2], neurons.act))
    groups = [{"params": [p], "lr": rate * float(p.detach().square().mean().sqrt())} for p in parts]
    optimizer = torch.optim.Adam(groups, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    norm = float(target_TD.square().sum(dim=1).mean())
    if norm == 0:
        return carved.neurons
    for chosen_T in _draws(len(x_TD), tokens, steps, seed):
        index = chosen_T.to(x_TD.device)
        with torch.enable_grad():
            given = live.given(x_TD.index_select(0, index))
            loss = (given - target_TD.index_select(0, index)).square().sum(dim=1).mean() / norm
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    gate_FD, up_FD, down_DF = (part.detach() for part in parts)
    return _taken(Neurons(gate_FD, up_FD, down_DF, neurons.act), order_F.argsort())


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
    missed, energy = 0.0, 0.0
    for given, target in _portions(given_TD, target_TD):
        missed += float((given - target).square().sum())
        energy += float(target.square().sum())
    return missed / max(energy, 1e-30)


def with_down(carved: Carved, down_DF: torch.Tensor) -> Carved:
    """Return the same with another `down`."""
    return replace(carved, neurons=replace(carved.neurons, down_DF=down_DF))


def _portions(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    size = PORTION[tensors[0].device.type]
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)
