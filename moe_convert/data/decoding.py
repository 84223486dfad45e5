"""Sampling from a model at temperature 1, many texts at once, one token of each at a time.

All texts have the same length at every moment, so nothing is padded or masked: what a text must
begin with, and what must follow an end of it, takes the place of the sampled token.

B texts · D head size · G key-value heads · H heads · S cached tokens · T tokens · V vocabulary
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from moe_convert.data.starts import Start
from moe_convert.errors import SourceError, UnsupportedError

FOLDED = "moe_convert_folded"
ROOM = 64
BELOW_ONE = 1 - 1e-6
REMEDY = "Give text with --data."


@dataclass
class _Text:
    """One text that is being written: what must come next, and whether nothing is written yet."""

    start: Start
    ends: frozenset[int]
    number: int = 0
    fresh: bool = True
    queue: deque[int] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.queue.extend(self.start.first)

    def take(self, sampled: int) -> int:
        """Return the next token: what must come, or else the sampled one."""
        if self.queue:
            return self.queue.popleft()
        self.fresh = sampled in self.ends
        if self.fresh:
            following, self.number = self.start.after(sampled, self.number)
            self.queue.extend(following)
        return sampled


def sample(
    model: PreTrainedModel,
    starts: Sequence[Start],
    uniform_BT: torch.Tensor,
    ends: frozenset[int],
    banned: frozenset[int] = frozenset(),
    num_tokens: int | None = None,
    step: Callable[[int], None] = lambda done: None,
) -> torch.Tensor:
    """Return a text [B, T] for every start; each of its tokens is decided by one uniform number.

    `ends` are the tokens behind which a new text or message begins, and which are no text by
    themselves; `banned` ones never come up, nor does any from `num_tokens` on.

    Raises:
        UnsupportedError: the model keeps no cache.
        SourceError: its logits are not finite.
    """
    texts = [_Text(start, ends) for start in starts]
    taken = [[text.take(0) for text in texts]]
    never = torch.tensor(sorted(banned), dtype=torch.long, device=model.device)
    end_ids = torch.tensor(sorted(ends), dtype=torch.long, device=model.device)
    uniform_BT, cache, name = uniform_BT.to(model.device), None, _cache_name(model)
    with torch.inference_mode():
        for position in range(1, uniform_BT.shape[1]):
            ids_B1 = torch.tensor(taken[-1], device=model.device)[:, None]
            given: dict[str, Any] = {} if cache is None else {name: cache}
            out = model(input_ids=ids_B1, use_cache=True, **given)
            cache = getattr(out, name) if position > 1 else _with_room(getattr(out, name))
            logits_BV = out.logits[:, -1, :num_tokens].float()
            logits_BV[:, never] = -torch.inf
            fresh_B = torch.tensor([text.fresh for text in texts], device=model.device)
            logits_BV[fresh_B[:, None] & _marked(end_ids, logits_BV)] = -torch.inf
            chosen_B = choose(logits_BV, uniform_BT[:, position])
            taken.append([t.take(c) for t, c in zip(texts, chosen_B.tolist(), strict=True)])
            step(position + 1)
    return torch.tensor(taken).T.contiguous()


def _marked(ids: torch.Tensor, logits_BV: torch.Tensor) -> torch.Tensor:
    marked_V = torch.zeros(logits_BV.shape[-1], dtype=torch.bool, device=logits_BV.device)
    marked_V[ids[ids < len(marked_V)]] = True
    return marked_V


def choose(logits_BV: torch.Tensor, uniform_B: torch.Tensor) -> torch.Tensor:
    """Return the token [B] at which the cumulated probability passes a uniform number.

    The logits are used up. On a GPU sums run in parallel, and in fp32 they would not only rise.

    Raises:
        SourceError: a logit is NaN or infinite.
    """
    dtype = torch.float64 if logits_BV.is_cuda else torch.float32
    largest_B1 = logits_BV.max(dim=-1, keepdim=True).values
    summed_BV = logits_BV.sub_(largest_B1).exp_().cumsum(dim=-1, dtype=dtype)
    if not bool(summed_BV[:, -1].isfinite().all()):
        raise SourceError("The source's logits are not finite, so it cannot write text.", REMEDY)
    wanted_B1 = (uniform_B * BELOW_ONE)[:, None] * summed_BV[:, -1:]
    return torch.searchsorted(summed_BV, wanted_B1, right=True)[:, 0]


class GrowingLayer(DynamicLayer):
    """Keys and values in a buffer with room for more, so that a token does not copy the others."""

    def __init__(self, layer: Any) -> None:
        """Take over what another layer holds."""
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self._buffers: list[torch.Tensor] = [layer.keys, layer.values]
        self.keys, self.values = layer.keys, layer.values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append one token's keys and values; return all, as views."""
        old, new = self.keys.shape[-2], self.keys.shape[-2] + key_states.shape[-2]
        if new > self._buffers[0].shape[-2]:
            size = new + max(ROOM, new // 4)
            self._buffers = [_larger(part, size) for part in (self.keys, self.values)]
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., old:new, :] = states
        self.keys, self.values = (buffer[..., :new, :] for buffer in self._buffers)
        return self.keys, self.values


def _larger(part: torch.Tensor, size: int) -> torch.Tensor:
    buffer = part.new_empty(*part.shape[:-2], size, part.shape[-1])
    buffer[..., : part.shape[-2], :] = part
    return buffer


def _with_room(cache: Any) -> Any:
    """Return the model's own cache with room in the layers that hold every token.

    Raises:
        UnsupportedError: there is no cache.
    """
    if cache is None:
        raise UnsupportedError("The source's model keeps no cache to write text with.", REMEDY)
    for number, layer in enumerate(getattr(cache, "layers", ())):
        if type(layer) is DynamicLayer and layer.is_initialized:
            cache.layers[number] = GrowingLayer(layer)
    return cache


def _cache_name(model: PreTrainedModel) -> str:
    """Return what a model calls its cache, in calls and results: transformers 5.24 renamed it."""
    known = inspect.signature(model.forward).parameters
    return "cache" if "cache" in known else "past_key_values"


def text_bytes(model: PreTrainedModel, num_tokens: int) -> int:
    """Return what a text of so many tokens takes while it is written: its cache, and one's logits.

    The cache is measured, as models keep most different things: what is not keys or values is a
    state, which does not grow.
    """
    with torch.inference_mode():
        out = model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device))
    total: int = 4 * out.logits.numel() * out.logits.element_size()
    for layer in getattr(getattr(out, _cache_name(model)), "layers", ()):
        for name, value in vars(layer).items():
            times = num_tokens if name in {"keys", "values"} else 1
            parts = [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
            total += times * sum(part.numel() * part.element_size() for part in parts)
    return total


def fold_queries(model: PreTrainedModel) -> None:
    """Let a model attend in a way that is fast for single tokens.

    PyTorch's own kernels are made for long queries, and one of them is planned anew for every
    length of the cache. Models that choose another one keep it.
    """
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(FOLDED, folded_attention)
        AttentionMaskInterface.register(FOLDED, sdpa_mask)
        model.set_attn_implementation(FOLDED)


def folded_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend with the heads that share a key-value head, [B, H / G], as if they were tokens.

    Queries [B, H, 1, D], keys and values [B, G, S, D]; everything else goes to PyTorch's kernel.
    """
    if query.shape[2] != 1 or attention_mask is not None:
        done: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return done
    num_texts, num_heads, _, size = query.shape
    groups = key.shape[1]
    scale = size**-0.5 if scaling is None else scaling
    query = query.reshape(num_texts, groups, num_heads // groups, size) * scale
    weights = (query @ key.transpose(-1, -2)).softmax(dim=-1, dtype=torch.float32)
    return (weights.to(value.dtype) @ value).reshape(num_texts, 1, num_heads, value.shape[-1]), None
