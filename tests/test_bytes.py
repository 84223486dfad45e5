"""Invariants 4 and 8: nothing but FFNs changes, and a seed decides every byte."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from moe_convert.checkpoint import read_folder, sha256_of
from moe_convert.convert import convert
from moe_convert.families import FAMILIES, split_name
from moe_convert.manifest import MANIFEST_NAME, load_manifest
from moe_convert.targets import TARGETS
from tests.conftest import Dense
from tests.tiny import NUM_LAYERS, pairs
from tests.tools import converted, difference, digest, logits, planned, tensors

SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
    "LICENSE",
)

ROTATED = {
    f"self_attn.{part}.{kind}" for part in ("q_proj", "k_proj") for kind in ("weight", "bias")
}
VERBATIM = [
    case for case in pairs() if not FAMILIES[case[0]].tensors and not TARGETS[case[2]].places
]
"""Rows that rewrite no tensor; what the others rewrite (norms of 1 + w, …) shows in the parity."""
PLAIN = [
    case
    for case in pairs()
    if case[0] in {"llama", "mistral", "qwen2", "qwen3"}
    and case[2] in {"mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe"}
]


def routers(names: set[str], target: str) -> set[str]:
    return {name for name in names if split_name(name)[1] == TARGETS[target].router}


@pytest.mark.parametrize(("model_type", "variant", "target"), VERBATIM)
def test_everything_but_the_ffns_is_byte_equal(
    dense: Dense, tmp_path: Path, model_type: str, variant: str, target: str
) -> None:
    source = dense(model_type, variant)
    plan = planned(source, tmp_path / "out", target__architecture=target)
    convert(plan)
    before, after = tensors(source), tensors(tmp_path / "out")
    turned = ROTATED if plan.layout.body.interleaved_rope else set()
    moved = {*FAMILIES[model_type].ffn_names.names, *turned}
    kept = {name for name in before if split_name(name)[1] not in moved}
    assert len(kept) > NUM_LAYERS
    assert kept <= after.keys()
    assert [name for name in sorted(kept) if before[name] != after[name]] == []


@pytest.mark.parametrize(("model_type", "variant", "target"), PLAIN)
def test_every_clone_holds_the_dense_bytes(
    dense: Dense, tmp_path: Path, model_type: str, variant: str, target: str
) -> None:
    source = dense(model_type, variant)
    converted(source, tmp_path / "out", target__architecture=target)
    before, after = tensors(source), tensors(tmp_path / "out")
    clones: dict[tuple[str, str], list[bytes]] = {}
    for name, data in after.items():
        if found := re.fullmatch(r"(model\.layers\.\d+)\..*\.experts\.(\d+)\..*", name):
            clones.setdefault((found[1], found[2]), []).append(data)
    assert len(clones) == 4 * NUM_LAYERS
    for (layer, _), parts in clones.items():
        mlp = [f"{layer}.mlp.{part}_proj.weight" for part in ("gate", "up", "down")]
        assert sorted(parts) == sorted(before[name] for name in mlp)


def test_an_untied_head_is_the_embedding(dense: Dense, tmp_path: Path) -> None:
    converted(dense("llama", "tied"), tmp_path / "out")
    after = tensors(tmp_path / "out")
    assert after["lm_head.weight"] == after["model.embed_tokens.weight"]


def test_side_files_are_byte_equal(dense: Dense, tmp_path: Path) -> None:
    source, output = dense(), tmp_path / "out"
    converted(source, output)
    for name in SIDE_FILES:
        assert (output / name).read_bytes() == (source / name).read_bytes(), name
    assert sorted(digest(output)) == sorted(
        [*SIDE_FILES, "config.json", "recipe.yaml", "model.safetensors", MANIFEST_NAME]
    )


def test_the_source_is_left_alone(dense: Dense, tmp_path: Path) -> None:
    before = digest(dense())
    converted(dense(), tmp_path / "out")
    assert digest(dense()) == before


def test_the_manifest_knows_every_file_by_its_hash(dense: Dense, tmp_path: Path) -> None:
    output = tmp_path / "out"
    converted(dense(), output, output__max_shard_size="200KB")
    files = {f.path: (f.size, f.sha256) for f in load_manifest(output).target.files}
    expected = {
        str(path.relative_to(output)): (path.stat().st_size, sha256_of(path))
        for path in output.rglob("*")
        if path.is_file() and path.name != MANIFEST_NAME
    }
    assert files == expected
    assert {name: sha for name, (_, sha) in files.items()} == {
        name: sha for name, sha in digest(output).items() if name != MANIFEST_NAME
    }


@pytest.mark.parametrize("init", ["normal", "orthogonal"])
def test_a_seed_decides_everything(dense: Dense, tmp_path: Path, init: str) -> None:
    for name, seed in (("one", 3), ("same", 3), ("other", 4)):
        converted(
            dense(), tmp_path / name, router__seed=seed, experts__seed=seed, router__init=init
        )
    one, same, other = (digest(tmp_path / name) for name in ("one", "same", "other"))
    for files in (one, same, other):
        del files[MANIFEST_NAME]
    assert one == same
    before, after = tensors(tmp_path / "one"), tensors(tmp_path / "other")
    changed = {name for name in before if before[name] != after[name]}
    assert changed == routers(set(before), "mixtral")


def test_routers_differ_between_layers(dense: Dense, tmp_path: Path) -> None:
    """In their directions: their lengths differ with the norm before each layer's FFN."""
    converted(dense(), tmp_path / "out", router__measure=False)
    refs = read_folder(tmp_path / "out")
    found = [refs[name].read().flatten() for name in sorted(routers(set(refs), "mixtral"))]
    one, two, three = (router / router.norm() for router in found)
    assert max(abs(float(a @ b)) for a, b in ((one, two), (two, three), (one, three))) < 0.5


def test_the_global_generator_is_not_touched(dense: Dense, tmp_path: Path) -> None:
    import torch

    torch.manual_seed(0)
    expected = torch.rand(4)
    torch.manual_seed(0)
    converted(dense(), tmp_path / "out")
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.parametrize("size", ["10KB", "100KB", "1MB"])
def test_sharding_changes_no_tensor(dense: Dense, tmp_path: Path, size: str) -> None:
    converted(dense(), tmp_path / "whole")
    converted(dense(), tmp_path / "parts", output__max_shard_size=size)
    whole, parts = tensors(tmp_path / "whole"), tensors(tmp_path / "parts")
    assert list(whole) == sorted(parts, key=list(whole).index)
    assert whole == parts
    assert difference(logits(tmp_path / "whole"), logits(tmp_path / "parts")) == 0.0


def test_the_index_is_right(dense: Dense, tmp_path: Path) -> None:
    output = tmp_path / "out"
    converted(dense(), output, output__max_shard_size="150KB")
    index = json.loads((output / "model.safetensors.index.json").read_text(encoding="utf-8"))
    files = sorted(output.glob("model-*.safetensors"))
    count = len(files)
    assert count > 2
    assert [f.name for f in files] == [
        f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)
    ]
    assert set(index["weight_map"].values()) == {f.name for f in files}
    refs = read_folder(output)
    for name, ref in refs.items():
        assert index["weight_map"][name] == ref.path.name
    assert index["metadata"]["total_size"] == sum(ref.num_bytes for ref in refs.values())
    for file in files:
        held = [ref.num_bytes for ref in refs.values() if ref.path == file]
        assert sum(held) <= 150_000 or len(held) == 1


def test_a_sharded_source_gives_the_same_bytes(dense: Dense, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    sharded = tmp_path / "dense-model"
    AutoModelForCausalLM.from_pretrained(dense()).save_pretrained(sharded, max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    converted(dense(), tmp_path / "from-one", router__measure=False)
    converted(sharded, tmp_path / "from-many", router__measure=False)
    assert tensors(tmp_path / "from-one") == tensors(tmp_path / "from-many")
