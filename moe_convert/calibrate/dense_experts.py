"""Many small experts as one wide FFN: every expert on every token, nothing where not chosen.

The experts of transformers gather the tokens of each expert, and move a token's states as often as
it has experts. Where experts are narrow and a good part of them is chosen, moving costs more than
multiplying by all of them does, in time and in memory. Values and gradients are the same.

T tokens · D hidden size · E routed experts · K chosen experts · F width of an expert
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.nn import functional
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from moe_convert.calibrate.models import modules_of
from moe_convert.calibration import all_cost_less

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

NAME = "moe_convert_dense"
GATES = "straight_through_gates"
"""Attribute of a module of experts with the gates of all of them, [T, E]."""


def widen_experts(model: PreTrainedModel, top_k: int, device: str) -> bool:
    """Let a model run its experts as one wide FFN if that costs less; return whether it will."""
    found = [module for _, module in modules_of(model, "experts")]
    if not found or not all(map(_can, found)):
        return False
    sizes = [(m.down_proj.shape[2], m.down_proj.shape[0]) for m in found]
    if not all(all_cost_less(*size, top_k, device) for size in sizes):
        return False
    ALL_EXPERTS_FUNCTIONS.register(NAME, every_expert)
    model.set_experts_implementation(NAME)
    return True


def _can(experts: Any) -> bool:
    """Whether these are plain experts of transformers."""
    others = ("has_bias", "is_transposed", "has_post_expert_norm")
    known = getattr(experts, "has_gate", None) is not None
    return known and not any(getattr(experts, other, False) for other in others)


def every_expert(
    experts: Any, x_TD: torch.Tensor, chosen_TK: torch.Tensor, weights_TK: torch.Tensor
) -> torch.Tensor:
    """Return what the chosen experts give, weighted and added up, as [T, D].

    A product with `down` is linear, so that what goes into it can be weighted instead of what comes
    out, and a single product adds up all experts. Gates of all experts, where the module has them,
    get the gradient that they would have if they were the weights: see `losses.straight_through`.
    """
    shape = (len(x_TD), experts.num_experts)
    weights_TE = weights_TK.new_zeros(shape).scatter(1, chosen_TK, weights_TK)
    gates_TE = getattr(experts, GATES, None)
    if gates_TE is not None:
        weights_TE = weights_TE + (gates_TE - gates_TE.detach()).to(weights_TE.dtype)
    into_EFD = experts.gate_up_proj if experts.has_gate else experts.up_proj
    inside_TEF = functional.linear(x_TD, into_EFD.flatten(0, 1)).unflatten(1, (shape[1], -1))
    inside_TEF = experts._apply_gate(inside_TEF) if experts.has_gate else experts.act_fn(inside_TEF)
    inside_TEF = inside_TEF * weights_TE.unsqueeze(-1).to(x_TD.dtype)
    down_DF = experts.down_proj.transpose(0, 1).flatten(1)
    return functional.linear(inside_TEF.flatten(1), down_DF)
