"""Experts from several checkpoints and adapters, against mixtures computed in plain torch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_convert.checkpoint.lora import open_adapter
from moe_convert.checkpoint.names import stored_shapes
from moe_convert.convert import convert
from moe_convert.errors import MoeConvertError, UnsupportedError, UsageError
from moe_convert.manifest import load_manifest
from moe_convert.workflow import upcycle
from tests.test_cli import invoke
from tests.tiny import BASE, make_dense, make_tokenizer
from tests.tools import difference, edit_json, edit_tensors, load, logits, planned, tensors

TOLERANCE = 1e-4
FFN = ("gate_proj", "up_proj", "down_proj")
Bits = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a base and two relatives, with other weights everywhere."""
    folder = tmp_path_factory.mktemp("models")
    return {name: relative(folder / name, seed) for seed, name in enumerate(("base", "one", "two"))}


def relative(folder: Path, seed: int, model_type: str = "llama", **changes: Any) -> Path:
    make_dense(model_type, next(iter(_variants(model_type))), folder, **changes)
    if seed:
        generator = torch.Generator().manual_seed(seed)

        def shift(data: Bits) -> None:
            for name, tensor in data.items():
                data[name] = tensor + 0.05 * torch.randn(tensor.shape, generator=generator)

        edit_tensors(folder, shift)
    return folder


def _variants(model_type: str) -> dict[str, Any]:
    from tests.tiny import TINY

    return TINY[model_type]


def composition(models: dict[str, Path], *names: str, **more: Any) -> dict[str, Any]:
    sources = [{"model": str(models[name])} for name in names]
    found = {"experts.method": "compose", "experts.sources": sources}
    return {**found, "target.num_experts": len(names), **more}


def reference(
    around: Any, ffns: list[Any], moe: Path, *, scales: tuple[float, ...], shared: Any = None
) -> torch.Tensor:
    """Return the logits of `around` with every FFN replaced by a mixture of the FFNs' models.

    The two best experts of the written router's softmax are added, weighted by their share.
    """
    state = load(moe).state_dict()

    def mixture(layer: int) -> Callable[[torch.Tensor], torch.Tensor]:
        name = next(
            n
            for n in state
            if n.endswith(("gate.weight",)) and f".{layer}." in n and "shared" not in n
        )

        def forward(x_BTD: torch.Tensor) -> torch.Tensor:
            weights = torch.softmax(x_BTD @ state[name].T, dim=-1)
            best = weights.topk(2, dim=-1)
            share = best.values / best.values.sum(dim=-1, keepdim=True)
            total = torch.zeros_like(x_BTD)
            for number, model in enumerate(ffns):
                factor = ((best.indices == number) * share).sum(dim=-1, keepdim=True)
                total += factor * scales[number] * model.model.layers[layer].mlp(x_BTD)
            return total if shared is None else shared(layer, x_BTD, total)

        return forward

    for number, layer in enumerate(around.model.layers):
        layer.mlp.forward = mixture(number)
    ids = torch.randint(BASE["vocab_size"], (2, 48), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return around(ids).logits.float()


def test_each_row_is_its_sources_ffn_and_the_rest_the_bases(
    models: dict[str, Path], tmp_path: Path
) -> None:
    convert(planned(models["base"], tmp_path / "moe", **composition(models, "base", "one", "two")))
    ffns = [load(models[name]) for name in ("base", "one", "two")]
    wanted = reference(load(models["base"]), ffns, tmp_path / "moe", scales=(1.0,) * 3)
    assert difference(logits(tmp_path / "moe"), wanted) <= TOLERANCE
    assert difference(logits(models["base"]), wanted) > 0.1


def test_everything_else_is_averaged_over_the_sources(
    models: dict[str, Path], tmp_path: Path
) -> None:
    changes = composition(models, "one", "two", **{"experts.attention": "average"})
    convert(planned(models["base"], tmp_path / "moe", **changes))
    ffns = [load(models[name]) for name in ("one", "two")]
    around = load(models["base"])
    states = [model.state_dict() for model in ffns]
    around.load_state_dict({n: (states[0][n] + states[1][n]) / 2 for n in states[0]})
    wanted = reference(around, ffns, tmp_path / "moe", scales=(1.0, 1.0))
    assert difference(logits(tmp_path / "moe"), wanted) <= TOLERANCE


@pytest.mark.parametrize("shared_scale", [None, 0.25])
def test_the_shared_expert_is_the_bases_ffn(
    models: dict[str, Path], tmp_path: Path, shared_scale: float | None
) -> None:
    changes = composition(models, "one", "two")
    changes |= {"target.architecture": "qwen2_moe", "target.shared_experts": 1}
    changes |= {"experts.shared_scale": shared_scale}
    convert(planned(models["base"], tmp_path / "moe", **changes))
    ffns = [load(models[name]) for name in ("one", "two")]
    base = load(models["base"])
    routed, always = (0.5, 0.5) if shared_scale is None else (1.0, shared_scale)

    def add(layer: int, x_BTD: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        return total + always * base.model.layers[layer].mlp(x_BTD)

    around = load(models["base"])
    wanted = reference(around, ffns, tmp_path / "moe", scales=(routed,) * 2, shared=add)
    assert difference(logits(tmp_path / "moe"), wanted) <= TOLERANCE


def test_a_source_can_be_scaled_and_sources_repeat_in_order(
    models: dict[str, Path], tmp_path: Path
) -> None:
    changes = composition(models, "one", "two", **{"target.num_experts": 4})
    changes["experts.sources"][1]["scale"] = 0.5
    convert(planned(models["base"], tmp_path / "moe", **changes))
    ffns = [load(models[name]) for name in ("one", "two", "one", "two")]
    wanted = reference(load(models["base"]), ffns, tmp_path / "moe", scales=(1.0, 0.5, 1.0, 0.5))
    assert difference(logits(tmp_path / "moe"), wanted) <= TOLERANCE


def test_sources_that_are_all_the_base_keep_its_function(
    models: dict[str, Path], tmp_path: Path
) -> None:
    plan = planned(models["base"], tmp_path / "moe", **composition(models, "base", "base"))
    assert plan.exact
    assert "equal_experts" in {note.code for note in plan.warnings}
    assert upcycle(plan).state == "verified"
    assert not planned(models["one"], **composition(models, "base", "base")).exact
    scaled = composition(models, "base", "base")
    scaled["experts.sources"][0]["scale"] = 2.0
    assert not planned(models["base"], **scaled).exact


def test_the_number_of_experts_follows_from_the_sources(models: dict[str, Path]) -> None:
    from moe_convert.plan import make_plan
    from moe_convert.recipe import SCHEMA, build_recipe

    data = {"source.model": str(models["base"]), **composition(models, "base", "one", "two")}
    del data["target.num_experts"]
    recipe = build_recipe({"schema": SCHEMA}, data)
    assert recipe.target.num_experts == 3
    assert make_plan(recipe).shape.num_experts == 3
    with pytest.raises(UsageError, match="3 sources cannot give 4 experts"):
        make_plan(build_recipe({"schema": SCHEMA}, {**data, "target.num_experts": 4}))


def test_manifest_and_recipe_name_the_sources_without_their_paths(
    models: dict[str, Path], tmp_path: Path
) -> None:
    convert(planned(models["base"], tmp_path / "moe", **composition(models, "one", "two")))
    manifest = load_manifest(tmp_path / "moe")
    assert [source.id for source in manifest.expert_sources] == ["one", "two"]
    assert {source.params for source in manifest.expert_sources} == {manifest.source.params}
    assert not manifest.exact
    for file in ("recipe.yaml", "moe_convert.json", "config.json"):
        assert str(models["one"].parent) not in (tmp_path / "moe" / file).read_text()


def test_a_run_that_was_stopped_starts_anew_when_a_source_changed(
    models: dict[str, Path], tmp_path: Path
) -> None:
    """The bytes of every source decide whether a partial folder may be taken up."""
    paths = {**models, "other": relative(tmp_path / "other", 3)}
    changes = composition(paths, "one", "other")

    def stop(what: str, done: int, total: int) -> None:
        if what == "convert" and 2 * done > total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(planned(models["base"], tmp_path / "moe", **changes), stop)
    edit_tensors(paths["other"], lambda data: data.update({n: t + 0.1 for n, t in data.items()}))
    for name in ("moe", "fresh"):
        convert(planned(models["base"], tmp_path / name, **changes))
    assert tensors(tmp_path / "moe") == tensors(tmp_path / "fresh")


MISMATCHES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "hidden_size": ({"hidden_size": 32}, ("hidden_size", "64", "32")),
    "depth": ({"num_hidden_layers": 2}, ("num_layers", "3", "2")),
    "ffn": ({"intermediate_size": 64}, ("ffn_size", "96", "64")),
    "heads": ({"num_key_value_heads": 4}, ("num_kv_heads", "2", "4")),
    "vocabulary": ({"vocab_size": 300}, ("vocab_size", "272", "300")),
    "activation": ({"hidden_act": "gelu"}, ("act", "silu", "gelu")),
    "norm": ({"rms_norm_eps": 1e-3}, ("norm_eps", "0.001")),
    "tied": ({"tie_word_embeddings": True}, ("tied", "False", "True")),
}


@pytest.mark.parametrize("what", list(MISMATCHES))
def test_a_source_of_another_shape_is_refused(
    models: dict[str, Path], tmp_path: Path, what: str
) -> None:
    config, named = MISMATCHES[what]
    refused(models, tmp_path, make_dense("llama", "plain", tmp_path / "odd", **config), *named)


def test_a_source_of_another_type_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    odd = make_dense("qwen3", "plain", tmp_path / "odd")
    refused(models, tmp_path, odd, "model_type", "llama", "qwen3")


def refused(models: dict[str, Path], tmp_path: Path, odd: Path, *named: str) -> None:
    """Make sure that base and odd source are named with both values, and nothing is written."""
    changes = composition({**models, "odd": odd}, "base", "odd")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UsageError) as caught:
        planned(models["base"], tmp_path / "moe", **changes)
    for word in ("base", "odd", *named):
        assert word in caught.value.message
    assert sorted(tmp_path.iterdir()) == before


def test_another_rope_is_only_allowed_where_the_base_keeps_its_attention(
    models: dict[str, Path], tmp_path: Path
) -> None:
    rope = {"rope_type": "default", "rope_theta": 77.0}
    odd = make_dense("llama", "plain", tmp_path / "odd", rope_parameters=rope)
    changes = composition({**models, "odd": odd}, "base", "odd")
    notes = planned(models["base"], **changes).warnings
    assert any("77.0" in note.message for note in notes if note.code == "attention_differs")
    with pytest.raises(UsageError, match=r"rope differs.*77\.0"):
        planned(models["base"], **{**changes, "experts.attention": "average"})


def swap_tokens(data: dict[str, Any]) -> None:
    vocab = data["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (swap_tokens, "token 'a'"),
        (lambda data: data["model"]["merges"].reverse(), "merge 0"),
        (
            lambda data: data["added_tokens"].append({**data["added_tokens"][0], "content": "<x>"}),
            "token '<x>'",
        ),
    ],
)
def test_another_tokenizer_is_refused(
    models: dict[str, Path], tmp_path: Path, change: Callable[[dict[str, Any]], object], named: str
) -> None:
    odd = relative(tmp_path / "odd", 4)
    edit_json(odd / "tokenizer.json", change)
    refused(models, tmp_path, odd, "tokenizer.json", named)


def test_another_chat_template_is_fine(models: dict[str, Path], tmp_path: Path) -> None:
    odd = relative(tmp_path / "odd", 4)
    (odd / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    changes = composition({**models, "odd": odd}, "odd", "odd")
    plan = planned(models["base"], **changes)
    assert "tokenizer_unknown" not in {note.code for note in plan.warnings}
    (odd / "tokenizer.json").unlink()
    plan = planned(models["base"], **changes)
    assert "tokenizer_unknown" in {note.code for note in plan.warnings}


def make_adapter(
    base: Path, folder: Path, modules: tuple[str, ...] = FFN, *, seed: int = 3, **config: Any
) -> Path:
    """Write an adapter as peft does: rank 4, or the rank of its pattern."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", **config}
    settings["target_modules"] = list(modules)
    tensors = {}
    for name, weight in load_file(base / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if module.rsplit(".", 1)[-1] in modules:
            ranks = settings.get("rank_pattern", {})
            rank = next((r for key, r in ranks.items() if module.endswith(key)), settings["r"])
            for part, shape in (("A", (rank, weight.shape[1])), ("B", (weight.shape[0], rank))):
                key = f"base_model.model.{module}.lora_{part}.weight"
                tensors[key] = 0.2 * torch.randn(shape, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def merged_by_hand(base: Path, adapter: Path, folder: Path, scale: Callable[[str], float]) -> Path:
    """Write base + scale · B A as a model of its own."""
    make_dense("llama", "plain", folder)
    weights = load_file(base / "model.safetensors")
    changes = load_file(adapter / "adapter_model.safetensors")
    for key, a in changes.items():
        if ".lora_A." in key:
            module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = changes[key.replace("lora_A", "lora_B")]
            weights[f"{module}.weight"] += scale(module) * (b @ a)
    edit_tensors(folder, lambda data: data.update(weights))
    return folder


def alpha_over(rank: float) -> Callable[[str], float]:
    return lambda module: 8 / rank


SETTINGS: dict[str, tuple[dict[str, Any], Callable[[str], float]]] = {
    "plain": ({}, alpha_over(4)),
    "rslora": ({"use_rslora": True}, alpha_over(math.sqrt(4))),
    "patterns": (
        {
            "rank_pattern": {"layers.1.mlp.up_proj": 2, "down_proj": 6},
            "alpha_pattern": {"gate_proj": 3},
        },
        lambda module: (
            (3 if module.endswith("gate_proj") else 8)
            / (6 if "down" in module else 2 if module.endswith("layers.1.mlp.up_proj") else 4)
        ),
    ),
}


@pytest.mark.parametrize("settings", list(SETTINGS))
def test_an_adapter_is_merged_on_the_fly(
    models: dict[str, Path], tmp_path: Path, settings: str
) -> None:
    config, scale = SETTINGS[settings]
    paths = dict(models)
    paths["adapter"] = make_adapter(models["base"], tmp_path / "adapter", **config)
    paths["merged"] = merged_by_hand(models["base"], paths["adapter"], tmp_path / "merged", scale)
    for name in ("adapter", "merged"):
        changes = composition(paths, "base", name)
        convert(planned(models["base"], tmp_path / f"moe-{name}", **changes))
    same_weights(tmp_path / "moe-adapter", tmp_path / "moe-merged")
    assert difference(logits(tmp_path / "moe-adapter"), logits(models["base"])) > 0.1
    info = load_manifest(tmp_path / "moe-adapter").expert_sources[1]
    assert (info.id, info.architecture) == ("adapter", "LlamaForCausalLM LoRA")


def same_weights(one: Path, other: Path) -> None:
    states = load(one).state_dict(), load(other).state_dict()
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert difference(tensor, states[1][name]) <= 1e-6, name


def test_attention_adapters_count_only_in_an_average(
    models: dict[str, Path], tmp_path: Path
) -> None:
    paths = dict(models)
    modules = (*FFN, "q_proj", "o_proj")
    paths["adapter"] = make_adapter(models["base"], tmp_path / "adapter", modules)
    paths["merged"] = merged_by_hand(
        models["base"], paths["adapter"], tmp_path / "merged", alpha_over(4)
    )
    ignored = planned(models["base"], **composition(paths, "base", "adapter"))
    note = next(note for note in ignored.warnings if note.code == "adapter_ignored")
    assert "q_proj" in note.message
    assert "o_proj" in note.message
    assert "gate_proj" not in note.message
    for name in ("adapter", "merged"):
        changes = composition(paths, "base", name, **{"experts.attention": "average"})
        plan = planned(models["base"], tmp_path / f"moe-{name}", **changes)
        assert "adapter_ignored" not in {note.code for note in plan.warnings}
        convert(plan)
    same_weights(tmp_path / "moe-adapter", tmp_path / "moe-merged")


def test_an_adapter_of_attention_alone_is_named(models: dict[str, Path], tmp_path: Path) -> None:
    paths = {**models, "adapter": make_adapter(models["base"], tmp_path / "adapter", ("q_proj",))}
    plan = planned(models["base"], **composition(paths, "base", "adapter"))
    assert "adapter_without_ffn" in {note.code for note in plan.warnings}


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"use_dora": True}, "DoRA"),
        ({"bias": "all"}, "bias='all'"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"something_new": {"a": 1}}, "something_new"),
    ],
)
def test_adapters_that_do_more_than_add_are_refused(
    models: dict[str, Path], tmp_path: Path, config: dict[str, Any], named: str
) -> None:
    folder = make_adapter(models["base"], tmp_path / "adapter", **config)
    with pytest.raises(UnsupportedError, match=named):
        open_adapter(folder)


def test_broken_adapters_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    folder = make_adapter(models["base"], tmp_path / "adapter")
    edit_json(folder / "adapter_config.json", lambda data: data.update(r=3))
    with pytest.raises(MoeConvertError, match="rank 3"):
        open_adapter(folder)
    edit_json(folder / "adapter_config.json", lambda data: data.update(r=4))
    file = folder / "adapter_model.safetensors"
    whole = load_file(file)
    key = next(key for key in whole if "lora_A" in key)
    for missing in (key, key.replace("lora_A", "lora_B")):
        save_file({k: t for k, t in whole.items() if k != missing}, file)
        with pytest.raises(MoeConvertError, match="lora_"):
            open_adapter(folder)
    save_file(
        {**whole, key.replace("lora_A.weight", "lora_magnitude_vector"): whole[key].clone()}, file
    )
    with pytest.raises(UnsupportedError, match="lora_magnitude_vector"):
        open_adapter(folder)
    small = make_dense("llama", "plain", tmp_path / "small", intermediate_size=64)
    other = make_adapter(small, tmp_path / "other")
    paths = {**models, "other": other}
    with pytest.raises(UsageError, match=r"base.*other"):
        planned(models["base"], **composition(paths, "base", "other"))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_gives_what_peft_merges(
    models: dict[str, Path], tmp_path: Path, rslora: bool
) -> None:
    peft = pytest.importorskip("peft", reason="PEFT IS NOT INSTALLED: merge not compared with it")
    config = peft.LoraConfig(
        r=4,
        lora_alpha=16,
        use_rslora=rslora,
        target_modules=[*FFN, "q_proj"],
        rank_pattern={"up_proj": 2},
        alpha_pattern={"down_proj": 5},
        init_lora_weights=False,
    )
    torch.manual_seed(2)
    model = peft.get_peft_model(load(models["base"]), config)
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    make_tokenizer(tmp_path / "merged")
    paths = {**models, "adapter": tmp_path / "adapter", "merged": tmp_path / "merged"}
    for name in ("adapter", "merged"):
        changes = composition(paths, "base", name, **{"experts.attention": "average"})
        convert(planned(models["base"], tmp_path / f"moe-{name}", **changes))
    same_weights(tmp_path / "moe-adapter", tmp_path / "moe-merged")


def test_the_command_line_takes_sources_with_prompts(
    models: dict[str, Path], tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("def f(x):\n\nimport os\n", encoding="utf-8")
    result = invoke(
        "plan", models["base"], "--source-expert", models["base"],
        "--source-expert", f"{models['one']}={prompts}", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["target"]["num_experts"] == 2
    from moe_convert.options import CHOICES

    entry = CHOICES["source_expert"].wrap(f"org/name@v2={prompts}")
    assert entry == {"model": "org/name", "revision": "v2", "prompts": ["def f(x):", "import os"]}
    missing = invoke("plan", models["base"], "--source-expert", f"org/name={tmp_path}/none")
    assert missing.exit_code == 2


def test_other_families_compose_too(tmp_path: Path) -> None:
    """A fused gate and up, and names of its own, go through the same table rows."""
    base, other = (relative(tmp_path / name, seed, "phi3") for seed, name in enumerate("ab"))
    sources = [{"model": str(base)}, {"model": str(other)}]
    changes = {"experts.method": "compose", "experts.sources": sources, "target.num_experts": 2}
    convert(planned(base, tmp_path / "moe", **changes))
    ffns = [load(base), load(other)]
    wanted = reference(load(base), ffns, tmp_path / "moe", scales=(1.0, 1.0))
    assert difference(logits(tmp_path / "moe"), wanted) <= TOLERANCE


def test_the_announced_tensors_are_those_of_transformers(
    models: dict[str, Path], tmp_path: Path
) -> None:
    from moe_convert.checkpoint.names import full_config

    changes = composition(models, "one", "two", **{"experts.attention": "average"})
    plan = planned(models["base"], tmp_path / "moe", **changes)
    names = {spec.name for spec in plan.specs}
    assert set(stored_shapes(full_config(dict(plan.config)))) <= names
