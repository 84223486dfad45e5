"""Linear routers fitted to what the experts would give.

D hidden size · E routed experts · N neurons per expert · T tokens
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_convert.ffn import Neurons
from moe_convert.grouping.contribution import damped
from moe_convert.grouping.parts import portions

if TYPE_CHECKING:
    import torch

RIDGE = 0.03
"""Added to the diagonal of the inputs' second moments, relative to its mean."""
STEPS = 100
TOKENS = 2048
RATE = 0.3
"""Of Adam, times the length of an input: how far a logit may move in a step."""


def expert_energies(neurons: Neurons, routed_EN: torch.Tensor, x_TD: torch.Tensor) -> torch.Tensor:
    """Return the squared length of every expert's output, fp32 [T, E]."""
    import torch

    flat = routed_EN.flatten().to(x_TD.device)
    part = Neurons(
        neurons.gate_FD[flat], neurons.up_FD[flat], neurons.down_DF[:, flat], neurons.act
    )
    down_END = part.down_DF.T.unflatten(0, routed_EN.shape)
    gram_ENN = down_END @ down_END.transpose(1, 2)
    found = []
    for part_TD in portions(x_TD, len(flat)):
        hidden_ETN = part.hidden(part_TD).unflatten(1, routed_EN.shape).transpose(0, 1)
        found.append((hidden_ETN @ gram_ENN).mul_(hidden_ETN).sum(dim=2).T.clamp(min=0))
    return torch.cat(found)


def ridge_rows(energy_TE: torch.Tensor, x_TD: torch.Tensor) -> torch.Tensor:
    """Return the rows that predict the length of each expert's output best, fp32 [E, D].

    Closed form: ridge least squares onto ‖E_e(x)‖, the target of D2DMoE (arXiv 2310.04361).
    """
    import torch

    num_dims = x_TD.shape[1]
    moments_DD, products_DE = (
        x_TD.new_zeros(num_dims, width) for width in (num_dims, energy_TE.shape[1])
    )
    for x, energy in zip(x_TD.split(TOKENS), energy_TE.split(TOKENS), strict=True):
        moments_DD.addmm_(x.T, x)
        products_DE.addmm_(x.T, energy.sqrt())
    rows_ED: torch.Tensor = torch.linalg.solve(damped(moments_DD, RIDGE), products_DE.double()).T
    return rows_ED.float().contiguous()


def distilled_rows(energy_TE: torch.Tensor, x_TD: torch.Tensor, seed: int) -> torch.Tensor:
    """Return rows whose softmax comes near to each expert's share of the energy, fp32 [E, D].

    Cross-entropy, by Adam from zero with a rate that rises for a tenth of the steps and falls along
    a cosine; seeded.
    """
    import math

    import torch
    from torch.nn.functional import cross_entropy

    rows_ED = torch.nn.Parameter(x_TD.new_zeros(energy_TE.shape[1], x_TD.shape[1]))
    length = float(x_TD.square().sum(dim=1).mean().sqrt())
    optimizer = torch.optim.Adam([rows_ED], lr=RATE / max(length, 1e-12))
    factor = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda n: min(1.0, 10 * (n + 1) / STEPS) * 0.5 * (1 + math.cos(math.pi * n / STEPS)),
    )
    generator = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        chosen_T = torch.randint(len(x_TD), (min(TOKENS, len(x_TD)),), generator=generator)
        index = chosen_T.to(x_TD.device)
        energy = energy_TE.index_select(0, index)
        share = energy / energy.sum(dim=1, keepdim=True).clamp(min=1e-30)
        with torch.enable_grad():
            loss = cross_entropy(x_TD.index_select(0, index) @ rows_ED.T, share)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        factor.step()
    return rows_ED.detach()
