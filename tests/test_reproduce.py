"""Making a result again: equal bytes, or which tensors differ, and never from another source."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from moe_convert.calibrate.job import Request, prepare
from moe_convert.calibrate.run import run
from moe_convert.calibration import Calibration
from moe_convert.card import check_card
from moe_convert.checkpoint import open_source, sha256_of
from moe_convert.data import Data
from moe_convert.errors import OutputExistsError, SourceError, UsageError
from moe_convert.manifest import load_manifest
from moe_convert.plan import make_plan
from moe_convert.provenance import content_sha256, unnamed
from moe_convert.recipe import SCHEMA, Recipe, build_recipe
from moe_convert.reproduce import Places, recipe_again, reproduce
from moe_convert.workflow import upcycle
from tests.conftest import Dense
from tests.test_cli import invoke
from tests.tools import converted, digest, edit_json, edit_tensors, tensors


@pytest.fixture
def source(dense: Dense, tmp_path: Path) -> Path:
    """Return a copy of the tiny Llama that a test may change."""
    return Path(shutil.copytree(dense(), tmp_path / "dense"))


def altered(folder: Path, name: str) -> None:
    """Change one element of one tensor."""

    def change(data: dict[str, Any]) -> None:
        data[name].view(-1)[3] += 0.5

    edit_tensors(folder, change)


def test_the_source_is_recorded_by_its_content(source: Path, tmp_path: Path) -> None:
    info = converted(source, tmp_path / "out").source
    assert info.files["model.safetensors"] == sha256_of(source / "model.safetensors")
    assert {"config.json", "tokenizer.json", "LICENSE"} <= info.files.keys()
    assert info.content_sha256 == content_sha256(info.files)
    moved = Path(shutil.copytree(source, tmp_path / "elsewhere" / "renamed"))
    (moved / "notes.txt").write_text("not read", encoding="utf-8")
    assert converted(moved, tmp_path / "again").source.content_sha256 == info.content_sha256
    altered(moved, "model.norm.weight")
    assert converted(moved, tmp_path / "other").source.content_sha256 != info.content_sha256
    assert str(tmp_path) not in (tmp_path / "out" / "moe_convert.json").read_text(encoding="utf-8")


def test_the_same_recipe_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    folder, new = tmp_path / "out", tmp_path / "new"
    edits = [{"edit": "noise", "std": 0.1}]
    converted(source, folder, experts__edits=edits, output__max_shard_size="100KB")
    before = digest(folder)
    found = reproduce(folder, new, Places(source=str(source)))
    assert (found.equal, found.files, found.tensors, found.versions) == (True, [], [], {})
    assert found.notes == []
    assert tensors(folder) == tensors(new)
    assert digest(folder) == before


def test_the_manifest_alone_is_enough(source: Path, tmp_path: Path) -> None:
    converted(source, tmp_path / "out")
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(tmp_path / "out" / "moe_convert.json", alone)
    assert reproduce(alone, places=Places(source=str(source))).equal
    assert (tmp_path / "alone-reproduced" / "model.safetensors").is_file()


def test_what_differs_is_named_with_how_much(source: Path, tmp_path: Path) -> None:
    folder, name = tmp_path / "out", "model.layers.1.self_attn.q_proj.weight"
    converted(source, folder)
    altered(folder, name)

    def forge(data: dict[str, Any]) -> None:
        (file,) = (f for f in data["target"]["files"] if f["path"] == "model.safetensors")
        file["sha256"] = sha256_of(folder / "model.safetensors")
        data["versions"]["torch"] = "1.0"
        data["hardware"]["gpu"] = "9 x Imaginary"

    edit_json(folder / "moe_convert.json", forge)
    found = reproduce(folder, tmp_path / "new", Places(source=str(source)))
    assert not found.equal
    assert found.files == ["model.safetensors"]
    (change,) = found.tensors
    assert (change.name, change.what) == (name, "differs")
    assert change.max_abs_diff == pytest.approx(0.5, rel=1e-5)
    assert change.share == pytest.approx(1 / 64**2)
    assert found.versions.keys() == {"torch"}
    assert [note for note in found.notes if "9 x Imaginary then" in note]
    result = invoke("reproduce", folder, "-o", tmp_path / "n2", "--source", source, "--json")
    assert result.exit_code == 5
    section = json.loads(result.stdout)["reproduction"]
    assert [tensor["name"] for tensor in section["tensors"]] == [name]
    assert section["versions"]["torch"][0] == "1.0"
    human = invoke("reproduce", folder, "-o", tmp_path / "n3", "--source", source).stdout
    assert f"{name} differs: up to 5.00e-01, in 0.02% of its elements" in human
    assert "torch: 1.0 then" in human


def test_tensors_that_are_missing_new_or_reshaped(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    converted(source, folder)

    def change(data: dict[str, Any]) -> None:
        data["mine"] = data.pop("model.norm.weight")
        data["lm_head.weight"] = data["lm_head.weight"][:5]

    edit_tensors(folder, change)
    edit_json(folder / "moe_convert.json", lambda data: data["target"]["files"].clear())
    found = reproduce(folder, tmp_path / "new", Places(source=str(source)))
    changes = {change.name: change.what for change in found.tensors}
    assert changes["mine"] == "is missing"
    assert changes["model.norm.weight"] == "is new"
    assert "was F32[5, 64]" in changes["lm_head.weight"]


def test_another_checkpoint_is_refused_before_anything_is_written(
    source: Path, tmp_path: Path
) -> None:
    converted(source, tmp_path / "out")
    altered(source, "model.norm.weight")
    with pytest.raises(SourceError, match=r"another checkpoint .*model\.safetensors differs"):
        reproduce(tmp_path / "out", tmp_path / "new", Places(source=str(source)))
    assert not list(tmp_path.glob("new*"))


def test_places_that_only_the_user_knows(source: Path, tmp_path: Path) -> None:
    text = tmp_path / "corpus.txt"
    text.write_text("The river rose all night and the lower fields were under water.\n" * 40)
    folder = tmp_path / "out"
    converted(source, folder, data__train=str(text), data__seq_len=64, data__max_tokens=256)
    manifest = load_manifest(folder)
    recipe = Recipe.model_validate(manifest.recipe)
    assert list(unnamed(manifest, recipe)) == [("--source", "dense"), ("--data", "corpus.txt")]
    for train in ("self", "org/text", None):
        data = recipe.data.model_copy(update={"train": train})
        elsewhere = recipe.model_copy(update={"data": data})
        assert list(unnamed(manifest, elsewhere)) == [("--source", "dense")]
    data = recipe.data.model_copy(update={"train": f"self:{text.name}"})
    continued = recipe.model_copy(update={"data": data})
    assert list(unnamed(manifest, continued))[1:] == [("--data", "corpus.txt")]
    for given in (str(text), f"self:{text}"):
        places = Places(source=str(source), data=given)
        assert recipe_again(manifest, continued, places, folder).data.train == f"self:{text}"
    with pytest.raises(UsageError, match=r"dense is recorded by its name only.*--source PATH"):
        reproduce(folder, tmp_path / "new")
    with pytest.raises(UsageError, match=r"corpus.txt.*--data PATH"):
        reproduce(folder, tmp_path / "new", Places(source=str(source)))
    found = reproduce(folder, tmp_path / "new", Places(str(source), data=str(text)))
    assert found.equal
    text.write_text("Other words about quite another thing.\n" * 60)
    other = reproduce(folder, tmp_path / "other", Places(str(source), data=str(text)))
    assert not other.equal
    assert other.notes == ["the data gave other tokens than were used then"]


def test_a_calibrated_folder_is_trained_again(source: Path, tmp_path: Path) -> None:
    text = tmp_path / "corpus.txt"
    text.write_text("".join(f"The river rose {n} feet in the night.\n" for n in range(200)))
    folder, edits = tmp_path / "out", [{"edit": "noise", "std": 0.1}]
    converted(source, folder, experts__edits=edits)
    section = Calibration(max_steps=2, batch_size=2)
    data = Data(train=str(text), seq_len=32)
    run(*prepare(Request(folder, open_source(str(source)), section, data)))
    assert load_manifest(folder).state == "calibrated"
    found = reproduce(folder, tmp_path / "new", Places(str(source), data=str(text)))
    assert (found.equal, found.notes) == (True, [])
    assert tensors(folder) == tensors(tmp_path / "new")
    text.write_text("Other words about quite another thing.\n" * 200)
    other = reproduce(folder, tmp_path / "other", Places(str(source), data=str(text)))
    trained = {change.name for change in other.tensors}
    assert trained
    assert all("block_sparse_moe" in name for name in trained)


def test_a_split_by_its_share_is_made_again(dense: Dense, tmp_path: Path) -> None:
    text, folder = tmp_path / "corpus.txt", tmp_path / "out"
    text.write_text("The river rose all night and the lower fields were under water.\n" * 60)
    source = dense(intermediate_size=256)
    recipe = build_recipe(
        {"schema": SCHEMA},
        {
            "source.model": str(source),
            "target.active": 0.5,
            "experts.method": "split",
            "data": {"train": str(text), "seq_len": 64, "max_tokens": 1024},
            "output.dir": str(folder),
        },
    )
    upcycle(make_plan(recipe))
    assert check_card(folder).problems == []
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert (
        "**The experts and routers were fitted layer by layer to what the dense model computes on "
        "text (corpus.txt). Nothing was trained end to end, and nothing else at all.**"
    ) in card
    assert "`refit`" in card
    assert re.search(r"hidden state after layer 2 that differs \|  \| [0-9.]+%", card)
    found = reproduce(folder, tmp_path / "new", Places(str(source), data=str(text)))
    assert (found.equal, found.tensors) == (True, [])


def test_composed_sources_have_their_own_places(source: Path, tmp_path: Path) -> None:
    tuned = Path(shutil.copytree(source, tmp_path / "tuned"))
    altered(tuned, "model.layers.0.mlp.up_proj.weight")
    experts = {"experts.method": "compose", "target.num_experts": 2}
    sources = [{"model": str(source)}, {"model": str(tuned)}]
    folder = tmp_path / "out"
    manifest = converted(source, folder, **{**experts, "experts.sources": sources})
    assert len({one.content_sha256 for one in manifest.expert_sources}) == 2
    places = Places(str(source), (str(source), str(tuned)))
    assert reproduce(folder, tmp_path / "new", places).equal
    with pytest.raises(UsageError, match=r"2 of the composed checkpoints.*1 were given"):
        reproduce(folder, tmp_path / "a", Places(str(source), (str(source),)))
    with pytest.raises(SourceError, match="another checkpoint"):
        reproduce(folder, tmp_path / "b", Places(str(source), (str(tuned), str(source))))


def test_nothing_is_overwritten(source: Path, tmp_path: Path) -> None:
    converted(source, tmp_path / "out", output__overwrite=True)
    (tmp_path / "new").mkdir()
    with pytest.raises(OutputExistsError) as refused:
        reproduce(tmp_path / "out", tmp_path / "new", Places(source=str(source)))
    assert "--overwrite" not in str(refused.value.hint), "reproduce has no such option"
    result = invoke("reproduce", tmp_path / "out", "-o", tmp_path / "second", "-q")
    assert result.exit_code == 2
    assert "--source PATH" in result.stderr
    arguments = ("reproduce", tmp_path / "out", "-o", tmp_path / "second", "--source", source)
    assert invoke(*arguments, "-q").stdout.strip() == str(tmp_path / "second")
    assert "byte-equal" in invoke(*arguments[:3], tmp_path / "third", *arguments[4:]).stdout
    assert invoke("reproduce", source).exit_code == 3
