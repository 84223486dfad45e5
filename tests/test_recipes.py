"""Recipes, gallery and the commands that only describe."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from moe_convert.data import HubDataset
from moe_convert.describe import method_summaries
from moe_convert.edits import EDITS
from moe_convert.errors import UsageError
from moe_convert.experts import METHODS, STRATEGIES, Compose
from moe_convert.families import FAMILIES
from moe_convert.plan import make_plan
from moe_convert.recipe import SCHEMA, Recipe, build_recipe, gallery, load_recipe
from moe_convert.routers import Router
from moe_convert.targets import TARGETS
from tests.conftest import Dense
from tests.test_cli import invoke

README = Path(__file__).parent.parent / "README.md"
FAMILIES_OF = {
    "qwen3-to-qwen3-moe": "qwen3",
    "split-fine-grained": "qwen3",
    "calibrate-multi-gpu": "qwen3",
    "qwen35-a3b-style": "qwen3_5_text",
}
"""The model type of each recipe's source, where it is no Llama."""

EXACT = {
    "quickstart", "llama-to-mixtral", "qwen3-to-qwen3-moe", "fine-grained", "qwen35-a3b-style",
    "shared-residual", "compose",
}  # fmt: skip
"""Recipes that compute the dense function; compose does with equal sources, as here."""


@pytest.mark.parametrize("name", list(gallery()))
def test_every_gallery_recipe_is_valid_and_shown_as_written(name: str) -> None:
    text = gallery()[name].read_text(encoding="utf-8")
    assert load_recipe(name).description
    assert invoke("recipes", "validate", name).exit_code == 0
    assert invoke("recipes", "show", name, "-q").stdout.rstrip() == text.rstrip()
    assert invoke("recipes", "show", name).stdout.rstrip() == text.rstrip()


@pytest.mark.parametrize("name", list(gallery()))
def test_every_gallery_recipe_can_be_planned(dense: Dense, name: str) -> None:
    source = str(dense(FAMILIES_OF.get(name, "llama"), "plain", intermediate_size=1536))
    changes: dict[str, Any] = {"source.model": source}
    written = load_recipe(name)
    if isinstance(written.experts, Compose):
        models = [one.model_dump() for one in written.experts.sources]
        changes["experts.sources"] = [{**one, "model": source} for one in models]
    if isinstance(written.data.train, HubDataset):
        changes["data.train"] = "self"
    plan = make_plan(load_recipe(name, changes))
    target, fires = written.target, written.target.active
    assert target.architecture in {"auto", plan.target.model_type}
    if fires is not None:
        used = plan.shape.top_k * plan.shape.expert_size + plan.shape.shared_size
        assert used == fires * plan.shape.dense_size
    else:
        assert (plan.shape.num_experts, plan.shape.top_k) == (target.num_experts, target.top_k)
        assert plan.shape.num_shared >= target.shared_experts
    assert plan.exact == (name in EXACT)


@pytest.mark.parametrize("name", list(gallery()))
def test_every_gallery_recipe_says_what_it_takes(name: str) -> None:
    text = gallery()[name].read_text(encoding="utf-8")
    about = text.partition("schema:")[0].splitlines()
    assert all(line.startswith("#") for line in about)
    for word in ("# Paper  ", "# Needs  ", "# Gives  "):
        assert sum(line.startswith(word) for line in about) == 1, word
    assert "GB of disk" in " ".join(line.strip("# ") for line in about)
    assert "GPU" in text
    assert re.search(r"\b(second|minute|hour)s?\b", " ".join(about)), "how long it takes"
    assert load_recipe(name).name == name
    assert f"`{name}`" in README.read_text(encoding="utf-8")


def test_the_gallery_lists_the_quickstart() -> None:
    assert "quickstart" in invoke("recipes", "ls", "-q").stdout.split()
    listed = json.loads(invoke("recipes", "ls", "--json").stdout)["recipes"]
    assert listed.keys() == gallery().keys()


def test_copying_a_recipe(tmp_path: Path) -> None:
    copy = tmp_path / "quickstart.yaml"
    result = invoke("recipes", "copy", "quickstart", tmp_path, "-q")
    assert result.stdout.strip() == str(copy)
    assert copy.read_bytes() == gallery()["quickstart"].read_bytes()
    copy.write_text("mine", encoding="utf-8")
    assert invoke("recipes", "copy", "quickstart", tmp_path).exit_code == 7
    assert copy.read_text(encoding="utf-8") == "mine"
    assert invoke("recipes", "copy", "quickstart", tmp_path / "other.yaml").exit_code == 0
    assert invoke("recipes", "validate", tmp_path / "other.yaml").exit_code == 0
    assert invoke("recipes", "copy", "nothing", tmp_path).exit_code == 2


def test_the_schema_accepts_the_gallery_and_refuses_unknown_keys() -> None:
    schema = json.loads(invoke("recipes", "schema", "--json").stdout)["json_schema"]
    Draft202012Validator.check_schema(schema)
    validator = Draft202012Validator(schema)
    for path in gallery().values():
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        assert list(validator.iter_errors(data)) == []
        assert list(validator.iter_errors({**data, "targett": {}}))
        without = {key: value for key, value in data.items() if key != "schema"}
        assert list(validator.iter_errors(without))


EXPERTS: list[dict[str, Any]] = [
    {},
    {"granularity": 2},
    {"method": "shared-residual"},
    {"method": "split"},
    {"method": "split", "edits": [{"edit": "tune"}, {"edit": "refit", "ridge": 0.1}]},
    *({"method": "split", "strategy": name} for name in STRATEGIES),
    {"method": "split", "strategy": "nothing"},
    {"method": "split", "granularity": 2},
    {"method": "nothing"},
    {"strategy": "cmoe"},
    {"method": "clone", "strategy": "cmoe"},
    {"method": "compose"},
    {"method": "compose", "sources": [{"model": "org/one"}, {"model": "org/two"}]},
]


@pytest.mark.parametrize("experts", EXPERTS, ids=str)
def test_the_schema_takes_the_experts_that_a_recipe_takes(experts: dict[str, Any]) -> None:
    data: dict[str, Any] = {"schema": SCHEMA, "source": {"model": "org/name"}, "experts": experts}
    schema = json.loads(invoke("recipes", "schema", "-q").stdout)
    problems = list(Draft202012Validator(schema).iter_errors(data))
    try:
        build_recipe(data, {})
    except UsageError:
        assert problems
    else:
        assert problems == []


def test_a_recipe_survives_its_own_yaml() -> None:
    recipe = build_recipe({"schema": SCHEMA}, {"source.model": "org/name", "target.top_k": 3})
    assert Recipe.model_validate(yaml.safe_load(recipe.as_yaml())) == recipe


@pytest.mark.parametrize("name", [*FAMILIES, *TARGETS])
def test_every_row_can_be_shown(name: str) -> None:
    result = invoke("archs", "show", name)
    assert result.exit_code == 0, result.stderr
    for target in FAMILIES[name].targets if name in FAMILIES else ():
        assert target in result.stdout


def test_archs_are_listed_and_corrected() -> None:
    listed = json.loads(invoke("archs", "ls", "--json").stdout)["architectures"]
    assert listed == {name: list(family.targets) for name, family in FAMILIES.items()}
    assert "llama" in invoke("archs", "ls").stdout
    result = invoke("archs", "show", "mixtrall")
    assert result.exit_code == 2
    assert "Did you mean mixtral" in result.stderr


@pytest.mark.parametrize("name", [*method_summaries(), "router"])
def test_every_method_can_be_shown(name: str) -> None:
    word, _, short = name.rpartition(" ")
    result = invoke("methods", "show", *name.split())
    assert result.exit_code == 0, result.stderr
    assert ("edit =" if word == "edit" else "seed") in result.stdout
    assert invoke("methods", "show", name).stdout == result.stdout
    assert invoke("methods", "show", short).stdout == result.stdout


def test_a_strategy_is_shown_with_what_it_does_by_default() -> None:
    shown = invoke("methods", "show", "contribution").stdout
    assert "router distill, edits tune, refit" in shown
    assert invoke("methods", "show", "split").stdout == shown
    assert "router representative, edits none" in invoke("methods", "show", "cmoe").stdout
    assert "cross-entropy" in invoke("methods", "show", "distill").stdout


def test_methods_are_listed() -> None:
    listed = json.loads(invoke("methods", "ls", "--json").stdout)["methods"]
    rows: dict[str, Iterable[str]]
    rows = {"strategy": STRATEGIES, "edit": EDITS, "router": Router.summaries}
    named = {f"{word} {name}" for word, names in rows.items() for name in names}
    assert set(listed) == {*METHODS, *named}
    assert "2212.05055" in listed["clone"]
    assert "2502.04416" in listed["strategy cmoe"]
    unknown = invoke("methods", "show", "contributoin")
    assert unknown.exit_code == 2
    assert "Did you mean contribution?" in unknown.stderr
    assert invoke("methods", "show", "edit", "distill").exit_code == 2


def test_version_and_environment() -> None:
    from moe_convert import __version__

    assert invoke("version", "-q").stdout.strip() == __version__
    assert __version__ in invoke("--version").stdout
    found = json.loads(invoke("env", "--json").stdout)["env"]
    assert {"torch", "transformers", "python", "moe-convert"} <= set(found)
