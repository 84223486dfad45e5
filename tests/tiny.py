"""Tiny dense checkpoints that transformers itself makes: a row per model type and variant.

A new family is a new entry of `TINY`. Norms, biases and matrices are drawn at random, so that a
tensor that gets lost, swapped or rounded shows in the logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_convert.families import FAMILIES
from tests.tiny_granite import BRANCHED
from tests.tiny_native import NATIVE
from tests.tiny_others import OTHERS

NUM_LAYERS = 3
VOCAB_SIZE = 272
BASE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 256,
}


@dataclass(frozen=True)
class Tiny:
    """What a variant adds to `BASE`, and which targets of its family have no place for it."""

    config: Mapping[str, Any] = field(default_factory=dict)
    refused_by: tuple[str, ...] = ()


TINY: dict[str, dict[str, Tiny]] = {
    "llama": {
        "plain": Tiny(),
        "llama3_rope": Tiny({"rope_parameters": LLAMA3_ROPE}),
        "yarn": Tiny({"rope_parameters": YARN_ROPE}),
        "linear": Tiny(
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}
        ),
        "tied": Tiny({"tie_word_embeddings": True}),
        "wide_heads": Tiny({"head_dim": 32}),
        "bias": Tiny(
            {"attention_bias": True}, refused_by=("mixtral", "glm4_moe", "qwen2_moe", "solar_open")
        ),
    },
    "mistral": {
        "window": Tiny({"sliding_window": 8}, refused_by=("glm4_moe",)),
        "full": Tiny({"sliding_window": None}),
    },
    "qwen2": {
        "plain": Tiny(),
        "tied": Tiny({"tie_word_embeddings": True}),
        "mixed_windows": Tiny(
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            refused_by=("glm4_moe",),
        ),
    },
    "qwen3": {
        "plain": Tiny({"head_dim": 16}),
        "tied_wide_heads": Tiny({"tie_word_embeddings": True, "head_dim": 32}),
        "windows": Tiny(
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
            refused_by=("glm4_moe", "hy_v3"),
        ),
        "mixed_windows": Tiny(
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            refused_by=("qwen3_moe", "glm4_moe", "hy_v3"),
        ),
        "bias": Tiny({"attention_bias": True}, refused_by=("glm4_moe",)),
    },
}
TINY |= {
    family: {name: Tiny(config) for name, config in variants.items()}
    for family, variants in NATIVE.items()
}
TINY |= {
    family: {name: Tiny(config, refused) for name, (config, refused) in variants.items()}
    for family, variants in (OTHERS | BRANCHED).items()
}
"""Variants by model type; the first one of each stands for the family where one is enough."""


def cases(*, refused: bool = False) -> list[tuple[str, str, str]]:
    """Return (family, variant, target) of every pair that must convert, or must be refused."""
    return [
        (name, variant, target)
        for name, family in FAMILIES.items()
        for variant, tiny in TINY[name].items()
        for target in family.targets
        if (target in tiny.refused_by) == refused
    ]


def pairs() -> list[tuple[str, str, str]]:
    """Return one (family, variant, target) for every row of the tables."""
    first: dict[tuple[str, str], tuple[str, str, str]] = {}
    for name, variant, target in cases():
        first.setdefault((name, target), (name, variant, target))
    return list(first.values())


def make_dense(
    model_type: str, variant: str, folder: Path, *, dtype: str = "float32", **changes: Any
) -> Path:
    """Save a random checkpoint with tokenizer and generation config, and return its folder."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GenerationConfig

    values = {**BASE, **TINY[model_type][variant].config, **changes}
    config = CONFIG_MAPPING[model_type](**values)
    torch.manual_seed(11)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in _small_parameters(model):
            around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(around + 0.1 * torch.randn_like(parameter))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    make_tokenizer(folder)
    GenerationConfig(do_sample=True, temperature=0.7, eos_token_id=1).save_pretrained(folder)
    (folder / "LICENSE").write_text("Do what you like with this.\n", encoding="utf-8")
    return folder


def _small_parameters(model: Any) -> Iterator[tuple[str, Any]]:
    return ((name, p) for name, p in model.named_parameters() if p.dim() == 1)


def make_tokenizer(folder: Path) -> None:
    """Save a byte-level tokenizer of `VOCAB_SIZE` tokens with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        show_progress=False,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(["the river and the lower fields were under the water"], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    fast.save_pretrained(folder)
