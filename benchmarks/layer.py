"""How long a layer of a large model takes to split: random weights, the shape of one of 8B.

    python benchmarks/layer.py --work DIR [--device cuda] [--tokens 131072]

Writes a Llama of a few layers (hidden size 4096, FFN 14,336, 32 heads of which 8 hold keys) and
splits it with the default strategy into 64 parts, 16 of them active. Seconds are those from one
finished layer to the next, reading and writing included. Random weights and tokens say nothing
about quality; clustering them takes as many rounds as real ones.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
from controls import counts, split_plan

from moe_convert.convert import convert

SHAPE = {
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 2048,
}


def write_source(folder: Path, num_layers: int, shape: dict[str, int]) -> None:
    """Write the model in bf16, unless it is there."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if (folder / "config.json").is_file():
        return
    torch.manual_seed(0)
    config = LlamaConfig(num_hidden_layers=num_layers, dtype="bfloat16", **shape)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)


def write_text(path: Path, rows: int, seq_len: int, vocab_size: int) -> None:
    """Write random token ids as text, a word for each."""
    ids_BT = torch.randint(vocab_size, (rows, seq_len), generator=torch.Generator().manual_seed(1))
    lines = (" ".join(f"w{token}" for token in row) for row in ids_BT.tolist())
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write a tokenizer of so many words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{number}": number for number in range(vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w1"}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))


def main() -> None:
    """Print the seconds of every layer after the first."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=131_072)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--small", action="store_true", help="a shape to try the script with")
    args = parser.parse_args()
    shape = {**SHAPE, "hidden_size": 64, "intermediate_size": 1024} if args.small else SHAPE
    source, text, result = (args.work / name for name in ("source", "text.jsonl", "result"))
    write_source(source, args.layers, shape)
    write_tokenizer(source, shape["vocab_size"])
    write_text(text, args.tokens // args.seq_len, args.seq_len, shape["vocab_size"])
    shutil.rmtree(result, ignore_errors=True)
    fields = {
        "source.model": str(source),
        "target.architecture": "glm4_moe",
        "data.train": str(text),
        "data.max_tokens": args.tokens,
        "data.seq_len": args.seq_len,
        "runtime.device": args.device,
        **counts(0.25, 64),
    }
    times: list[float] = []

    def progress(what: str, done: int, total: int) -> None:
        if what == "split":
            times.append(time.monotonic())

    convert(split_plan(result, fields), progress)
    layers = [after - before for before, after in pairwise(times)][:-1]
    print("seconds a layer:", ", ".join(f"{seconds:.2f}" for seconds in layers))
    print(f"median {median(layers):.2f} s for {args.tokens:,} tokens, 6 wanted on an H100")
    print(f"peak RSS {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB", end="")
    if torch.cuda.is_available():
        print(f", of the GPU's memory {torch.cuda.max_memory_allocated() / 1e9:.2f} GB", end="")
    print()
    shutil.rmtree(result)


if __name__ == "__main__":
    main()
