"""Names and shapes of what a dense checkpoint stores, worked out from its body alone.

This holds for decoders of attention projections, norms and a gated FFN; for any other `stored`
gives nothing, and transformers' own class has to be asked, which takes seconds to import.

D hidden size · F FFN neurons · H heads · C head size · V vocabulary
"""

from __future__ import annotations

from collections.abc import Iterator

from moe_convert.families.body import Body, DenseFamily, layer_name

Shape = tuple[int, ...]

NORMS = {
    "pre": ("input_layernorm", "post_attention_layernorm"),
    "post": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "sandwich": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    "parallel": ("input_layernorm",),
}
"""The norms of a layer, by the kind of block."""


def stored(family: DenseFamily, body: Body) -> dict[str, Shape] | None:
    """Return name and shape of every tensor of a checkpoint; None if the body does not tell."""
    if body.native is not None or family.token_tables:
        return None
    inside = {**dict(_attention(body)), **dict(_norms(body)), **dict(_ffn(family, body))}
    around = dict(_around(body))
    if not family.tensors.keys() <= inside.keys() | around.keys():
        return None
    for name in family.implied:
        inside.pop(name, None)
        around.pop(name, None)
    layers = {
        layer_name(layer, name): shape
        for layer in range(body.num_layers)
        for name, shape in inside.items()
    }
    return {**around, **layers}


def _around(body: Body) -> Iterator[tuple[str, Shape]]:
    table_VD = (body.vocab_size, body.hidden_size)
    yield "model.embed_tokens.weight", table_VD
    yield from _norm("model.norm", body.hidden_size, body)
    if not body.tied:
        yield "lm_head.weight", table_VD


def _norm(name: str, size: int, body: Body) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (size,)
    if body.norm == "layer":
        yield f"{name}.bias", (size,)


def _norms(body: Body) -> Iterator[tuple[str, Shape]]:
    for name in NORMS[body.block]:
        yield from _norm(name, body.hidden_size, body)


def _attention(body: Body) -> Iterator[tuple[str, Shape]]:
    queries, keys = body.num_heads * body.head_dim, body.num_kv_heads * body.head_dim
    for name, size in (("q", queries), ("k", keys), ("v", keys)):
        yield f"self_attn.{name}_proj.weight", (size, body.hidden_size)
        if body.qkv_bias:
            yield f"self_attn.{name}_proj.bias", (size,)
    yield "self_attn.o_proj.weight", (body.hidden_size, queries)
    if body.o_bias:
        yield "self_attn.o_proj.bias", (body.hidden_size,)
    if body.qk_norm is not None:
        whole = body.qk_norm == "full"
        yield "self_attn.q_norm.weight", (queries if whole else body.head_dim,)
        yield "self_attn.k_norm.weight", (keys if whole else body.head_dim,)


def _ffn(family: DenseFamily, body: Body) -> Iterator[tuple[str, Shape]]:
    names = family.ffn_names
    wide = body.ffn_size * (2 if names.fused else 1)
    sizes = {
        names.gate: (wide, body.hidden_size),
        names.up: (wide, body.hidden_size),
        names.down: (body.hidden_size, body.ffn_size),
    }
    for name, shape in sizes.items():
        yield name, shape
        if body.mlp_bias:
            yield name.removesuffix("weight") + "bias", shape[:1]
