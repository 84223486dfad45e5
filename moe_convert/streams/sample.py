"""A short mixed text for measurements that were given no data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SAMPLE_TEXT = """\
The river had risen in the night, and by morning the lower fields were under water. People from the
village carried what they could up the hill: blankets, two hens in a basket, a clock that had not
run for years. "It will be gone by Friday," said the old man, though nobody had asked him.

def mean(values: list[float]) -> float:
    if not values:
        raise ValueError("mean of nothing")
    return sum(values) / len(values)

A train leaves at 9:40 and travels 210 km at 84 km/h. How long does it take? 210 / 84 = 2.5, so it
arrives at 12:10. In biology, a cell membrane lets small molecules through and keeps large ones out;
the difference in concentration on its two sides stores energy. Le marché ouvre à huit heures. Die
Bibliothek ist am Sonntag geschlossen. Q: Which planet is closest to the sun? A: Mercury.
"""
"""A short mixed text for measurements that need some input and were given no data."""


def sample_ids(folder: Path | None, vocab_size: int, trust: bool = False) -> torch.Tensor:
    """Return token ids [1, T] of the sample text, or random ones without a tokenizer.

    `trust` says that code which lies in the folder is ours and may run.
    """
    import torch
    from transformers import AutoTokenizer

    try:
        if folder is None:
            raise OSError
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)
        ids_BT: torch.Tensor = tokenizer(SAMPLE_TEXT, return_tensors="pt").input_ids
    except (OSError, ValueError, KeyError):
        generator = torch.Generator().manual_seed(0)
        return torch.randint(vocab_size, (1, 256), generator=generator)
    return ids_BT[:, :512].clamp(max=vocab_size - 1)
