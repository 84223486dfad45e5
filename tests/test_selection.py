"""Biases that steer who is chosen: what stock classes do with them is what they were made for."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_convert.calibrate.run import run
from moe_convert.checkpoint import read_folder
from moe_convert.convert import convert
from moe_convert.data import Data, token_ids
from moe_convert.errors import UsageError
from moe_convert.manifest import Manifest
from moe_convert.selection import balancing_bias, scored, threshold_bias
from moe_convert.splitting import Splitter
from moe_convert.targets import TARGETS
from moe_convert.verify import _watched_routers
from moe_convert.workflow import upcycle
from tests.calibration import job_of
from tests.conftest import Dense
from tests.tiny import TINY, VOCAB_SIZE
from tests.tools import converted, difference, load, logits, planned, tensors

SEQ_LEN, NUM_TOKENS = 64, 1024
FAMILY_OF = {
    "glm4_moe": "llama",
    "solar_open": "llama",
    "dots1": "qwen3",
    "hy_v3": "qwen3",
    "deepseek_v3": "youtu",
    "ernie4_5_moe": "ernie4_5",
    "beam": "gemma3_text",
}
"""A dense family for every target with a selection bias."""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Words in random order, so that tokens come with different neighbours."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    draw = random.Random(3)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(draw.choices(letters, k=draw.randint(1, 7))) for _ in range(2000)]
    path.write_text(" ".join(words), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def split(text: str) -> dict[str, Any]:
    return {
        "experts__method": "split",
        "router__init": "auto",
        "data__train": text,
        "data__seq_len": SEQ_LEN,
        "data__max_tokens": NUM_TOKENS,
        "runtime__precision": "full",
        "runtime__device": "cpu",
        "target__num_experts": 6,
        "target__top_k": 2,
    }


def dense_for(dense: Dense, target: str, **changes: Any) -> Path:
    family = FAMILY_OF[target]
    return dense(family, next(iter(TINY[family])), **changes)


def ids_of(source: Path, text: str) -> torch.Tensor:
    """Return the tokens that such a split was fitted to."""
    return token_ids(Data(train=text, seq_len=SEQ_LEN, max_tokens=NUM_TOKENS), source, VOCAB_SIZE)


def choices_of(model: Any, target: str, ids_BT: torch.Tensor) -> list[dict[str, torch.Tensor]]:
    """Return input, chosen experts and weights of every router of a loaded model on some tokens."""
    seen = list[dict[str, torch.Tensor]]()

    def watch(module: Any, args: Any, out: Any) -> None:
        x_TD = args[0].reshape(-1, args[0].shape[-1])
        seen.append({"x": x_TD, "weights": out[1], "chosen": out[2]})

    routers = [m for n, m in model.named_modules() if n.endswith(TARGETS[target].router_module)]
    hooks = [
        r.register_forward_hook(watch) for r in routers if next(r.parameters(), None) is not None
    ]
    with torch.no_grad():
        model(ids_BT)
    for hook in hooks:
        hook.remove()
    return seen


def losses_in_memory_and_loaded(
    output: Path, states_TD: torch.Tensor, ids_BT: torch.Tensor
) -> tuple[float, float]:
    """Return the loss of the converted stream's last states, and that of the loaded model."""
    model = load(output)

    def loss(logits_BTV: torch.Tensor) -> float:
        told = logits_BTV[:, :-1].flatten(0, 1)
        return float(torch.nn.functional.cross_entropy(told, ids_BT[:, 1:].flatten()))

    with torch.no_grad():
        states_BTD = model.model.norm(states_TD).unflatten(0, ids_BT.shape)
        return loss(model.lm_head(states_BTD)), loss(model(ids_BT).logits)


@pytest.fixture
def last_states(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Keep what the converted stream is at the end of a conversion."""
    found = list[torch.Tensor]()
    monkeypatch.setattr(Splitter, "close", lambda made: found.append(made._converted.states_TD))
    return found


def test_every_target_with_a_selection_bias_is_tried() -> None:
    assert FAMILY_OF.keys() == {name for name, row in TARGETS.items() if row.selection_bias}


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
@pytest.mark.parametrize("top_k", [1, 3])
def test_balancing_makes_the_load_even(scoring: Any, top_k: int) -> None:
    """Although one expert is wanted far more often than the others."""
    generator = torch.Generator().manual_seed(0)
    logits_TE = torch.randn(4096, 8, generator=generator) * 2**-9
    logits_TE[:, 5] += 2 * 2**-9
    scores_TE = scored(logits_TE, scoring)

    def excess(bias_E: torch.Tensor) -> float:
        chosen = (scores_TE + bias_E).topk(top_k, dim=1).indices
        return float(torch.bincount(chosen.flatten(), minlength=8).max()) / (512 * top_k) - 1

    assert excess(torch.zeros(8)) > 0.5
    assert excess(balancing_bias(scores_TE, top_k, 0.03)) <= 0.03


def test_the_best_bias_is_kept_where_no_bias_balances() -> None:
    """All tokens are the same one: whoever is chosen, it is always the same expert."""
    scores_TE = torch.tensor([[0.5, 0.4, 0.1]]).expand(64, 3)
    assert balancing_bias(scores_TE, 1, 0.05).tolist() == [0, 0, 0]


@pytest.mark.parametrize("target", list(FAMILY_OF))
def test_a_balanced_split_is_balanced_as_stock_classes_run_it(
    dense: Dense,
    tmp_path: Path,
    text: str,
    split: dict[str, Any],
    last_states: list[torch.Tensor],
    target: str,
) -> None:
    source, output = dense_for(dense, target), tmp_path / "out"
    changes = {**split, "target__architecture": target, "router__balance": 0.04}
    manifest = converted(source, output, **changes)
    ids_BT = ids_of(source, text)
    found = choices_of(load(output), target, ids_BT)
    loads = [
        torch.bincount(one["chosen"].flatten(), minlength=6) / (NUM_TOKENS * 2) for one in found
    ]
    report = manifest.routing
    assert report is not None
    for load_E, told in zip(loads, report.load, strict=True):
        assert told == pytest.approx(load_E.tolist(), abs=2e-3)
        assert float(load_E.max()) * 6 - 1 < 0.05
    assert report.max_over_mean <= 1.04
    assert report.unbalanced is not None
    assert report.unbalanced > 1.1
    in_memory, loaded = losses_in_memory_and_loaded(output, last_states[0], ids_BT)
    assert in_memory == pytest.approx(loaded, rel=1e-5)


def biases_of(folder: Path, target: str) -> list[torch.Tensor]:
    named, row = read_folder(folder), TARGETS[target]
    return [named[str(row.bias_name(layer))].read() for layer in range(3)]


def test_biases_are_stored_in_fp32_whatever_the_weights_are(
    dense: Dense, tmp_path: Path, split: dict[str, Any]
) -> None:
    source = dense(dtype="bfloat16", intermediate_size=112)
    changes = {**split, "target__architecture": "glm4_moe", "target__num_experts": 7}
    converted(source, tmp_path / "out", **changes, router__balance=0.04)
    for bias_E in biases_of(tmp_path / "out", "glm4_moe"):
        assert bias_E.dtype == torch.float32
        assert bias_E.any()
        assert not torch.equal(bias_E, bias_E.bfloat16().float())
    converted(source, tmp_path / "plain", **changes)
    assert not any(bias_E.any() for bias_E in biases_of(tmp_path / "plain", "glm4_moe"))


def first_ffn(folder: Path, ids_BT: torch.Tensor) -> torch.Tensor:
    """Return what the FFN of layer 0 of a loaded model gives."""
    model, seen = load(folder), list[torch.Tensor]()
    model.model.layers[0].mlp.register_forward_hook(lambda *hooked: seen.append(hooked[2]))
    with torch.no_grad():
        model(ids_BT)
    return seen[0].flatten(0, 1)


@pytest.mark.parametrize(
    "steered", [{"router__balance": 0.04}, {"router__select": "threshold"}], ids=str
)
def test_the_fit_sees_the_steered_choice(
    dense: Dense, tmp_path: Path, text: str, split: dict[str, Any], steered: dict[str, Any]
) -> None:
    """Of layer 0, whose input no other layer changes."""
    changes = {**split, "target__architecture": "glm4_moe", "experts__edits": [{"edit": "refit"}]}
    plain = converted(dense(), tmp_path / "plain", **changes)
    made = converted(dense(), tmp_path / "made", **changes, **steered)
    assert made.split is not None
    assert plain.split is not None
    assert made.split.layer_error[0] != pytest.approx(plain.split.layer_error[0], rel=1e-4)
    given_TD, wanted_TD = (
        first_ffn(folder, ids_of(dense(), text)) for folder in (tmp_path / "made", dense())
    )
    error = float((given_TD - wanted_TD).square().sum() / wanted_TD.square().sum())
    assert made.split.layer_error[0] == pytest.approx(error, rel=1e-3)


def test_an_interrupted_balanced_split_goes_on_to_the_same_report(
    dense: Dense, tmp_path: Path, split: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {**split, "target__architecture": "glm4_moe", "router__balance": 0.04}
    whole = converted(dense(), tmp_path / "whole", **changes)
    make = Splitter._make

    def stop(made: Splitter, layer: int, ffn: Any) -> Any:
        if layer == 2:
            raise KeyboardInterrupt
        return make(made, layer, ffn)

    with monkeypatch.context() as patched:
        patched.setattr(Splitter, "_make", stop)
        with pytest.raises(KeyboardInterrupt):
            converted(dense(), tmp_path / "out", **changes)
    resumed: Manifest = convert(planned(dense(), tmp_path / "out", **changes))
    assert resumed.routing == whole.routing


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target__architecture": "mixtral"}, r"mixtral has no selection bias.*glm4_moe or solar"),
        (
            {"experts__method": "clone", "router__init": "normal"},
            r"is clone.*--method split",
        ),
        ({"target__top_k": 6, "router__init": "distill"}, "every expert is chosen"),
        ({"router__init": "zeros"}, r"all scores are equal.*--router distill"),
        ({"target__num_groups": 2, "target__architecture": "glm4_moe"}, "does not know of groups"),
    ],
)
def test_a_balance_that_cannot_be_made_is_refused(
    dense: Dense, split: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        planned(dense(), **{**split, "router__balance": 0.05, **changes})


def test_auto_takes_a_target_with_a_selection_bias(dense: Dense, split: dict[str, Any]) -> None:
    assert planned(dense(), **split).target.model_type == "mixtral"
    assert planned(dense(), **split, router__balance=0.05).target.model_type == "glm4_moe"


def thresholded(split: dict[str, Any], target: str, **changes: Any) -> dict[str, Any]:
    """Two of six experts on average, none at least and four at most."""
    return {**split, "target__architecture": target, "router__select": "threshold", **changes}


def fires_of(chosen_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Return which experts are among the chosen, [T, E]; those of zeros come behind and go."""
    fires_TE = torch.zeros(len(chosen_TK), 64, dtype=torch.bool)
    return fires_TE.scatter_(1, chosen_TK, True)[:, :num_experts]


def stored(folder: Path, name: str) -> torch.Tensor:
    return read_folder(folder)[name].read().float()


@pytest.mark.parametrize("target", list(FAMILY_OF))
def test_stock_classes_fire_what_lies_above_the_threshold(
    dense: Dense,
    tmp_path: Path,
    text: str,
    split: dict[str, Any],
    last_states: list[torch.Tensor],
    target: str,
) -> None:
    """At most four of six experts, two on average, by the sizes of the stored rows' products."""
    source, output = dense_for(dense, target), tmp_path / "out"
    manifest = converted(source, output, **thresholded(split, target))
    assert (manifest.target.num_experts, manifest.target.top_k) == (10, 4)
    assert (manifest.target.null_experts, manifest.target.mean_k) == (4, 2)
    ids_BT = ids_of(source, text)
    found = choices_of(load(output), target, ids_BT)
    assert len(found) == 3
    row = TARGETS[target]
    for layer, one in enumerate(found):
        rows_ED = stored(output, row.router_name(layer))
        bias_E = stored(output, str(row.bias_name(layer))).flatten()
        assert not rows_ED[6:].any()
        assert not bias_E[:6].any()
        logits_TE = (one["x"] @ rows_ED.T).double()
        scores_TE = logits_TE.sigmoid() if row.scoring == "sigmoid" else logits_TE.softmax(1)
        above_TE = scores_TE[:, :6] - scores_TE[:, 6:7] - bias_E[6]
        best_TE = fires_of(above_TE.topk(4).indices, 6)
        clear_TE = above_TE.abs() > 2e-7
        fires_TE = fires_of(one["chosen"], 6)
        assert torch.equal(fires_TE[clear_TE], ((above_TE > 0) & best_TE)[clear_TE])
        per_token = fires_TE.sum(dim=1)
        assert {0, 4} <= set(per_token.tolist()) <= {0, 1, 2, 3, 4}
        assert float(per_token.float().mean()) == pytest.approx(2, rel=0.02)
        even = one["weights"] / one["weights"].mean()
        assert float((even - 1).abs().max()) < 0.02
    assert manifest.routing is not None
    assert manifest.routing.mean_k == pytest.approx([2, 2, 2], rel=0.02)
    assert [len(load_E) for load_E in manifest.routing.load] == [6, 6, 6]
    in_memory, loaded = losses_in_memory_and_loaded(output, last_states[0], ids_BT)
    assert in_memory == pytest.approx(loaded, rel=1e-5)


def test_norms_above_the_threshold_fire_whatever_the_other_experts_do(
    dense: Dense, tmp_path: Path, text: str, split: dict[str, Any]
) -> None:
    """The threshold is one predicted norm for all tokens and experts of a layer."""
    output = tmp_path / "out"
    converted(dense(), output, **thresholded(split, "glm4_moe"))
    for layer, one in enumerate(choices_of(load(output), "glm4_moe", ids_of(dense(), text))):
        rows_ED = stored(output, f"model.layers.{layer}.mlp.gate.weight")[:6]
        norms_TE, fires_TE = one["x"] @ rows_ED.T, fires_of(one["chosen"], 6)
        free_T = fires_TE.sum(dim=1) < 4
        least = norms_TE[fires_TE].min()
        most = norms_TE[free_T][~fires_TE[free_T]].max()
        assert most - least < 1e-3 * norms_TE.std()


@pytest.mark.parametrize("target", list(FAMILY_OF))
def test_with_every_expert_above_the_threshold_nothing_changes(
    dense: Dense, tmp_path: Path, split: dict[str, Any], target: str
) -> None:
    changes = {"target__top_k": 6, "router__logit_std": 2e-6}
    source = dense_for(dense, target)
    converted(source, tmp_path / "out", **thresholded(split, target, **changes))
    assert difference(logits(tmp_path / "out"), logits(source)) < 1e-4


@pytest.mark.parametrize(("min_k", "max_k"), [(0, 6), (1, 3), (2, 4)])
def test_a_token_uses_as_many_experts_as_are_allowed(
    dense: Dense, tmp_path: Path, text: str, split: dict[str, Any], min_k: int, max_k: int
) -> None:
    changes = {"router__min_k": min_k, "router__max_k": max_k}
    manifest = converted(dense(), tmp_path / "out", **thresholded(split, "glm4_moe", **changes))
    assert manifest.target.null_experts == max_k - min_k
    for one in choices_of(load(tmp_path / "out"), "glm4_moe", ids_of(dense(), text)):
        per_token = fires_of(one["chosen"], 6).sum(dim=1)
        assert min_k <= int(per_token.min()) <= int(per_token.max()) <= max_k
        assert float(per_token.float().mean()) == pytest.approx(2, rel=0.02)


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax"])
@pytest.mark.parametrize(("null_experts", "top_k", "mean_k"), [(8, 8, 3), (4, 6, 3), (5, 5, 5)])
def test_the_threshold_is_the_quantile_that_gives_the_mean(
    scoring: Any, null_experts: int, top_k: int, mean_k: int
) -> None:
    generator = torch.Generator().manual_seed(1)
    logits_TE = torch.randn(5000, 12 + null_experts, generator=generator) * 2**-9
    logits_TE[:, 12:] = 0
    scores_TE = scored(logits_TE, scoring)
    bias_E = threshold_bias(scores_TE, null_experts, top_k, mean_k)
    fires_TE = fires_of((scores_TE + bias_E).topk(top_k, dim=1).indices, 12)
    assert float(fires_TE.sum(dim=1).float().mean()) == pytest.approx(mean_k, rel=2e-3)


def test_weights_in_bf16_keep_their_thresholds(
    dense: Dense, tmp_path: Path, text: str, split: dict[str, Any]
) -> None:
    """Thresholds are of the rounded rows and stay fp32, so the mean is kept; stock bf16 too."""
    source, output = dense(dtype="bfloat16", intermediate_size=96), tmp_path / "out"
    changes = thresholded(split, "glm4_moe", target__num_experts=5, target__shared_experts=1)
    converted(source, output, **changes)
    for dtype, tolerance in (("float32", 0.02), ("bfloat16", 0.1)):
        for one in choices_of(load(output, dtype), "glm4_moe", ids_of(source, text)):
            per_token = fires_of(one["chosen"], 5).sum(dim=1)
            assert float(per_token.float().mean()) == pytest.approx(2, rel=tolerance)


def test_the_plan_says_what_null_experts_cost(dense: Dense, split: dict[str, Any]) -> None:
    plan = planned(dense(), **thresholded(split, "glm4_moe"))
    topk = planned(dense(), **{**split, "target__architecture": "glm4_moe"})
    assert plan.params_total > topk.params_total
    routers = 3 * 4 * (64 + 1)
    assert plan.params_active == topk.params_active + routers
    (note,) = [note for note in plan.warnings if note.code == "null_experts"]
    zeros = 3 * 4 * 3 * 64 * 16 * 4
    share = zeros / sum(spec.num_bytes for spec in plan.specs)
    assert "2 routed experts on average, 4 at most and 0 at least; 4 experts" in note.message
    assert f"{share:.0%} of all bytes" in note.message
    assert "stock engines compute 4" in note.message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target__architecture": "mixtral"}, r"mixtral has no selection bias.*glm4_moe or solar"),
        (
            {"experts__method": "clone", "router__init": "normal"},
            r"is clone.*--method split",
        ),
        ({"router__init": "distill"}, r"a distill router predicts none.*--router ridge"),
        ({"router__balance": 0.1}, "both decide over the selection bias"),
        ({"router__max_k": 7}, r"between 0 and 7 of 6 experts and 2"),
        ({"router__max_k": 1}, r"between 0 and 1 of 6 experts and 2"),
        ({"router__min_k": 3}, r"between 3 and 4 of 6 experts and 2"),
        ({"router__select": "topk", "router__max_k": 4}, r"have no effect.*--select threshold"),
        ({"target__num_groups": 2}, "does not know of groups"),
        ({"calibration__enabled": True, "calibration__train": "router"}, r"--train experts"),
        ({"calibration__enabled": True, "calibration__bias_update": 0.1}, r"--train experts"),
    ],
)
def test_a_threshold_that_cannot_be_made_is_refused(
    dense: Dense, split: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        planned(dense(), **{**thresholded(split, "glm4_moe"), **changes})


@pytest.mark.parametrize("objective", [{"distill": 1.0}, {"hidden": 1.0, "aux": 0.01}])
def test_calibration_trains_experts_and_leaves_routers_thresholds_and_zeros(
    dense: Dense, tmp_path: Path, text: str, split: dict[str, Any], objective: dict[str, float]
) -> None:
    output = tmp_path / "out"
    converted(dense(), output, **thresholded(split, "glm4_moe"))
    before = tensors(output)
    every = {"distill": 0.0, "hidden": 0.0, "aux": 0.0, **objective}
    report = run(*job_of(output, dense(), Path(text), objective=every))
    assert report.trained == ["experts"]
    changed = {name for name, data in tensors(output).items() if data != before[name]}
    assert changed
    assert all(int(re.findall(r"experts\.(\d+)\.", name)[0]) < 6 for name in changed)
    assert report.before.num_experts == report.after.num_experts == 18
    assert [len(load_E) for load_E in report.after.load] == [6, 6, 6]
    with pytest.raises(UsageError, match="--train experts"):
        job_of(output, dense(), Path(text), train="router")


def test_checks_and_card_leave_experts_of_zeros_out(
    dense: Dense, tmp_path: Path, text: str, split: dict[str, Any]
) -> None:
    changes = {"router__max_k": 6, **thresholded(split, "glm4_moe")}
    manifest = upcycle(planned(dense(), tmp_path / "out", **changes))
    assert manifest.verify is not None
    assert manifest.verify.passed
    model, ids_BT = load(tmp_path / "out"), ids_of(dense(), text)
    with _watched_routers(model, TARGETS["glm4_moe"]) as watched:
        found = choices_of(model, "glm4_moe", ids_BT)
    for watch, one in zip(watched, found, strict=True):
        chosen = set(one["chosen"].unique().tolist())
        assert max(chosen) == 11
        assert watch.num_experts == 6
        assert watch.chosen == {expert for expert in chosen if expert < 6}
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "6 routed experts in each of 3 layers, of which a token uses 2 on average" in card


def test_layers_are_chosen_by_measurement_with_a_threshold_too(
    dense: Dense, tmp_path: Path, split: dict[str, Any]
) -> None:
    source = dense(num_hidden_layers=4)
    changes = thresholded(split, "glm4_moe", target__layers="auto")
    manifest = converted(source, tmp_path / "out", **changes)
    assert manifest.target.null_experts == 4
    assert manifest.routing is not None
    assert manifest.routing.mean_k == pytest.approx(
        [2.0] * len(manifest.target.moe_layers), rel=0.02
    )
