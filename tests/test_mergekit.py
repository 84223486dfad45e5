"""Files for mergekit-moe as recipes: the examples of its manual, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from moe_convert.convert import convert
from moe_convert.errors import UsageError
from moe_convert.mergekit import imported, is_mergekit
from moe_convert.plan import make_plan
from moe_convert.recipe import Recipe, build_recipe, load_recipe
from tests.test_cli import invoke
from tests.test_compose import relative
from tests.tools import converted, load

UPCYCLING = """
base_model: some/llama-220M
gate_mode: random
dtype: bfloat16
experts:
  - source_model: some/llama-220M
  - source_model: some/llama-220M
  - source_model: some/llama-220M
  - source_model: some/llama-220M
"""
CLOWN_CAR = """
base_model: some/chat-7B
gate_mode: hidden # one of "hidden", "cheap_embed", or "random"
dtype: bfloat16
experts_per_token: 2
experts:
  - source_model: some/chat-7B
    positive_prompts: ["Hello, who are you?", "I need help with"]
  - source_model: some/medicine-7B@v1
    positive_prompts: ["As a doctor of medicine,"]
    negative_prompts: ["def f(x):"]
    residual_scale: 0.8
"""
SHARED = """
base_model: some/qwen2
architecture: qwen
gate_mode: random
experts:
  - source_model: some/qwen2-code
  - source_model: some/qwen2-maths
shared_experts:
  - source_model: some/qwen2
    residual_scale: 0.1
"""


def recipe_of(text: str) -> Recipe:
    return build_recipe(imported(yaml.safe_load(text)), {})


def test_equal_experts_become_clones() -> None:
    recipe = recipe_of(UPCYCLING)
    assert recipe.experts.method == "clone"
    assert (recipe.target.num_experts, recipe.target.top_k) == (4, 2)
    assert recipe.target.dtype == "bf16"
    assert recipe.router.kind == "normal"
    assert recipe.router.weight_std == 1.0
    assert "saturates" in recipe.notes[0]
    prompts = "some/llama-220M\n    positive_prompts: [unused]"
    text = UPCYCLING.replace("source_model: some/llama-220M", f"source_model: {prompts}")
    assert recipe_of(text) == recipe


def test_experts_with_prompts_become_sources() -> None:
    recipe = recipe_of(CLOWN_CAR)
    assert recipe.experts.method == "compose"
    first, second = recipe.experts.sources
    assert first.prompts == ("Hello, who are you?", "I need help with")
    assert (second.model, second.revision, second.scale) == ("some/medicine-7B", "v1", 0.8)
    assert second.negative_prompts == ("def f(x):",)
    assert recipe.router.kind == "prompts"
    assert recipe.source.model == "some/chat-7B"


def test_a_shared_expert_counts_its_residual_scale() -> None:
    recipe = recipe_of(SHARED)
    assert recipe.experts.method == "compose"
    assert recipe.experts.shared_scale == 0.1
    assert recipe.target.shared_experts == 1
    assert recipe.target.architecture == "qwen2_moe"
    without = SHARED[: SHARED.index("shared_experts")]
    assert recipe_of(without).target.architecture == "qwen3_moe"


@pytest.mark.parametrize(
    ("mode", "init", "words"),
    [
        ("random", "normal", "saturates"),
        ("uniform_random", "normal", "0.577"),
        ("hidden", "prompts", "real input"),
        ("cheap_embed", "prompts", "cheap_embed has no counterpart"),
    ],
)
def test_gate_modes(mode: str, init: str, words: str) -> None:
    recipe = recipe_of(CLOWN_CAR.replace("gate_mode: hidden", f"gate_mode: {mode}"))
    assert recipe.router.kind == init
    assert any(words in note for note in recipe.notes)


def test_the_default_gate_mode_is_hidden_and_needs_prompts() -> None:
    assert recipe_of(CLOWN_CAR.replace("gate_mode: hidden", "")).router.kind == "prompts"
    with pytest.raises(UsageError, match=r"positive_prompts for experts\[0\]"):
        recipe_of(UPCYCLING.replace("gate_mode: random", ""))


def test_noise_is_absolute_as_in_mergekit() -> None:
    text = UPCYCLING.replace(
        "source_model: some/llama-220M", "source_model: some/llama-220M\n    noise_scale: 0.01"
    )
    recipe = recipe_of(text)
    assert recipe.experts.method == "clone"
    (edit,) = recipe.experts.edits
    assert edit.edit == "noise"
    assert (edit.std, edit.relative) == (0.01, False)


def test_an_adapter_of_the_base_becomes_a_source() -> None:
    text = CLOWN_CAR.replace("some/medicine-7B@v1", "some/chat-7B+adapters/medicine")
    assert recipe_of(text).experts.sources[1].model == "adapters/medicine"  # type: ignore[union-attr]


REFUSED: list[tuple[str, str, str]] = [
    ("gate_mode: hidden", "gate_moed: hidden", "Did you mean gate_mode"),
    ("residual_scale", "residual_scales", "Did you mean residual_scale"),
    ("dtype: bfloat16", "dtype: float64", "float64"),
    ("gate_mode: hidden", "gate_mode: hiden", "Did you mean hidden"),
    ("dtype: bfloat16", "architecture: deepseek", "remote code"),
    ("dtype: bfloat16", "architecture: mixtrel", "Did you mean mixtral"),
    ("dtype: bfloat16", "merge_method: linear", "merge_method"),
    ("residual_scale: 0.8", "noise_scale: 0.1", "differs between the experts"),
    ("some/medicine-7B@v1", "other/model+lora", "adapters are merged into the base"),
    ("base_model: some/chat-7B", "base_model: some/chat-7B+lora", "base_model has a LoRA"),
    ("source_model: some/medicine-7B@v1", "negative_prompts: []", "source_model"),
]


@pytest.mark.parametrize(("old", "new", "named"), REFUSED)
def test_what_cannot_be_expressed_is_refused(old: str, new: str, named: str) -> None:
    text = CLOWN_CAR.replace(old, new, 1)
    assert text != CLOWN_CAR
    with pytest.raises(UsageError) as caught:
        recipe_of(text)
    assert named in f"{caught.value.message} {caught.value.hint}"


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("residual_scale: 0.1", "noise_scale: 0.1", "noise_scale of a shared expert"),
        ("source_model: some/qwen2\n", "source_model: some/other\n", "base some/qwen2"),
        ("    residual_scale: 0.1", "  - source_model: some/qwen2", "2 experts"),
    ],
)
def test_shared_experts_that_cannot_be_expressed(old: str, new: str, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        recipe_of(SHARED.replace(old, new, 1))


def test_only_mergekit_files_are_taken_for_one() -> None:
    assert is_mergekit(yaml.safe_load(UPCYCLING))
    assert not is_mergekit({"schema": "moe-convert/recipe/1", "base_model": "x"})
    assert not is_mergekit({"merge_method": "linear"})


def test_importing_on_the_command_line(tmp_path: Path) -> None:
    file, out = tmp_path / "clown.yml", tmp_path / "recipe.yaml"
    file.write_text(CLOWN_CAR, encoding="utf-8")
    result = invoke("recipes", "import", file, "-o", out)
    assert result.exit_code == 0, result.stderr
    assert load_recipe(str(out)).experts == recipe_of(CLOWN_CAR).experts
    printed = invoke("recipes", "import", file, "-q").stdout
    assert yaml.safe_load(printed) == yaml.safe_load(out.read_text(encoding="utf-8"))
    assert invoke("recipes", "import", file, "-o", out).exit_code == 7
    file.write_text(CLOWN_CAR.replace("gate_mode", "gatemode"), encoding="utf-8")
    failed = invoke("recipes", "import", file)
    assert failed.exit_code == 2
    assert "Did you mean gate_mode" in failed.stderr
    assert invoke("recipes", "import", tmp_path / "none.yml").exit_code == 2
    assert invoke("recipes", "import", out).exit_code == 2


def test_upcycle_takes_such_a_file_directly(tmp_path: Path) -> None:
    base, other = (relative(tmp_path / name, seed) for seed, name in enumerate(("base", "other")))
    experts: list[dict[str, Any]] = [
        {"source_model": str(base)},
        {"source_model": str(other), "residual_scale": 0.5},
    ]
    data = {"base_model": str(base), "gate_mode": "random", "experts": experts}
    file = tmp_path / "moe.yml"
    file.write_text(yaml.safe_dump(data), encoding="utf-8")
    result = invoke("plan", "-r", file, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["target"]["num_experts"] == 2
    assert "recipe_note" in {note["code"] for note in found["warnings"]}
    result = invoke("upcycle", "-r", file, "-o", tmp_path / "moe", "--no-verify", "-q")
    assert result.exit_code == 0, result.stderr
    moe, second = load(tmp_path / "moe"), load(other)
    for layer, dense in zip(moe.model.layers, second.model.layers, strict=True):
        assert torch.equal(layer.mlp.experts.down_proj[1], 0.5 * dense.mlp.down_proj.weight)
        assert float(layer.mlp.gate.weight.square().mean().sqrt()) == pytest.approx(1.0, rel=1e-3)


def test_prompts_reach_the_routers(tmp_path: Path) -> None:
    base, other = (relative(tmp_path / name, seed) for seed, name in enumerate(("base", "other")))
    experts = [
        {"source_model": str(base), "positive_prompts": ["the river", "the fields"]},
        {"source_model": str(other), "positive_prompts": ["water"], "negative_prompts": ["under"]},
    ]
    data = {"base_model": str(base), "gate_mode": "hidden", "experts": experts}
    made = {}
    for name, changed in (("one", "water"), ("two", "lower"), ("three", "water")):
        experts[1]["positive_prompts"] = [changed]
        recipe = build_recipe(imported(data), {"output.dir": str(tmp_path / name)})
        convert(make_plan(recipe))
        made[name] = [layer.mlp.gate.weight for layer in load(tmp_path / name).model.layers]
    for one, two, three in zip(*made.values(), strict=True):
        assert torch.equal(one, three)
        assert not torch.allclose(one, two)


def test_absolute_noise_has_the_asked_size(tmp_path: Path) -> None:
    base = relative(tmp_path / "base", 0)
    edit = {"edit": "noise", "std": 0.03, "relative": False}
    converted(base, tmp_path / "moe", **{"experts.edits": [edit]})
    dense, moe = load(base), load(tmp_path / "moe")
    added = (
        moe.model.layers[0].mlp.experts.down_proj[0] - dense.model.layers[0].mlp.down_proj.weight
    )
    assert float(added.std()) == pytest.approx(0.03, rel=0.05)
