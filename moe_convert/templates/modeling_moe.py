"""Mixture-of-Experts models whose decoder is a dense model of transformers, all but its FFNs.

`MoeConfig_<type>` and `MoeForCausalLM_<type>` subclass the dense classes of that model type and put
experts and a router in the place of the FFNs that config.json names, whatever these look like
inside. Load with `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`.

D hidden size · E experts · K experts per token · T tokens
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

MODEL_TYPE = "moe_convert_{base}"


class Router(nn.Linear):
    """Softmax over all experts, the best K, and their weights scaled to a sum of one, in fp32."""

    def __init__(self, hidden_size: int, num_experts: int, top_k: int) -> None:
        super().__init__(hidden_size, num_experts, bias=False)
        self.top_k = top_k

    def forward(self, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return logits [T, E], weights [T, K] and numbers [T, K] of the chosen experts."""
        logits_TE = super().forward(x_TD)
        weights_TK, chosen_TK = logits_TE.float().softmax(dim=-1).topk(self.top_k, dim=-1)
        return logits_TE, weights_TK / weights_TK.sum(dim=-1, keepdim=True), chosen_TK


class Moe(nn.Module):
    """Experts that are each a copy of `ffn`; dropout at its end moves behind their sum."""

    def __init__(self, ffn: nn.Module, config: Any) -> None:
        super().__init__()
        self.dropout = nn.Dropout(_take_dropout(ffn))
        self.router = Router(config.hidden_size, config.num_experts, config.num_experts_per_tok)
        self.experts = nn.ModuleList(copy.deepcopy(ffn) for _ in range(config.num_experts))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the weighted sum of the chosen experts' outputs, shaped like the input."""
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights_TK, chosen_TK = self.router(x_TD)
        sum_TD = torch.zeros_like(x_TD, dtype=torch.float32)
        for number, expert in enumerate(self.experts):
            token, rank = torch.where(chosen_TK == number)
            output_TD = expert(x_TD[token]).float() * weights_TK[token, rank, None]
            sum_TD = sum_TD.index_add(0, token, output_TD)
        return self.dropout(sum_TD.to(hidden_states.dtype)).view_as(hidden_states)


def _take_dropout(ffn: nn.Module) -> float:
    """Switch off the dropout of an FFN's output and return its rate."""
    if isinstance(getattr(ffn, "dropout", None), nn.Dropout):
        rate, ffn.dropout = ffn.dropout.p, nn.Identity()
    else:
        rate, ffn.residual_dropout = getattr(ffn, "residual_dropout", 0.0), 0.0
    return float(rate)


def _replace_ffn(layer: nn.Module, donor: nn.Module, config: Any) -> None:
    """Put experts like the donor's FFN into a layer; an FFN in several modules becomes one."""
    first, *others = config.ffn_modules
    ffn = getattr(donor, first)
    if others:
        ffn = nn.Sequential(OrderedDict((n, getattr(donor, n)) for n in config.ffn_modules))
    setattr(layer, first, Moe(ffn, config))
    for name in others:
        setattr(layer, name, nn.Identity())


def _config_class(base: str) -> type:
    dense: Any = CONFIG_MAPPING[base]

    class Config(dense):
        model_type = MODEL_TYPE.format(base=base)

    return Config


def _model_class(base: str) -> type:
    dense: Any = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[base]]

    class Model(dense):
        config_class = make_class("MoeConfig", base)

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            narrow = copy.deepcopy(config)
            setattr(narrow, config.ffn_size_key, config.moe_intermediate_size)
            layers = self.get_submodule(config.decoder_layers)
            for index in config.moe_layers:
                _replace_ffn(layers[index], type(layers[index])(narrow, index), config)
            self.post_init()

    return Model


def make_class(kind: str, base: str) -> Any:
    """Return the `MoeConfig` or `MoeForCausalLM` of a dense model type; each is made once."""
    name = f"{kind}_{base}"
    if name not in globals():
        made = _MAKERS[kind](base)
        made.__name__ = made.__qualname__ = name
        globals()[name] = made
    found: type = globals()[name]
    return found


_MAKERS = {"MoeConfig": _config_class, "MoeForCausalLM": _model_class}


def __getattr__(name: str) -> type:
    """Make a class such as `MoeConfig_gpt2` when it is first asked for."""
    kind, _, base = name.partition("_")
    if kind in _MAKERS and base in CONFIG_MAPPING:
        made: type = make_class(kind, base)
        return made
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
