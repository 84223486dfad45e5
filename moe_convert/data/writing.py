"""The dense source writes its own text: no data set, and no licence but the model's.

Half of the rows are documents, the other half chats, or all continue pieces of a given text,
sampled at temperature 1. Rows are made of pieces, which keeps batches large and caches short. What
was written is kept in the cache folder.

B rows · P pieces · T tokens · N tokens of a given text
"""

from __future__ import annotations

import gc
import hashlib
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_convert.checkpoint import TOKENIZER_FILES, Source
from moe_convert.checkpoint.gguf import cache_dir
from moe_convert.checkpoint.names import auto_class
from moe_convert.data.checks import check_varied
from moe_convert.data.packing import check_known, tokenizer_of
from moe_convert.data.starts import Start, chat_starts, continuations, document_start, end_tokens
from moe_convert.errors import UnsupportedError, UsageError
from moe_convert.runtime import bf16_is_fast, free_gpu_bytes
from moe_convert.wrappers import special_tokens

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

VERSION = 2
"""Part of the cache's key: to be raised when the same seed gives another text."""
PIECE_TOKENS = 256
MAX_BATCH = {"cpu": 256, "cuda": 1024}
CACHE_BYTES = 3 * 10**9
"""What texts in the making may take on a CPU, and must find free on a GPU."""
IDS = "ids"

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class SelfWriter:
    """Writes text with the model of a local source, on the device that `runtime.device` names."""

    source: Source
    progress: Progress = lambda what, done, total: None
    device: str = "auto"

    def __call__(
        self, rows: int, seq_len: int, seed: int, text_N: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return int64 [B, T], from the cache if the same was written before.

        Where there is `text_N` every piece continues some of it.

        Raises:
            UnsupportedError: transformers cannot load it as a model that writes text.
            SourceError: its logits are not finite.
            UsageError: its weights stay on the Hub, all it writes is one token, or the cache folder
                cannot be written.
        """
        if self.source.streamed:
            raise UsageError(
                "The source can only write text with its weights on this disk.",
                "Leave --no-download out, or give text with --data.",
            )
        path = cache_dir() / f"self-{_key(self.source, rows, seq_len, seed, text_N)}.safetensors"
        ids_BT = _kept(path)
        if ids_BT is None:
            ids_BT = self._write(rows, seq_len, seed, text_N)
            check_varied(ids_BT, "The source's own text")
            _keep(path, ids_BT)
        return ids_BT

    def _write(
        self, rows: int, seq_len: int, seed: int, text_N: torch.Tensor | None
    ) -> torch.Tensor:
        import torch

        from moe_convert.data.decoding import fold_queries

        self.progress("write", 0, rows * seq_len)
        model = load_writer(self.source.folder, self.device)
        fold_queries(model)
        tokenizer = _tokenizer(self.source.folder)
        try:
            return written(model, tokenizer, rows, seq_len, seed, text_N, self.progress)
        finally:
            del model
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def written(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    rows: int,
    seq_len: int,
    seed: int,
    text_N: torch.Tensor | None = None,
    progress: Progress = lambda what, done, total: None,
) -> torch.Tensor:
    """Return what a model writes, int64 [B, T]; nothing but the seed and the text decides it.

    Raises:
        UsageError: the tokenizer begins texts with a token that the model does not know.
    """
    import torch

    from moe_convert.data.decoding import sample, text_bytes

    config = model.config.get_text_config()
    num_pieces, width = pieces(seq_len, getattr(config, "max_position_embeddings", None))
    generator = torch.Generator().manual_seed(seed)
    uniform_PT = torch.rand(rows * num_pieces, width, generator=generator)
    if text_N is None:
        starts = row_starts(tokenizer, config, rows, num_pieces, generator)
    else:
        before = document_start(tokenizer, getattr(config, "bos_token_id", None)).first
        starts = continuations(text_N, before, rows * num_pieces, width, generator)
    given = (token for start in starts for part in (start.first, *start.turns) for token in part)
    check_known(max(given), config.vocab_size)
    ends = end_tokens(tokenizer, config, model.config, model.generation_config)
    if tokenizer is not None:
        ends |= {document_start(tokenizer, None).first[0]}
    known = min(len(tokenizer), config.vocab_size) if tokenizer else config.vocab_size
    banned = frozenset(special_tokens(model.config)) - ends
    batch = batch_size(model, text_bytes(model, width))
    made, total = list[torch.Tensor](), uniform_PT.numel()
    for first in range(0, len(starts), batch):
        some, uniform = starts[first : first + batch], uniform_PT[first : first + batch]
        step = partial(_report, progress, first * width, len(some), total)
        made.append(sample(model, some, uniform, ends, banned, known, step))
    return torch.cat(made).view(rows, num_pieces * width)[:, :seq_len].contiguous()


def _report(progress: Progress, before: int, num_texts: int, total: int, length: int) -> None:
    progress("write", before + num_texts * length, total)


def pieces(seq_len: int, max_positions: int | None) -> tuple[int, int]:
    """Return of how many pieces a row is made, and their length; the last may be cut shorter."""
    limit = min(2 * PIECE_TOKENS - 1, max_positions or seq_len)
    number = max(seq_len // PIECE_TOKENS, -(-seq_len // limit), 1)
    return number, -(-seq_len // number)


def row_starts(
    tokenizer: PreTrainedTokenizerBase | None,
    config: Any,
    rows: int,
    num_pieces: int,
    generator: torch.Generator,
) -> list[Start]:
    """Return the start of every piece: rows of documents and of chats take turns.

    Without a tokenizer a random token stands for the beginning of a chat.
    """
    import torch

    document = document_start(tokenizer, getattr(config, "bos_token_id", None))
    num_chats = rows // 2 * num_pieces
    if tokenizer is None:
        drawn = torch.randint(config.vocab_size, (num_chats,), generator=generator).tolist()
        chats = [Start((token,)) for token in drawn]
    else:
        known = chat_starts(tokenizer)
        chats = [known[number % len(known)] for number in range(num_chats)]
    return [
        chats[row // 2 * num_pieces + piece] if row % 2 else document
        for row in range(rows)
        for piece in range(num_pieces)
    ]


def batch_size(model: PreTrainedModel, per_text_bytes: int) -> int:
    """Return how many texts are written at once, which does not change them."""
    room_bytes = CACHE_BYTES
    if model.device.type == "cuda":
        room_bytes = max(room_bytes, free_gpu_bytes() // 2)
    return max(1, min(MAX_BATCH[model.device.type], room_bytes // per_text_bytes))


def load_writer(folder: Path | None, device: str = "auto") -> PreTrainedModel:
    """Load the source's model: bf16 on a GPU with room for it, or as this CPU is fastest.

    Raises:
        UnsupportedError: transformers cannot load it.
    """
    import torch
    from transformers import AutoConfig

    on_gpu = device != "cpu" and torch.cuda.is_available()
    try:
        if folder is None:
            raise OSError("there is no folder")
        config = AutoConfig.from_pretrained(folder)
        dtype = torch.bfloat16 if on_gpu or bf16_is_fast() else torch.float32
        model: PreTrainedModel = auto_class(config).from_pretrained(folder, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        raise UnsupportedError(
            f"The source cannot write text, for transformers does not load it: {_line(error)}.",
            "Give text with --data.",
        ) from error
    if on_gpu:
        needed_bytes = sum(p.numel() * p.element_size() for p in model.parameters()) + CACHE_BYTES
        if needed_bytes < 0.9 * free_gpu_bytes():
            model = model.to("cuda")
    return model.eval()


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def ram_bytes(num_params: int) -> int:
    """Return the memory that writing takes: the model, and texts in the making."""
    return (2 if bf16_is_fast() else 4) * num_params + CACHE_BYTES


def _tokenizer(folder: Path | None) -> PreTrainedTokenizerBase | None:
    try:
        return tokenizer_of(folder, "data.train self")
    except UsageError:
        return None


def _key(source: Source, rows: int, seq_len: int, seed: int, text_N: torch.Tensor | None) -> str:
    """Return a hash of all that decides the text: weights, tokenizer, seed, counts, given text."""
    files = {ref.path: ref for ref in source.tensors.values()}
    stamps = sorted((path.name, *map(str, ref.stamp)) for path, ref in files.items())
    parts = [repr((VERSION, PIECE_TOKENS, rows, seq_len, seed)), repr(stamps)]
    if text_N is not None:
        parts.append(hashlib.sha256(text_N.numpy().tobytes()).hexdigest())
    for name in sorted({*TOKENIZER_FILES, "config.json", "generation_config.json"}):
        file = source.folder / name if source.folder else None
        digest = hashlib.sha256(file.read_bytes()).hexdigest() if file and file.is_file() else ""
        parts.append(f"{name} {digest}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _kept(path: Path) -> torch.Tensor | None:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)[IDS].long()
    except (OSError, SafetensorError, KeyError):
        return None


def _keep(path: Path, ids_BT: torch.Tensor) -> None:
    from safetensors.torch import save_file

    unfinished = path.with_suffix(f".{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({IDS: ids_BT.int()}, unfinished)
        unfinished.replace(path)
    except OSError as error:
        raise UsageError(
            f"The source's own text cannot be kept in {path.parent}: {error.strerror}.",
            "Set MOE_CONVERT_CACHE to a folder that can be written.",
        ) from error
    finally:
        with suppress(OSError):
            unfinished.unlink()
