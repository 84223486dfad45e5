"""GGUF files through transformers' own loader: planned from their header, dequantised once."""

from __future__ import annotations

import math
import os
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from moe_convert.checkpoint.hashing import sha256_of
from moe_convert.checkpoint.names import blueprint, stored_shapes
from moe_convert.checkpoint.safetensors import TensorRef
from moe_convert.checkpoint.source import Source, open_folder
from moe_convert.errors import MissingDependencyError, SourceError

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import PreTrainedConfig


UNREADABLE = (ValueError, KeyError, IndexError, RuntimeError, struct.error)
"""What the readers of a broken or unknown file raise."""


TAKEN_FROM_DEFAULTS = {
    "gemma4": "the head size of windowed layers, which layers those are, which of them share keys, "
    "and the inputs of every layer",
}
"""What transformers' loader does not read of an architecture's metadata, but fills in."""


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
    reader = _reader(path)
    _refuse_unread(reader, path, config)
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
        license=_value(reader, "general.license"),
    )


def _reader(path: Path) -> GGUFReader:
    from gguf import GGUFReader

    try:
        return GGUFReader(path)
    except (OSError, *UNREADABLE) as error:
        raise SourceError(f"{path.name} cannot be read as a GGUF model: {_line(error)}.") from error


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
    except (OSError, *UNREADABLE) as error:
        raise SourceError(f"{path.name} cannot be read as a GGUF model: {_line(error)}.") from error


def _refuse_unread(reader: GGUFReader, path: Path, config: PreTrainedConfig) -> None:
    """Refuse a file of which transformers would silently leave something out.

    Its loader skips tensors that have no place and metadata that it does not know, such as the
    frequency factors of a scaled rope: the model would then be another one.

    Raises:
        SourceError: naming what would be lost.
    """
    arch = _value(reader, "general.architecture")
    if arch in TAKEN_FROM_DEFAULTS:
        raise SourceError(
            f"Of a {arch} GGUF transformers does not read {TAKEN_FROM_DEFAULTS[arch]}: it takes "
            "them from its own defaults, so the model could be another.",
            "Give the original checkpoint as safetensors.",
        )
    try:
        lost = _unread(reader, config)
    except (OSError, *UNREADABLE) as error:
        raise SourceError(f"{path.name} cannot be read as a GGUF model: {_line(error)}.") from error
    if lost:
        raise SourceError(
            f"transformers does not read {lost[0]} of {path.name}, so its model would be another.",
            "Give the original checkpoint as safetensors.",
        )


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _unread(reader: GGUFReader, config: PreTrainedConfig) -> list[str]:
    lost = [f"tensor {name}" for name in _without_place(reader, config)]
    prefix = f"{_value(reader, 'general.architecture')}."
    for key, expected in _meant(config).items():
        found = _value(reader, prefix + key)
        if found and not any(_same(found, value) for value in expected):
            lost.append(f"{prefix}{key}={found}")
    return lost


def _without_place(reader: GGUFReader, config: PreTrainedConfig) -> list[str]:
    """Return the tensors that have no place in the model.

    Architectures with a conversion mapping of their own report theirs when they are loaded. For the
    others transformers asks every module by itself, since names may begin below the model; the
    model alone knows them all mostly, and much faster.
    """
    from transformers import modeling_gguf_pytorch_utils as loader
    from transformers.integrations import gguf as mapped

    arch = _value(reader, "general.architecture")
    if arch in getattr(mapped, "GGUF_CONFIG_ARCHS", {}):
        return []
    processor = loader.TENSOR_PROCESSORS.get(arch, loader.TensorProcessor)(config.to_dict())
    model, lost = blueprint(config), [tensor.name for tensor in reader.tensors]
    alone = SimpleNamespace(config=config, state_dict=model.state_dict, named_children=list)
    for asked in (alone, model):
        known = loader.get_gguf_hf_weights_map(asked, processor) if lost else {}
        lost = [name for name in lost if name not in known]
    return lost


def _meant(config: PreTrainedConfig) -> dict[str, set[Any]]:
    """Return the values that transformers' config stands for, by the key of the metadata."""
    rope = getattr(config, "rope_parameters", None) or {}
    ropes = [part for part in rope.values() if isinstance(part, dict)] or [rope]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    head_dims = {head_dim, getattr(config, "global_head_dim", None) or head_dim}
    kinds = {part.get("rope_type", "default") for part in ropes}
    rotary = {
        int(size * (part.get("partial_rotary_factor") or 1.0))
        for part in ropes
        for size in head_dims
    }
    return {
        "rope.freq_base": {part.get("rope_theta") for part in ropes},
        "rope.dimension_count": rotary,
        "rope.scaling.type": {"none"} if kinds == {"default"} else kinds,
        "attention.key_length": head_dims,
        "attention.sliding_window": {getattr(config, "sliding_window", None)},
        "attention.shared_kv_layers": {getattr(config, "num_kv_shared_layers", 0)},
        "attention.layer_norm_rms_epsilon": _any_of(config, EPSILONS),
        "attention.layer_norm_epsilon": _any_of(config, EPSILONS),
        "attn_logit_softcapping": _any_of(config, ("attn_logit_softcapping",)),
        "final_logit_softcapping": _any_of(config, ("final_logit_softcapping",)),
        "expert_count": set(),
    }


EPSILONS = ("rms_norm_eps", "norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon")


def _any_of(config: PreTrainedConfig, attributes: tuple[str, ...]) -> set[Any]:
    return {getattr(config, attribute, None) for attribute in attributes}


def _same(found: Any, value: Any) -> bool:
    if isinstance(found, str) or value is None:
        return bool(found == value)
    return math.isclose(found, value, rel_tol=1e-5)


def _value(reader: GGUFReader, key: str) -> Any:
    """Return one number or text of the metadata; None if it is absent."""
    field = reader.fields.get(key)
    if field is None or len(field.data) != 1:
        return None
    part = field.parts[field.data[0]]
    return bytes(part).decode() if str(field.types[0].name) == "STRING" else part[0].item()


def _unpack(path: Path) -> Source:
    """Dequantise into the cache, keyed by the file's hash, with tokenizer and chat template."""
    folder = cache_dir() / f"gguf-{sha256_of(path)[:32]}"
    if not folder.is_dir():
        partial = folder.with_name(folder.name + f".{os.getpid()}.partial")
        partial.mkdir(parents=True)
        try:
            _save_dense(path, partial)
            partial.rename(folder)
        except (OSError, *UNREADABLE) as error:
            if not folder.is_dir():
                raise SourceError(f"Cannot unpack {path.name}: {_line(error)}.") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return open_folder(folder)


def _save_dense(path: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    options: dict[str, Any] = {"gguf_file": path.name}
    model, info = AutoModelForCausalLM.from_pretrained(
        path.parent,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
        **options,
    )
    wrong = sorted(map(str, (*info["missing_keys"], *info["unexpected_keys"])))
    if wrong:
        raise SourceError(
            f"{path.name} and its metadata do not agree on {wrong[0]} ({len(wrong)} such tensors).",
            "Give the original checkpoint as safetensors.",
        )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(path.parent, **options).save_pretrained(folder)
