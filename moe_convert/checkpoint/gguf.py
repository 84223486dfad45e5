"""GGUF files through transformers' own loader: planned from their header, dequantised once."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_convert.checkpoint.names import stored_shapes
from moe_convert.checkpoint.safetensors import TensorRef
from moe_convert.checkpoint.source import Source, open_folder
from moe_convert.checkpoint.writer import sha256_of
from moe_convert.errors import MissingDependencyError, SourceError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def cache_dir() -> Path:
    """Folder of unpacked checkpoints: `MOE_CONVERT_CACHE`, or one below the user's cache."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "moe-convert"
    return Path(os.environ.get("MOE_CONVERT_CACHE", default))


def open_gguf(path: Path) -> Source:
    """Open a GGUF file: its configuration from the header, its tensors as fp32.

    Raises:
        MissingDependencyError: the `gguf` package is not installed.
        SourceError: transformers cannot read this file or its architecture.
    """
    config = _config(path)
    shapes = stored_shapes(config)
    tensors = {n: TensorRef(path, n, "F32", shape, 0) for n, shape in shapes.items()}
    unpacked_bytes = sum(ref.num_bytes for ref in tensors.values())
    return Source(
        path.name,
        {**config.to_dict(), "architectures": None},
        tensors,
        lambda: _unpack(path),
        sha=sha256_of(path),
        unpack_bytes=unpacked_bytes,
    )


def _config(path: Path) -> PreTrainedConfig:
    from transformers import AutoConfig

    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            "Reading a GGUF file needs the gguf package.", "pip install 'moe-convert[gguf]'"
        ) from error
    try:
        return AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    except (ValueError, KeyError, OSError, IndexError) as error:
        raise SourceError(f"{path.name} cannot be read as a GGUF model: {error}.") from error


def _unpack(path: Path) -> Source:
    """Dequantise into the cache, keyed by the file's hash, with tokenizer and chat template."""
    folder = cache_dir() / f"gguf-{sha256_of(path)[:32]}"
    if not folder.is_dir():
        partial = folder.with_name(folder.name + f".{os.getpid()}.partial")
        partial.mkdir(parents=True)
        try:
            _save_dense(path, partial)
            partial.rename(folder)
        except OSError as error:
            if not folder.is_dir():
                raise SourceError(f"Cannot unpack {path.name}: {error}.") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return open_folder(folder)


def _save_dense(path: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    options: dict[str, Any] = {"gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(
        path.parent,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
        **options,
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(path.parent, **options).save_pretrained(folder)
