"""What several test files need: recipes in one line, logits, tensors as bytes, broken copies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_convert.checkpoint import (
    CheckpointWriter,
    TensorRef,
    TensorSpec,
    read_folder,
    shard,
    stored_shapes,
)
from moe_convert.convert import convert
from moe_convert.manifest import Manifest
from moe_convert.plan import Plan, make_plan
from moe_convert.recipe import SCHEMA, Recipe, build_recipe
from tests.tiny import BASE

if TYPE_CHECKING:
    import torch

SMALL = {"target.num_experts": 4, "target.top_k": 2, "router.init": "normal"}


def recipe_of(source: Path | str, output: Path | None = None, **changes: Any) -> Recipe:
    """Return a recipe of four experts; `target__layers="1:"` sets `target.layers`."""
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    places = {"source.model": str(source), "output.dir": str(output) if output else None}
    return build_recipe({"schema": SCHEMA}, {**SMALL, **places, **dotted})


def planned(source: Path | str, output: Path | None = None, **changes: Any) -> Plan:
    """Return the plan of such a recipe."""
    return make_plan(recipe_of(source, output, **changes))


def converted(source: Path | str, output: Path, **changes: Any) -> Manifest:
    """Plan and convert without verifying; return the manifest."""
    return convert(planned(source, output, **changes))


def load(folder: Path, dtype: str = "float32") -> Any:
    """Load a folder as a user does; no key may be missing, left over or of another shape."""
    import torch
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), output_loading_info=True
    )
    wrong = {key: info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    assert not any(wrong.values()), wrong
    return model.eval()


def logits(folder: Path, dtype: str = "float32") -> torch.Tensor:
    """Return the logits of two sequences of random tokens, longer than any tiny window."""
    import torch

    model = load(folder, dtype)
    ids = torch.randint(
        model.config.vocab_size, (2, 48), generator=torch.Generator().manual_seed(5)
    )
    with torch.no_grad():
        return model(ids).logits.float()


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """Return the largest absolute difference."""
    return float((one - other).abs().max())


def raw(ref: TensorRef) -> bytes:
    """Return a tensor's bytes as they lie in its file."""
    with ref.path.open("rb") as file:
        file.seek(ref.offset)
        return file.read(ref.num_bytes)


def tensors(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every tensor of a folder."""
    return {name: raw(ref) for name, ref in read_folder(folder).items()}


def digest(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of a folder, by relative path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite a JSON file after `change` has altered its object."""
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Rewrite a folder's single safetensors file after `change` has altered its tensors."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    data = load_file(path)
    change(data)
    save_file({name: tensor.contiguous() for name, tensor in data.items()}, path, {"format": "pt"})


def hollow(folder: Path, *, num_layers: int, **sizes: int) -> Path:
    """Make a bf16 Llama whose header is whole and whose data is a hole: zeros that take no disk."""
    from transformers import LlamaConfig

    values = {**BASE, "num_hidden_layers": num_layers, **sizes}
    config = LlamaConfig(**values, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    specs = [TensorSpec(name, shape, "BF16") for name, shape in stored_shapes(config).items()]
    CheckpointWriter(folder, shard(specs, 10**12)).close()
    return folder
