"""Checkpoints that are no safetensors: legacy .bin files, whose code never runs, and GGUF."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_convert.checkpoint import open_source
from moe_convert.errors import SourceError
from moe_convert.workflow import upcycle
from tests.conftest import Dense
from tests.tiny import BASE, NUM_LAYERS
from tests.tools import converted, difference, logits, planned, tensors

BIN = "pytorch_model.bin"


def as_bin(folder: Path, copy: Path, *, shards: int = 1) -> Path:
    """Copy a checkpoint with its weights as torch pickles."""
    import torch
    from safetensors.torch import load_file

    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    state = load_file(folder / "model.safetensors")
    names = sorted(state)
    if shards == 1:
        torch.save(state, copy / BIN)
        return copy
    files = {
        n: f"pytorch_model-{i % shards + 1:05d}-of-{shards:05d}.bin" for i, n in enumerate(names)
    }
    for file in set(files.values()):
        torch.save({n: state[n] for n in names if files[n] == file}, copy / file)
    index = {"metadata": {}, "weight_map": files}
    (copy / f"{BIN}.index.json").write_text(json.dumps(index), encoding="utf-8")
    return copy


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bin_files_give_the_same_bytes(
    dense: Dense, tmp_path: Path, shards: int, dtype: str
) -> None:
    source = dense(dtype=dtype)
    converted(as_bin(source, tmp_path / "dense-model", shards=shards), tmp_path / "out")
    converted(source, tmp_path / "expected")
    assert tensors(tmp_path / "out") == tensors(tmp_path / "expected")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        source / "tokenizer.json"
    ).read_bytes()


class Malicious:
    """Unpickling this would make a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)


def test_a_malicious_pickle_is_refused_and_never_runs(dense: Dense, tmp_path: Path) -> None:
    import torch

    folder = as_bin(dense(), tmp_path / "dense-model")
    torch.save({"model.norm.weight": Malicious(tmp_path / "pwned")}, folder / BIN)
    with pytest.raises(SourceError, match="pickled code is never run"):
        converted(folder, tmp_path / "out")
    assert not (tmp_path / "pwned").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        (BIN, b""),
        (BIN, b"\x80\x02}q\x00."),
        (BIN, b"PK\x03\x04 no archive"),
        (f"{BIN}.index.json", b'{"weight_map": {"a": "../x.bin"}}'),
        (f"{BIN}.index.json", b'{"weight_map": {"a": "gone.bin"}}'),
        (f"{BIN}.index.json", b"{"),
    ],
)
def test_broken_bin_files_are_refused(
    dense: Dense, tmp_path: Path, file: str, content: bytes
) -> None:
    folder = as_bin(dense(), tmp_path / "dense-model")
    (folder / file).write_bytes(content)
    with pytest.raises(SourceError):
        planned(folder)


@pytest.mark.parametrize("content", [[1, 2], {"model.norm.weight": 3.0}])
def test_a_bin_file_of_something_else_is_refused(
    dense: Dense, tmp_path: Path, content: object
) -> None:
    import torch

    folder = as_bin(dense(), tmp_path / "dense-model")
    torch.save(content, folder / BIN)
    with pytest.raises(SourceError):
        planned(folder)


def as_gguf(folder: Path, path: Path) -> Path:
    """Write a tiny Llama as llama.cpp does: its names, q and k interleaved, a BPE tokenizer."""
    from gguf import GGUFWriter
    from safetensors.numpy import load_file

    state = load_file(folder / "model.safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(BASE["max_position_embeddings"])
    writer.add_embedding_length(BASE["hidden_size"])
    writer.add_block_count(NUM_LAYERS)
    writer.add_feed_forward_length(BASE["intermediate_size"])
    writer.add_head_count(BASE["num_attention_heads"])
    writer.add_head_count_kv(BASE["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(BASE["vocab_size"])
    _add_tokenizer(writer, folder)
    for name, tensor in state.items():
        writer.add_tensor(_gguf_name(name), _interleaved(name, tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add_tokenizer(writer: Any, folder: Path) -> None:
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, *[1] * (len(tokens) - 2)])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")


def _gguf_name(name: str) -> str:
    for ours, theirs in (
        ("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"), ("lm_head", "output"),
        ("model.layers", "blk"), ("self_attn.q_proj", "attn_q"), ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"), ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"), ("mlp.up_proj", "ffn_up"), ("mlp.down_proj", "ffn_down"),
        ("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm"),
    ):  # fmt: skip
        name = name.replace(ours, theirs)
    return name


def _interleaved(name: str, tensor: np.ndarray) -> np.ndarray:
    """Order the rows of q and k as llama.cpp's rotary embedding wants them."""
    kind = name.split(".")[-2]
    if kind not in {"q_proj", "k_proj"}:
        return tensor
    heads = int(BASE["num_attention_heads" if kind == "q_proj" else "num_key_value_heads"])
    halves = tensor.reshape(heads, 2, -1, tensor.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(tensor.shape))


def test_a_gguf_computes_what_it_was_made_from(
    dense: Dense, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("MOE_CONVERT_CACHE", str(cache))
    path = as_gguf(dense(), tmp_path / "models" / "tiny.gguf")
    plan = planned(path, tmp_path / "out")
    assert not cache.exists()
    assert plan.source.name == "tiny.gguf"
    manifest = upcycle(plan)
    assert manifest.state == "verified"
    assert difference(logits(tmp_path / "out"), logits(dense())) <= 1e-4
    assert [folder.name[:5] for folder in cache.iterdir()] == ["gguf-"]
    from transformers import AutoTokenizer

    text = "the river 210 km, é"
    ids = [AutoTokenizer.from_pretrained(f)(text).input_ids for f in (tmp_path / "out", dense())]
    assert ids[0] == ids[1]
    chat = AutoTokenizer.from_pretrained(tmp_path / "out").apply_chat_template(
        [{"role": "user", "content": "hello"}], tokenize=False
    )
    assert chat == "hello"


def test_a_gguf_is_unpacked_once(dense: Dense, tmp_path: Path) -> None:
    path = as_gguf(dense(), tmp_path / "tiny.gguf")
    first = open_source(str(path)).fetch()
    assert first.folder is not None
    stamp = (first.folder / "model.safetensors").stat().st_mtime_ns
    second = open_source(str(path)).fetch()
    assert second.folder == first.folder
    assert (first.folder / "model.safetensors").stat().st_mtime_ns == stamp


@pytest.mark.parametrize("keep", [0, 10, 100, 5000, -2000])
def test_a_truncated_gguf_leaves_nothing(dense: Dense, tmp_path: Path, keep: int) -> None:
    path = as_gguf(dense(), tmp_path / "tiny.gguf")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(SourceError, match=r"tiny\.gguf") as caught:
        converted(path, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not [p for p in tmp_path.glob("**/*") if p.is_file() and p != path]
