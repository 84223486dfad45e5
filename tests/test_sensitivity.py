"""Layers that stay dense: what is measured is what the whole model does, and the worst are kept."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_convert import sensitivity
from moe_convert.checkpoint import open_source
from moe_convert.convert import convert
from moe_convert.errors import UsageError
from moe_convert.families import FAMILIES, find_family
from moe_convert.ffn import FfnSample, Neurons
from moe_convert.inputs import Inputs, read_inputs
from moe_convert.manifest import Manifest, load_manifest
from moe_convert.plan import Plan
from moe_convert.recipe import Recipe, load_recipe
from moe_convert.reproduce import Places, reproduce
from moe_convert.sensitivity import BAR, stay_dense
from moe_convert.splitting import Splitter
from moe_convert.streams import BranchedStream
from moe_convert.workflow import upcycle
from tests.conftest import Dense
from tests.test_cli import invoke
from tests.tiny import TINY, VOCAB_SIZE
from tests.tools import digest, edit_tensors, load, planned

NUM_LAYERS, MOST = 8, 2
SHARED = {"target__shared_experts": 1, "target__num_experts": 3, "target__top_k": 1}
TARGETS = {"qwen3_moe": "qwen3", "glm4_moe": "llama", "mixtral": "llama"}
"""Targets that keep any layers dense, the first ones, and none; with a family for each."""
TEXT = "The river rose in the night, and by morning the lower fields were under water. "


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two of four experts by contribution, solved, in fp32 on the CPU; layers as measured."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(f"{n}: {TEXT * (1 + n % 3)}" for n in range(60)), encoding="utf-8")
    return {
        "experts__method": "split",
        "experts__edits": [{"edit": "refit"}],
        "router__init": "auto",
        "target__layers": "auto",
        "data__train": str(path),
        "data__seq_len": 64,
        "data__max_tokens": 1024,
        "runtime__precision": "full",
        "runtime__device": "cpu",
    }


@pytest.fixture
def weak(dense: Dense, tmp_path: Path) -> Callable[[str, int], Path]:
    """Make a model for a target in which the FFN of one layer matters far more than the others.

    A strong embedding makes those others alike, wherever they are.
    """

    def make(target: str, layer: int) -> Path:
        folder = dense(TARGETS[target], num_hidden_layers=NUM_LAYERS)
        folder = Path(shutil.copytree(folder, tmp_path / f"dense-{layer}"))

        def change(data: dict[str, torch.Tensor]) -> None:
            data["model.embed_tokens.weight"] *= 20.0
            data[f"model.layers.{layer}.mlp.down_proj.weight"] *= 20.0

        edit_tensors(folder, change)
        return folder

    return make


@pytest.mark.parametrize(
    ("target", "layer", "changes", "kept"),
    [
        ("qwen3_moe", 5, {}, [5]),
        ("glm4_moe", 0, SHARED, [0]),
        ("glm4_moe", 1, SHARED, [0, 1]),
        ("glm4_moe", 5, SHARED, []),
    ],
)
def test_the_layer_that_matters_stays_dense(
    weak: Callable[[str, int], Path],
    tmp_path: Path,
    split: dict[str, Any],
    target: str,
    layer: int,
    changes: dict[str, Any],
    kept: list[int],
) -> None:
    """The result is what its plan with explicit layers says, and its recipe says those."""
    output, source = tmp_path / "out", weak(target, layer)
    changes = {**split, **changes, "target__architecture": target}
    plan = planned(source, output, **changes)
    manifest = upcycle(plan)
    found = manifest.sensitivity
    assert found is not None
    assert max(found.kl) == found.kl[layer] > found.bar
    assert found.dense_layers == kept
    moe_layers = [n for n in range(NUM_LAYERS) if n not in kept]
    assert manifest.target.moe_layers == moe_layers
    assert manifest.state == "verified"
    explicit = planned(source, output, **{**changes, "target__layers": moe_layers})
    assert manifest.target.params_active == explicit.params_active
    assert plan.densest is not None
    assert plan.params_active <= explicit.params_active <= plan.densest.params_active
    for recipe in (
        Recipe.model_validate(manifest.recipe),
        load_recipe(str(output / "recipe.yaml")),
    ):
        assert recipe.target.layers == moe_layers
    names = {f"model.layers.{n}.mlp.down_proj.weight" for n in kept}
    assert names == {n for n in loaded(output) if n.endswith("mlp.down_proj.weight")}


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load(folder).named_parameters())


def slow_hurts(plan: Plan, ids: tuple[torch.Tensor, torch.Tensor]) -> list[float]:
    """Split one layer at a time in the whole model, every token by itself."""
    fitted_BT, judged_BT = ids
    folder = plan.source.folder
    assert folder is not None
    model = load(folder)
    layers = model.model.layers
    received: dict[int, torch.Tensor] = {}

    def keep(layer: int) -> Callable[[Any, Any], None]:
        return lambda module, args: received.update({layer: args[0].flatten(0, 1)})

    hooks = [one.mlp.register_forward_pre_hook(keep(n)) for n, one in enumerate(layers)]
    with torch.no_grad():
        model(fitted_BT)
        for hook in hooks:
            hook.remove()
        dense = model(judged_BT).logits.log_softmax(dim=-1)
        found = []
        for layer, x_TD in received.items():
            hook = layers[layer].mlp.register_forward_hook(masked(plan, layer, x_TD))
            other = model(judged_BT).logits.log_softmax(dim=-1)
            hook.remove()
            found.append(float((dense.exp() * (dense - other)).sum(dim=-1).mean()))
    return found


def masked(plan: Plan, layer: int, x_TD: torch.Tensor) -> Callable[..., torch.Tensor]:
    """Return a hook that lets only shared neurons and those of the best experts through."""
    weights = {name: ref.weight() for name, ref in plan.source.tensors.items()}
    neurons = Neurons.of(plan.layout.family.ffn(layer, weights, plan.layout.body))
    given_TD = neurons.hidden(x_TD) @ neurons.down_DF.T
    sample = FfnSample(x_TD, x_TD, given_TD, 64, None, lambda: given_TD)
    method = plan.recipe.experts
    grouping = method.group(plan.shape, layer, neurons, sample)  # type: ignore[union-attr]
    rows_ED = plan.recipe.router.fit(neurons, grouping, x_TD, layer)

    def hook(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        rows = []
        for x_D in args[0].flatten(0, 1):
            best = (rows_ED @ x_D).argsort(descending=True)[: plan.shape.top_k]
            on_N = torch.cat([grouping.shared_N, *(grouping.routed_EN[e] for e in best)])
            gate_N = torch.nn.functional.silu(neurons.gate_FD[on_N] @ x_D)
            rows.append(neurons.down_DF[:, on_N] @ (gate_N * (neurons.up_FD[on_N] @ x_D)))
        return torch.stack(rows).view_as(out)

    return hook


def inputs_of(plan: Plan) -> Inputs:
    body = plan.layout.body
    inputs = read_inputs(plan.recipe, plan.shape, body.vocab_size, plan.source.folder)
    assert inputs is not None
    return inputs


def test_hurts_are_those_of_the_whole_model(
    dense: Dense, tmp_path: Path, split: dict[str, Any]
) -> None:
    source = dense("qwen3", num_hidden_layers=NUM_LAYERS)
    plan = planned(source, tmp_path / "out", target__architecture="qwen3_moe", **split)
    inputs = inputs_of(plan)
    weights = {name: ref.weight() for name, ref in plan.source.tensors.items()}
    steps = list[tuple[int, int]]()
    found = sensitivity.measure(
        plan, plan.source.fetch(), weights, inputs, lambda what, *step: steps.append(step)
    )
    slow = slow_hurts(plan, inputs.samples)
    assert found.kl == pytest.approx(slow, rel=1e-3)
    assert min(slow) > 1e-5
    assert found.tokens == inputs.samples[1].numel()
    assert steps == sorted(steps)
    assert steps[-1][0] == steps[-1][1]


@pytest.mark.parametrize("model_type", list(FAMILIES))
def test_branches_are_the_whole_model_with_one_ffn_changed(dense: Dense, model_type: str) -> None:
    """Norms behind the FFN, multipliers, soft caps, hybrid layers and heads are the model's own."""
    folder = dense(model_type, next(iter(TINY[model_type])))
    source = open_source(str(folder))
    family, body = find_family(source.config)
    weights = {name: ref.weight() for name, ref in source.tensors.items()}
    ids_BT = torch.randint(2, VOCAB_SIZE, (3, 40), generator=torch.Generator().manual_seed(2))
    stream = BranchedStream(source.config, family, weights, ids_BT)
    with torch.no_grad():
        for layer in range(body.num_layers):
            stream.branch(layer, lambda x_TD: 5.0 * x_TD.roll(1, dims=1))
    model = load(folder)
    expected = []
    with torch.no_grad():
        dense_BTV = model(ids_BT).logits.log_softmax(dim=-1)
        for layer in model.get_submodule(family.layers):
            hook = layer.get_submodule(family.ffn_module).register_forward_hook(
                lambda module, args, out: 5.0 * args[0].roll(1, dims=-1)
            )
            other_BTV = model(ids_BT).logits.log_softmax(dim=-1)
            hook.remove()
            kl_BT = (dense_BTV.exp() * (dense_BTV - other_BTV)).sum(dim=-1)
            expected.append(float(kl_BT.mean()))
        assert stream.divergences() == pytest.approx(expected, rel=2e-3, abs=1e-6)
    assert min(expected) > 1e-4


@pytest.mark.parametrize(
    ("hurt", "rule", "kept"),
    [
        ([1, 1, 9, 1, 1, 1, 1, 5], "any", (2, 7)),
        ([1, 8, 9, 1, 1, 1, 1, 7], "any", (1, 2)),
        ([1, 1, 1, 1, 1, 1, 1, 2], "any", ()),
        ([9, 1, 1, 1, 1, 1, 1, 9], "prefix", (0,)),
        ([1, 9, 1, 1, 1, 1, 1, 1], "prefix", (0, 1)),
        ([0.5, 2.1, 1, 1, 1, 1, 1, 1], "prefix", ()),
        ([9, 9, 9, 1, 1, 1, 1, 1], "prefix", (0, 1)),
        ([1, 1, 9, 1, 1, 1, 1, 1], "prefix", ()),
        ([0.0] * 8, "any", ()),
    ],
)
def test_the_rule(hurt: list[float], rule: Any, kept: tuple[int, ...]) -> None:
    assert BAR == 2.0
    assert stay_dense(hurt, rule) == kept


@pytest.mark.parametrize("shape", [(64, 1024), (16, 64), (8, 64), (3, 64), (2, 64)])
def test_what_is_judged_was_not_fitted_to(shape: tuple[int, int]) -> None:
    data_BT = torch.arange(shape[0] * shape[1]).view(shape)
    fitted_BT, judged_BT = Inputs(data_BT).samples
    assert not set(fitted_BT[:, 0].tolist()) & set(judged_BT[:, 0].tolist())
    assert len(fitted_BT)
    assert len(judged_BT)
    assert fitted_BT.numel() <= 8192
    assert judged_BT.numel() <= max(2048, shape[1])
    if shape == (64, 1024):
        assert (fitted_BT.shape, judged_BT.shape) == ((8, 1024), (4, 512))


def stopped_at(steps: int) -> Callable[[str, int, int], None]:
    """Return progress that interrupts when so many steps of the conversion are done."""
    seen = list[int]()

    def progress(what: str, done: int, total: int) -> None:
        seen.extend([done] if what == "split" else [])
        if len(seen) == steps:
            raise KeyboardInterrupt

    return progress


def test_a_resumed_run_keeps_to_what_was_decided(
    weak: Callable[[str, int], Path],
    tmp_path: Path,
    split: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, changes = weak("qwen3_moe", 5), {**split, "target__architecture": "qwen3_moe"}
    with pytest.raises(KeyboardInterrupt):
        convert(planned(source, tmp_path / "out", **changes), stopped_at(4))
    whole = convert(planned(source, tmp_path / "whole", **changes))

    def refuse(*args: Any) -> Any:
        raise AssertionError("it was measured a second time")

    monkeypatch.setattr(sensitivity, "measure", refuse)
    fitted, make = list[int](), Splitter._make

    def counted(self: Splitter, layer: int, ffn: Any) -> Any:
        fitted.append(layer)
        return make(self, layer, ffn)

    monkeypatch.setattr(Splitter, "_make", counted)
    resumed = convert(planned(source, tmp_path / "out", **changes))
    assert resumed.sensitivity == whole.sensitivity
    assert fitted == [2, 3, 4, 6, 7]
    one, two = (digest(tmp_path / name) for name in ("out", "whole"))
    assert {**one, "moe_convert.json": ""} == {**two, "moe_convert.json": ""}


def test_reproducing_measures_nothing(
    weak: Callable[[str, int], Path],
    tmp_path: Path,
    split: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, changes = weak("qwen3_moe", 5), {**split, "target__architecture": "qwen3_moe"}
    convert(planned(source, tmp_path / "out", **changes))
    monkeypatch.setattr(sensitivity, "measure", None)
    places = Places(str(source), (), split["data__train"])
    assert reproduce(tmp_path / "out", tmp_path / "again", places).equal


def test_seeds_decide_what_is_measured(dense: Dense, tmp_path: Path, split: dict[str, Any]) -> None:
    source = dense("qwen3", num_hidden_layers=NUM_LAYERS)
    changes = {**split, "target__architecture": "qwen3_moe"}
    found = list[Manifest]()
    for number, seed in enumerate((0, 0, 1)):
        torch.manual_seed(number)
        plan = planned(source, tmp_path / f"{number}", experts__seed=seed, **changes)
        found.append(convert(plan))
    one, two, other = (manifest.sensitivity for manifest in found)
    assert one == two != other
    assert (
        digest(tmp_path / "0")["model.safetensors"] == digest(tmp_path / "1")["model.safetensors"]
    )


@pytest.mark.parametrize("strategy", ["cmoe", "gradient", "weights"])
def test_other_strategies_are_tried_as_they_are(
    weak: Callable[[str, int], Path], tmp_path: Path, split: dict[str, Any], strategy: str
) -> None:
    changes = {**split, "experts__strategy": strategy, "target__architecture": "qwen3_moe"}
    plan = planned(weak("qwen3_moe", 5), tmp_path / "out", **changes)
    assert convert(plan).target.moe_layers == [0, 1, 2, 3, 4, 6, 7]


NO_DATA = dict.fromkeys(("data__train", "data__seq_len", "data__max_tokens", "experts__edits"))
BAD: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "clone": (
        "qwen3_moe",
        {**NO_DATA, "experts__method": "clone", "router__init": "normal"},
        "with experts.method clone nothing is lost",
        "Use --layers all",
    ),
    "every expert fires": (
        "qwen3_moe",
        {"target__top_k": 4},
        "every expert fires nothing is lost",
        "Use --layers all",
    ),
    "made of no data": (
        "qwen3_moe",
        {**NO_DATA, "experts__strategy": "random"},
        "strategy random, router normal. is made of none",
        "Use --strategy contribution",
    ),
    "no dense layers": (
        "mixtral",
        {},
        "mixtral cannot keep any layer dense",
        "Targets that can: .*glm4_moe",
    ),
    "one row": (
        "qwen3_moe",
        {"data__seq_len": 512, "data__max_tokens": 512},
        "one row of 512 tokens, and --layers auto needs another",
        "a smaller data.seq_len",
    ),
    "few layers": ("qwen3_moe", {"layers": 3}, "none of 3", "by number"),
}


@pytest.mark.parametrize("mistake", list(BAD))
def test_what_cannot_be_decided_is_refused_in_the_plan(
    dense: Dense, split: dict[str, Any], mistake: str
) -> None:
    target, changes, sentence, remedy = BAD[mistake]
    changes = {**split, **changes, "target__architecture": target}
    source = dense(TARGETS[target], num_hidden_layers=changes.pop("layers", NUM_LAYERS))
    changes = {key: value for key, value in changes.items() if value is not None}
    with pytest.raises(UsageError, match=sentence) as found:
        planned(source, **changes)
    assert found.value.hint
    assert re.search(remedy, found.value.hint)


def test_auto_takes_a_target_that_can_keep_layers_dense(
    dense: Dense, split: dict[str, Any]
) -> None:
    source = dense("llama", num_hidden_layers=NUM_LAYERS)
    assert planned(source, **{**split, "target__layers": "all"}).target.dense_layers == "none"
    chosen = planned(source, target__architecture="auto", **split).target
    assert chosen.dense_layers != "none"


def test_the_commands_say_what_is_open_and_what_was_decided(
    weak: Callable[[str, int], Path], tmp_path: Path, split: dict[str, Any]
) -> None:
    source = weak("qwen3_moe", 5)
    settings = {
        "experts.edits": json.dumps(split["experts__edits"]),
        "data.seq_len": 64,
        "runtime.precision": "full",
        "calibration.enabled": "false",
    }
    arguments = [source, "--target", "qwen3_moe", "--layers", "auto", "--method", "split"]
    arguments += ["-e", 4, "--data", split["data__train"], "--max-tokens", 1024]
    arguments += ["--device", "cpu"]
    arguments += [part for pair in settings.items() for part in ("--set", "=".join(map(str, pair)))]
    plan = planned(source, **{**split, "target__architecture": "qwen3_moe"})
    shown = invoke("plan", *arguments)
    assert shown.exit_code == 0, shown.output
    words = " ".join(shown.output.split())
    assert f"decided by measurement before conversion; up to {MOST} stay dense" in words
    section = json.loads(invoke("plan", *arguments, "--json").stdout)["densest"]
    assert plan.densest is not None
    assert section == {
        "num_dense_layers": MOST,
        "params_total": plan.densest.params_total,
        "params_active": plan.densest.params_active,
    }
    made = invoke("upcycle", *arguments, "-o", tmp_path / "out")
    assert made.exit_code == 0, made.output
    assert "left dense: 5 (" in made.output
    assert "layers 5 keep their dense FFN" in (tmp_path / "out" / "README.md").read_text("utf-8")
    assert load_manifest(tmp_path / "out").sensitivity is not None
    assert not list((tmp_path / "out").glob(".*"))
