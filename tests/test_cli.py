"""The command line: exit codes, one-line errors, what wins over what, and nothing left behind."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from moe_convert.cli import app
from moe_convert.manifest import load_manifest
from tests.conftest import Dense
from tests.tools import digest, hollow

SCHEMA_LINE = "schema: moe-convert/recipe/1\n"


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def planned_target(*arguments: object) -> dict[str, Any]:
    """Return the target section of `plan … --json`."""
    result = invoke("plan", *arguments, "--json")
    assert result.exit_code == 0, result.stderr
    target: dict[str, Any] = json.loads(result.stdout)["target"]
    return target


def odd_width(dense: Dense, tmp_path: Path) -> Path:
    return dense(dtype="bfloat16", intermediate_size=100)


def enormous(dense: Dense, tmp_path: Path) -> Path:
    sizes = {"hidden_size": 8192, "intermediate_size": 28672}
    return hollow(tmp_path / "enormous", num_layers=16, **sizes)


def plain(dense: Dense, tmp_path: Path) -> Path:
    return dense()


REFUSED: dict[str, tuple[Callable[[Dense, Path], Path], list[str], int, str]] = {
    "top-k over experts": (plain, ["-e", "4", "-k", "5"], 2, "--top-k 5"),
    "top-k zero": (plain, ["-k", "0"], 2, "--top-k 0"),
    "one expert": (plain, ["-e", "1"], 2, "at least 2 experts"),
    "no expert": (plain, ["-e", "0"], 2, "at least 2 experts"),
    "negative shared": (plain, ["--shared-experts", "-1"], 2, "shared_experts"),
    "odd width": (odd_width, [], 2, "100 is not a multiple of 8.*--dtype fp32"),
    "unknown target": (plain, ["--target", "mixtal"], 2, "no target 'mixtal'"),
    "unproved target": (plain, ["--target", "qwen3_moe"], 3, "qwen3_moe"),
    "unknown method": (plain, ["--method", "klone"], 2, "klone"),
    "unknown router": (plain, ["--router", "zeroes"], 2, r"router\.init.*zeroes"),
    "router std zero": (plain, ["--router-std", "0"], 2, r"router\.logit_std"),
    "layer outside": (plain, ["--layers", "0,9"], 2, "layer 9 does not exist"),
    "layers nonsense": (plain, ["--layers", "some"], 2, "neither all, nor auto, nor a slice"),
    "no layer": (plain, ["--layers", "3:"], 2, "chooses no layer"),
    "bad dtype": (plain, ["--dtype", "int8"], 2, r"target\.dtype"),
    "bad shard size": (plain, ["--max-shard-size", "5 apples"], 2, "no size"),
    "unknown key": (
        plain,
        ["--set", "target.num_expert=4"],
        2,
        r"Did you mean target\.num_experts",
    ),
    "unknown section": (plain, ["--set", "targets.top_k=1"], 2, "no field targets.*Did you mean"),
    "key of a value": (plain, ["--set", "name.first=x"], 2, "name"),
    "set without value": (plain, ["--set", "target.top_k"], 2, "not KEY=VALUE"),
    "wrong type": (plain, ["--set", "target.top_k=two"], 2, r"target\.top_k"),
    "unknown recipe": (plain, ["-r", "quickstrat"], 2, "Did you mean quickstart"),
    "unknown option": (plain, ["--expert-count", "4"], 2, "No such option"),
    "unknown format": (plain, ["--format", "xml"], 2, "xml"),
    "disk too small": (enormous, ["-e", "256"], 4, "GB of disk.*free"),
}


@pytest.mark.parametrize("mistake", list(REFUSED))
def test_a_mistake_is_one_line_and_writes_nothing(
    dense: Dense, tmp_path: Path, mistake: str
) -> None:
    make, arguments, code, sentence = REFUSED[mistake]
    source, output = make(dense, tmp_path), tmp_path / "results" / "out"
    result = invoke("upcycle", source, "-o", output, *arguments)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    error = " ".join(result.stderr.split())

    assert re.search(sentence, error), error
    if "error:" in error and code != 4:
        assert result.stderr.count("\n") == 1
    assert not output.parent.exists()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("target: [1,\n  x: }", "line 3"),
        ("target:\n\tnum_experts: 4\n", "line 3"),
        ("just text", "YAML|mapping"),
        ("target: {experts: 4}", "no field target.experts.*Did you mean"),
        ("targett: {}", "Did you mean target"),
        ("target: {num_experts: many}", "target.num_experts"),
    ],
)
def test_a_bad_recipe_names_the_place(tmp_path: Path, text: str, sentence: str) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(SCHEMA_LINE + text, encoding="utf-8")
    for command in (["recipes", "validate", recipe], ["upcycle", "x", "-r", recipe]):
        result = invoke(*command)
        assert result.exit_code == 2

        assert re.search(sentence, result.stderr), result.stderr


def test_a_recipe_of_another_schema_is_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("schema: moe-convert/recipe/99\n", encoding="utf-8")
    result = invoke("recipes", "validate", recipe)
    assert result.exit_code == 2
    assert "expected 'moe-convert/recipe/1'" in result.stderr


def test_no_source_at_all(tmp_path: Path) -> None:
    result = invoke("upcycle", "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "No SOURCE" in result.stderr


def test_a_missing_source_is_exit_3_or_6(tmp_path: Path) -> None:
    assert invoke("plan", "./no/such/folder").exit_code == 3
    assert invoke("plan", "org/name").exit_code == 6
    assert invoke("plan", tmp_path).exit_code == 3
    assert invoke("verify", tmp_path).exit_code == 3


def test_a_missing_extra_is_exit_8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    result = invoke("plan", tmp_path / "model.gguf")
    assert result.exit_code == 8
    assert "pip install 'moe-convert[gguf]'" in result.stderr


def test_an_existing_output_is_exit_7(dense: Dense, finished: Path) -> None:
    before = digest(finished)
    result = invoke("upcycle", dense(), "-o", finished)
    assert result.exit_code == 7
    assert "--overwrite" in result.stderr
    assert digest(finished) == before


def test_the_source_is_never_the_output(dense: Dense) -> None:
    before = digest(dense())
    for extra in ([], ["--overwrite"]):
        assert invoke("upcycle", dense(), "-o", dense(), *extra).exit_code in {2, 7}
    assert digest(dense()) == before


def test_an_output_below_a_file_is_an_error(dense: Dense, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder", encoding="utf-8")
    result = invoke("upcycle", dense(), "-o", tmp_path / "file" / "out")
    assert result.exit_code == 1
    assert "Cannot write" in result.stderr
    assert (tmp_path / "file").read_text(encoding="utf-8") == "not a folder"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission_is_an_error(dense: Dense, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    result = invoke("upcycle", dense(), "-o", tmp_path / "locked" / "out")
    assert result.exit_code == 1
    assert "Cannot write" in result.stderr
    assert not list((tmp_path / "locked").iterdir())


def test_option_beats_set_beats_recipe_beats_default(dense: Dense, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(SCHEMA_LINE + "target: {num_experts: 4, top_k: 1}\n", encoding="utf-8")
    assert planned_target(dense())["num_experts"] == 8
    by_recipe = [dense(), "-r", recipe]
    assert planned_target(*by_recipe)["num_experts"] == 4
    by_set = [*by_recipe, "--set", "target.num_experts=6"]
    assert planned_target(*by_set)["num_experts"] == 6
    by_option = planned_target(*by_set, "-e", "10")
    assert (by_option["num_experts"], by_option["top_k"]) == (10, 1)


def test_a_zero_and_a_no_are_choices_too(dense: Dense, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        SCHEMA_LINE + "target: {shared_experts: 1, architecture: glm4_moe}\n"
        "experts: {method: clone, seed: 5}\nrouter: {seed: 5, measure: true}\n",
        encoding="utf-8",
    )
    output = tmp_path / "out"
    arguments = ["--shared-experts", "0", "--seed", "0", "--no-measure", "--no-verify"]
    result = invoke("upcycle", dense(), "-r", recipe, "-o", output, "-e", "4", *arguments)
    assert result.exit_code == 0, result.stderr
    written = yaml.safe_load((output / "recipe.yaml").read_text(encoding="utf-8"))
    assert written["target"]["shared_experts"] == 0
    assert (written["experts"]["seed"], written["router"]["seed"]) == (0, 0)
    assert (written["router"]["measure"], written["verify"]["enabled"]) == (False, False)
    assert load_manifest(output).state == "converted"


def test_the_written_recipe_gives_the_same_bytes(dense: Dense, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    options = ["-e", "4", "--seed", "9", "--router", "orthogonal", "--max-shard-size", "200KB"]
    assert invoke("upcycle", dense(), "-o", one, "--no-verify", *options).exit_code == 0
    assert invoke("upcycle", dense(), "-r", one / "recipe.yaml", "-o", two).exit_code == 0
    for name, sha in digest(one).items():
        if name not in {"moe_convert.json", "README.md"}:
            assert digest(two)[name] == sha, name
