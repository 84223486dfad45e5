"""Tiny GGUF files as llama.cpp's converter writes them, from tiny checkpoints of transformers.

Names come from gguf's own table, turned round; values are changed as that converter does, which is
what transformers has to undo: rows of q and k interleaved, norms stored as 1 + w, and so on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.tiny import make_tokenizer

Array = Any
"""A numpy array."""

SIZES: Mapping[str, Any] = {
    "vocab_size": 272,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
GPT2 = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 1024, "vocab_size": 272}
BYTES = [f"<0x{n:02X}>" for n in range(256)]
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_conv_kernel_dim": 4,
}
QWEN35_ROPE = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "mrope_section": [2, 1, 1],
    "mrope_interleaved": True,
    "partial_rotary_factor": 0.5,
}


def kept(name: str, value: Array, config: Any) -> Array:
    """Store the value as it is."""
    return value


def interleaved(name: str, value: Array, config: Any) -> Array:
    """Order the rows of q and k as llama.cpp's rotary embedding wants them."""
    if not name.endswith(("attn_q.weight", "attn_k.weight")):
        return value
    query = "attn_q" in name
    heads = config.num_attention_heads if query else config.num_key_value_heads
    halves = value.reshape(heads, 2, -1, value.shape[1])
    return halves.swapaxes(1, 2).reshape(value.shape)


def norms_plus_one(name: str, value: Array, config: Any) -> Array:
    """Store norms as what multiplies."""
    return value + 1 if name.endswith("norm.weight") else value


def transposed(name: str, value: Array, config: Any) -> Array:
    """Store Conv1D as a linear layer."""
    linear = ("attn_qkv.weight", "attn_output.weight", "ffn_up.weight", "ffn_down.weight")
    return value.T if name.endswith(linear) else value


def squeezed(name: str, value: Array, config: Any) -> Array:
    """Store a depthwise convolution without its axis of one channel."""
    return value.squeeze(1) if value.ndim == 3 else value


def qwen35(name: str, value: Array, config: Any) -> Array:
    """Norms plus one but those of the linear attention, decay as -exp, value heads tiled."""
    if name.endswith("ssm_a"):
        value = -np.exp(value)
    elif name.endswith("norm.weight") and "ssm_norm" not in name:
        value = value + 1
    value = squeezed(name, value, config)
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    width = config.linear_value_head_dim
    per_value = _tiled(keys, values // keys, width)
    before = 2 * keys * config.linear_key_head_dim
    if name.endswith(("ssm_a", "ssm_dt.bias", "ssm_alpha.weight", "ssm_beta.weight")):
        return value[_tiled(keys, values // keys, 1)]
    if name.endswith("attn_gate.weight"):
        return value[per_value]
    if name.endswith(("attn_qkv.weight", "ssm_conv1d.weight")):
        return np.concatenate([value[:before], value[before:][per_value]])
    return value[:, per_value] if name.endswith("ssm_out.weight") else value


def _tiled(keys: int, per_key: int, width: int) -> Array:
    grouped = np.arange(keys * per_key * width).reshape(keys, per_key, width)
    return grouped.swapaxes(0, 1).reshape(-1)


@dataclass(frozen=True)
class TinyGguf:
    """One architecture of llama.cpp: dense config, values, and metadata beyond the table."""

    model_type: str
    config: Mapping[str, Any]
    values: Callable[[str, Array, Any], Array] = kept
    metadata: Callable[[Any], Mapping[str, Any]] = lambda config: {}
    names: Mapping[str, str] = field(default_factory=dict)
    targets: tuple[str, ...] = ()


DECODER = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
}
LFM2 = {
    **DECODER,
    "model.embedding_norm": "token_embd_norm",
    "operator_norm": "attn_norm",
    "self_attn.out_proj": "attn_output",
    "self_attn.q_layernorm": "attn_q_norm",
    "self_attn.k_layernorm": "attn_k_norm",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w3": "ffn_up",
    "feed_forward.w2": "ffn_down",
    "conv.in_proj": "shortconv.in_proj",
    "conv.out_proj": "shortconv.out_proj",
    "conv.conv": "shortconv.conv",
}
QWEN35 = {
    **DECODER,
    "post_attention_layernorm": "post_attention_norm",
    "linear_attn.in_proj_qkv": "attn_qkv",
    "linear_attn.in_proj_z": "attn_gate",
    "linear_attn.in_proj_a": "ssm_alpha",
    "linear_attn.in_proj_b": "ssm_beta",
    "linear_attn.conv1d": "ssm_conv1d",
    "linear_attn.norm": "ssm_norm",
    "linear_attn.out_proj": "ssm_out",
    "linear_attn.A_log": "ssm_a",
    "linear_attn.dt_bias": "ssm_dt.bias",
}


def _heads(config: Any) -> int:
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def _lfm2(config: Any) -> dict[str, Any]:
    kinds = config.layer_types
    return {
        "attention.head_count_kv": [
            config.num_key_value_heads if kind == "full_attention" else 0 for kind in kinds
        ],
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "shortconv.l_cache": config.conv_L_cache,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }


def _qwen35(config: Any) -> dict[str, Any]:
    rope = config.rope_parameters
    return {
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "full_attention_interval": 4,
        "ssm.conv_kernel": config.linear_conv_kernel_dim,
        "ssm.state_size": config.linear_key_head_dim,
        "ssm.group_count": config.linear_num_key_heads,
        "ssm.time_step_rank": config.linear_num_value_heads,
        "ssm.inner_size": config.linear_num_value_heads * config.linear_value_head_dim,
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_sections": [*rope["mrope_section"], 0],
        "rope.dimension_count": int(config.head_dim * rope["partial_rotary_factor"]),
    }


FILES: dict[str, TinyGguf] = {
    "llama": TinyGguf("llama", {**SIZES, "head_dim": 32}, interleaved),
    "qwen2": TinyGguf("qwen2", SIZES),
    "qwen3": TinyGguf(
        "qwen3",
        {**SIZES, "head_dim": 128, "tie_word_embeddings": True},
        metadata=lambda c: {"attention.key_length": c.head_dim},
    ),
    "phi3": TinyGguf("phi3", {**SIZES, "sliding_window": None}),
    "stablelm": TinyGguf("stablelm", {**SIZES, "use_qkv_bias": True}),
    "nemotron": TinyGguf("nemotron", SIZES, norms_plus_one),
    "gemma3": TinyGguf(
        "gemma3_text",
        {**SIZES, "num_hidden_layers": 6, "head_dim": 32, "sliding_window": 8,
         "query_pre_attn_scalar": 256},
        norms_plus_one,
    ),
    "lfm2": TinyGguf(
        "lfm2",
        {**SIZES, "layer_types": ["conv", "full_attention", "conv"], "norm_eps": 1e-5,
         "block_auto_adjust_ff_dim": False, "tie_word_embeddings": True},
        squeezed,
        _lfm2,
        LFM2,
    ),
    "qwen35": TinyGguf(
        "qwen3_5_text",
        {**SIZES, **LINEAR, "num_hidden_layers": 4, "head_dim": 16, "rope_parameters": QWEN35_ROPE},
        qwen35,
        _qwen35,
        QWEN35,
    ),
    "gemma2": TinyGguf(
        "gemma2",
        {**SIZES, "head_dim": 32, "sliding_window": 8},
        norms_plus_one,
        lambda c: {
            "attn_logit_softcapping": float(c.attn_logit_softcapping),
            "final_logit_softcapping": float(c.final_logit_softcapping),
        },
    ),
    "gpt2": TinyGguf("gpt2", {**GPT2, "bos_token_id": 0, "eos_token_id": 1}, transposed),
    "starcoder2": TinyGguf("starcoder2", {**SIZES, "sliding_window": None}),
}  # fmt: skip
"""One small file for each architecture, by its name in llama.cpp."""


def dense_of(arch: str, folder: Path, **changes: Any) -> Path:
    """Save the checkpoint that a file is made from; norms and biases are random."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    tiny = FILES[arch]
    torch.manual_seed(3)
    config = CONFIG_MAPPING[tiny.model_type](**{**tiny.config, **changes})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter += 0.1 * torch.randn_like(parameter)
            elif "conv" in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def write_gguf(arch: str, dense: Path, path: Path, *, kind: str = "F32", **metadata: Any) -> Path:
    """Write a checkpoint as a GGUF whose matrices are stored as `kind`; return its path.

    `metadata` adds keys below the architecture, dots written as two underscores, tensors, and a
    license.
    """
    import gguf
    from transformers import AutoModelForCausalLM

    tiny = FILES[arch]
    model = AutoModelForCausalLM.from_pretrained(dense)
    config = model.config
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, arch)
    extra, license_id = metadata.pop("tensors", {}), metadata.pop("license", None)
    if license_id:
        writer.add_license(license_id)
    keys = {**_table(arch, config), **tiny.metadata(config)}
    keys |= {key.replace("__", "."): value for key, value in metadata.items()}
    for key, value in keys.items():
        _add(writer, f"{arch}.{key}", value)
    (_add_sentencepiece if arch.startswith("gemma") else _add_byte_level)(writer, dense)
    names = _names(arch, tiny, model)
    state = model.state_dict()
    for ours, theirs in names.items():
        value = tiny.values(theirs, state[ours].numpy(), config)
        _add_tensor(writer, theirs, np.ascontiguousarray(value), kind)
    for name, value in extra.items():
        _add_tensor(writer, name, value, "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _table(arch: str, config: Any) -> dict[str, Any]:
    """Return the keys that transformers reads for an architecture, and its plain sizes."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_CONFIG_MAPPING

    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    theta = rope.get("rope_theta")
    wanted = {
        "context_length": "max_position_embeddings",
        "block_count": "num_hidden_layers",
        "feed_forward_length": "intermediate_size",
        "embedding_length": "hidden_size",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
        **{k: v for k, v in GGUF_CONFIG_MAPPING.get(arch, {}).items() if v},
    }
    values = {}
    for key, attribute in wanted.items():
        value = theta if attribute == "rope_theta" else getattr(config, attribute, None)
        if value is not None:
            values[key] = float(value) if "epsilon" in key or "freq_base" in key else value
    if theta is not None:
        fraction = rope.get("partial_rotary_factor") or 1.0
        values["rope.dimension_count"] = int(_heads(config) * fraction)
        values["rope.freq_base"] = float(theta)
    return values


def _names(arch: str, tiny: TinyGguf, model: Any) -> dict[str, str]:
    """Return the name in the file of every tensor."""
    tied = set(model.all_tied_weights_keys or {})
    if tiny.names:
        return {n: _replaced(n, tiny.names) for n in model.state_dict() if n not in tied}
    from transformers.modeling_gguf_pytorch_utils import TensorProcessor, get_gguf_hf_weights_map

    found = get_gguf_hf_weights_map(model, TensorProcessor())
    names = {ours: theirs for theirs, ours in found.items() if ours not in tied}
    assert set(names) == set(model.state_dict()) - tied, arch
    return names


def _replaced(name: str, table: Mapping[str, str]) -> str:
    for ours, theirs in table.items():
        name = f".{name}.".replace(f".{ours}.", f".{theirs}.").strip(".")
    return name


def _add(writer: Any, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_uint32(key, int(value))


def _add_tensor(writer: Any, name: str, value: Array, kind: str) -> None:
    import gguf

    stored = gguf.GGMLQuantizationType[kind]
    if kind == "F32" or value.ndim != 2 or value.shape[1] % 32:
        writer.add_tensor(name, value.astype(np.float32))
    elif kind == "F16":
        writer.add_tensor(name, value.astype(np.float16))
    else:
        writer.add_tensor(name, gguf.quants.quantize(value, stored), raw_dtype=stored)


def _add_sentencepiece(writer: Any, folder: Path) -> None:
    pieces = ["\u2581", "e", "t", "h", "r", "i", "v", "th", "the", "\u2581the", "ri", "er"]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(["<pad>", "<eos>", "<bos>", "<unk>", *BYTES, *pieces])
    writer.add_token_scores([0.0] * 260 + [-float(n) for n in range(len(pieces))])
    writer.add_token_types([3, 3, 3, 2, *[6] * 256, *[1] * len(pieces)])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(0)


def _add_byte_level(writer: Any, folder: Path) -> None:
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, *[1] * (len(tokens) - 2)])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(1)
