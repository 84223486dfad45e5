"""Splits fitted to data: what is fitted is what is written, and what is written is what runs."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_convert import carving
from moe_convert.carving import Carved, refit
from moe_convert.checkpoint import read_folder
from moe_convert.convert import convert, public_recipe
from moe_convert.data import Data, token_ids
from moe_convert.edits import Fit, Tune
from moe_convert.errors import DoesNotFitError, UsageError
from moe_convert.experts import STRATEGIES, Split
from moe_convert.experts.split import Learned
from moe_convert.ffn import Ffn, FfnSample, Grouping, Neurons
from moe_convert.inputs import Inputs, read_inputs
from moe_convert.manifest import MANIFEST_NAME
from moe_convert.plan import Plan, make_plan
from moe_convert.plan.estimate import offload_folder
from moe_convert.recipe import SCHEMA, build_recipe
from moe_convert.splitting import Splitter
from moe_convert.streams import Room
from tests.conftest import Dense
from tests.tiny import TINY, VOCAB_SIZE
from tests.tools import converted, difference, digest, load, logits, planned

TEXT = "The river rose in the night, and by morning the lower fields were under water. "
SEQ_LEN, NUM_TOKENS = 64, 512
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT * 40, encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def split(text: str) -> dict[str, Any]:
    """Two of four experts by contribution, tuned and solved, in fp32 on the CPU."""
    return {
        "experts__method": "split",
        "router__init": "auto",
        "data__train": text,
        "data__seq_len": SEQ_LEN,
        "data__max_tokens": NUM_TOKENS,
        "runtime__precision": "full",
        "runtime__device": "cpu",
    }


def ids_of(source: Path, text: str) -> torch.Tensor:
    """Return the tokens that such a split was fitted to."""
    data = Data(train=text, seq_len=SEQ_LEN, max_tokens=NUM_TOKENS)
    return token_ids(data, source, VOCAB_SIZE)


def streams_of(folder: Path, ids_BT: torch.Tensor) -> list[torch.Tensor]:
    """Return what every layer of a loaded model gives, [T, D]: hooks on the whole model."""
    model, seen = load(folder), list[torch.Tensor]()

    def watch(module: Any, args: Any, out: Any) -> None:
        seen.append((out[0] if isinstance(out, tuple) else out).flatten(0, 1))

    for layer in model.model.layers:
        layer.register_forward_hook(watch)
    with torch.no_grad():
        model(ids_BT)
    return seen


def loss(logits_BTV: torch.Tensor, ids_BT: torch.Tensor) -> float:
    """Return the mean loss of the next tokens."""
    told = logits_BTV[:, :-1].flatten(0, 1)
    return float(torch.nn.functional.cross_entropy(told, ids_BT[:, 1:].flatten()))


@contextmanager
def splitter(plan: Plan) -> Iterator[Splitter]:
    """Yield what makes the layers of a plan, nothing made yet."""
    local = plan.source.fetch()
    inputs = read_inputs(plan.recipe, plan.shape, plan.layout.body.vocab_size, local.folder)
    assert isinstance(inputs, Inputs)
    weights = {name: ref.weight() for name, ref in local.tensors.items()}
    made = Splitter(plan, local, weights, inputs, lambda layer: False)
    yield made
    made.close()


SHARED = {"target__shared_experts": 1, "target__num_experts": 3, "target__top_k": 1}


@pytest.mark.parametrize(
    ("target", "changes"), [("mixtral", {}), ("glm4_moe", SHARED), ("qwen2_moe", SHARED)]
)
def test_the_report_is_what_the_loaded_model_does(
    dense: Dense,
    tmp_path: Path,
    text: str,
    split: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    changes: dict[str, Any],
) -> None:
    """States, loss and errors of the streams are those of the models run whole."""
    last = list[torch.Tensor]()
    monkeypatch.setattr(Splitter, "close", lambda made: last.append(made._converted.states_TD))
    output = tmp_path / "out"
    manifest = converted(dense(), output, target__architecture=target, **split, **changes)
    ids_BT = ids_of(dense(), text)
    assert ids_BT.numel() == NUM_TOKENS
    pairs = zip(streams_of(output, ids_BT), streams_of(dense(), ids_BT), strict=True)
    errors = [float((one - two).square().sum() / two.square().sum()) for one, two in pairs]
    assert manifest.split is not None
    assert manifest.split.stream_error == pytest.approx(errors, rel=1e-3)
    assert min(errors) > 1e-5
    model = load(output)
    with torch.no_grad():
        in_memory = loss(
            model.lm_head(model.model.norm(last[0])).unflatten(0, ids_BT.shape), ids_BT
        )
        assert in_memory == pytest.approx(loss(model(ids_BT).logits, ids_BT), rel=1e-5)
        assert in_memory != pytest.approx(loss(load(dense())(ids_BT).logits, ids_BT), rel=2e-5)
    assert manifest.routing is not None
    assert manifest.routing.tokens == NUM_TOKENS


def test_two_streams_are_those_of_the_models_run_whole(
    dense: Dense, tmp_path: Path, text: str, split: dict[str, Any]
) -> None:
    """At layer 1: its input, and what would bring the converted stream to the dense one.

    The reference is the finished model, of which layer 0 alone matters here, with the FFN of layer
    1 giving nothing.
    """
    plan = planned(dense(), tmp_path / "out", **split)
    convert(plan)
    ids_BT = ids_of(dense(), text)
    model = load(tmp_path / "out")
    received, left = list[torch.Tensor](), list[torch.Tensor]()

    def silence(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        received.append(args[0])
        return 0 * out

    layer = model.model.layers[1]
    layer.mlp.register_forward_hook(silence)
    layer.register_forward_hook(lambda module, args, out: left.append(out))
    with torch.no_grad():
        model(ids_BT)
    target_TD = streams_of(dense(), ids_BT)[1] - left[0].flatten(0, 1)
    sample = sample_at(plan, tmp_path / "out", 1)
    assert torch.allclose(sample.x_TD, received[0].flatten(0, 1), atol=1e-4)
    assert torch.allclose(sample.target_TD, target_TD, atol=1e-4)
    assert not torch.allclose(sample.x_TD, sample.dense_TD, atol=1e-2)


def sample_at(plan: Plan, written: Path, layer: int) -> FfnSample:
    """Return what a layer is fitted to, with the layers before it as they were written."""
    stored = {name: ref.weight() for name, ref in read_folder(written).items()}
    with splitter(plan) as made:
        for before in range(layer):
            made._sample(before, neurons_of(plan, before))
            prefix = f"model.layers.{before}."
            made.leave(before, [(n, w) for n, w in stored.items() if n.startswith(prefix)])
        return made._sample(layer, neurons_of(plan, layer))


def neurons_of(plan: Plan, layer: int) -> Neurons:
    return Neurons.of(ffn_of(plan, layer))


def ffn_of(plan: Plan, layer: int) -> Ffn:
    weights = {name: ref.weight() for name, ref in plan.source.tensors.items()}
    return plan.layout.family.ffn(layer, weights, plan.layout.body)


@pytest.mark.parametrize(
    ("model_type", "target", "gain"),
    [
        ("llama", "mixtral", 1.0),
        ("granite", "granitemoe", "residual_multiplier"),
        ("gemma3_text", "beam", None),
        ("olmo2", "flex_olmo", None),
        ("gemma4_text", "gemma4_text", None),
    ],
)
def test_the_gain_is_what_a_layer_multiplies_its_experts_by(
    dense: Dense, split: dict[str, Any], model_type: str, target: str, gain: float | str | None
) -> None:
    plan = planned(
        dense(model_type, next(iter(TINY[model_type]))), target__architecture=target, **split
    )
    if isinstance(gain, str):
        gain = float(plan.source.config[gain])
        assert gain != 1.0
    with splitter(plan) as made:
        made._sample(0, neurons_of(plan, 0))
        assert made._converted.gain == (None if gain is None else pytest.approx(gain, rel=1e-4))


def random_carved(generator: torch.Generator, top_k: int = 1) -> Carved:
    """Return 3 experts of 4 neurons and 4 shared ones in 6 dimensions."""
    shapes = {"gate_FD": (16, 6), "up_FD": (16, 6), "down_DF": (6, 16)}
    neurons = Neurons(**{n: torch.randn(s, generator=generator) for n, s in shapes.items()})
    order_F = torch.randperm(16, generator=generator)
    grouping = Grouping(order_F[:4], order_F[4:].view(3, 4))
    return Carved.of(neurons, grouping, torch.randn(3, 6, generator=generator), top_k)


@pytest.mark.parametrize("ridge", [1e-9, 0.01, 1.0])
def test_refit_solves_the_stacked_system(ridge: float) -> None:
    """[H; √λ I] · downᵀ = [target; √λ down₀ᵀ], by a direct solver in fp64."""
    generator = torch.Generator().manual_seed(3)
    carved = random_carved(generator)
    x_TD, target_TD = (torch.randn(200, 6, generator=generator) for _ in range(2))
    hidden_TF = slow_hidden(carved, x_TD).double()
    damping = ridge * float((hidden_TF.T @ hidden_TF).diagonal().mean())
    below_FF = damping**0.5 * torch.eye(16, dtype=torch.float64)
    stacked = torch.cat([hidden_TF, below_FF])
    wanted = torch.cat([target_TD.double(), below_FF @ carved.neurons.down_DF.T.double()])
    expected_FD = torch.linalg.lstsq(stacked, wanted).solution
    found_DF = refit(carved, x_TD, target_TD, ridge)
    assert torch.allclose(found_DF.T.double(), expected_FD, atol=1e-3 if ridge < 1e-6 else 1e-5)


def slow_hidden(carved: Carved, x_TD: torch.Tensor) -> torch.Tensor:
    """Return the firing neurons' values, one token after the other."""
    neurons, rows = carved.neurons, []
    for x_D in x_TD:
        score_E = carved.router_ED @ x_D
        score_E = score_E if carved.bias_E is None else score_E.sigmoid() + carved.bias_E
        chosen = score_E.topk(carved.top_k).indices.tolist()
        gate_F = torch.nn.functional.silu(neurons.gate_FD @ x_D)
        value_F = gate_F * (neurons.up_FD @ x_D)
        fires = [group in (*chosen, len(carved.router_ED)) for group in carved.group_F.tolist()]
        rows.append(value_F * torch.tensor(fires))
    return torch.stack(rows)


@pytest.mark.parametrize("strategy", ["contribution", "learned"])
def test_the_written_recipe_names_the_steps_of_this_device(
    dense: Dense, tmp_path: Path, split: dict[str, Any], strategy: str
) -> None:
    """Those of a GPU would be others, and the result too."""
    changes = {**split, "experts__strategy": strategy}
    method = public_recipe(planned(dense(), tmp_path / "out", **changes)).experts
    if isinstance(method, Learned):
        assert method.steps == Learned().num_steps(gpu=False) < Learned().num_steps(gpu=True)
    else:
        assert method.edits[0] == Tune(steps=40, tokens=1024) != Tune().resolved(gpu=True)


def test_refit_in_chunks_is_refit_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(4)
    carved = random_carved(generator, top_k=2)
    x_TD, target_TD = (torch.randn(200, 6, generator=generator) for _ in range(2))
    whole_DF = refit(carved, x_TD, target_TD, 0.01)
    monkeypatch.setitem(carving.PORTION, "cpu", 33)
    assert torch.allclose(refit(carved, x_TD, target_TD, 0.01), whole_DF, atol=1e-5)


def test_masking_as_a_gpu_does_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(6)
    carved = random_carved(generator, top_k=2)
    x_TD, target_TD = (torch.randn(200, 6, generator=generator) for _ in range(2))
    given_TD, solved_DF = carved(x_TD), refit(carved, x_TD, target_TD, 0.01)
    monkeypatch.setattr("moe_convert.carving.MASKED", ("cpu",))
    assert torch.allclose(carved(x_TD), given_TD, atol=1e-5)
    assert torch.allclose(refit(carved, x_TD, target_TD, 0.01), solved_DF, atol=1e-5)


def test_only_what_fires_gives() -> None:
    """An expert that nobody chooses gives nothing; tokens go through in portions."""
    generator = torch.Generator().manual_seed(5)
    carved = replace(random_carved(generator, top_k=2), bias_E=torch.tensor([0.0, -1e9, 0.0]))
    x_TD = torch.randn(3 * carving.PORTION["cpu"] // 2, 6, generator=generator)
    expected_TD = slow_hidden(carved, x_TD) @ carved.neurons.down_DF.T
    assert torch.allclose(carved(x_TD), expected_TD, atol=1e-4)


def test_a_cpu_fits_in_fp32_where_streams_are_in_bf16(
    dense: Dense, tmp_path: Path, split: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Casting the operands of small products costs more than they save in bf16."""
    monkeypatch.setattr("moe_convert.runtime.bf16_is_fast", lambda: True)
    plan = planned(dense(), tmp_path / "out", **{**split, "runtime__precision": "auto"})
    neurons, method = neurons_of(plan, 0), plan.recipe.experts
    assert isinstance(method, Split)
    with splitter(plan) as made, made._products():
        found = made._make(0, ffn_of(plan, 0))
    with splitter(plan) as again, again._products():
        sample = again._sample(0, neurons)
    carved = Carved.of(neurons, found.grouping, found.router_ED, plan.shape.top_k)
    with made._products():
        given_TD = carved(sample.x_TD)
    assert torch.equal(given_TD, carved(sample.x_TD))
    for edit in method.edits:
        assert isinstance(edit, Fit)
        carved = edit.fit(carved, sample, method.layer_seed(0))
    assert torch.allclose(found.ffn.down_DF.load(), carved.neurons.down_DF, atol=1e-5)


def test_tune_descends_on_the_masked_error() -> None:
    """Adam on the error of all neurons computed and masked, all tokens in every step."""
    generator = torch.Generator().manual_seed(6)
    carved = random_carved(generator, top_k=1)
    x_TD, target_TD = (torch.randn(40, 6, generator=generator) for _ in range(2))
    fires_TF = slow_hidden(carved, x_TD) != 0
    old = carved.neurons
    live = [part.clone().requires_grad_() for part in (old.gate_FD, old.up_FD, old.down_DF)]
    rates = [0.05 * float(part.detach().square().mean().sqrt()) for part in live]
    optimizer = torch.optim.Adam([{"params": [part]} for part in live])
    for share in (1.0, 0.75, 0.25):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = share * rate
        hidden_TF = torch.nn.functional.silu(x_TD @ live[0].T) * (x_TD @ live[1].T) * fires_TF
        missed = (hidden_TF @ live[2].T - target_TD).square().sum()
        optimizer.zero_grad()
        (missed / target_TD.square().sum()).backward()
        optimizer.step()
    found = carving.tune(carved, x_TD, target_TD, steps=3, tokens=40, rate=0.05, seed=0)
    for part, expected in zip((found.gate_FD, found.up_FD, found.down_DF), live, strict=True):
        assert torch.allclose(part, expected, atol=1e-5)
    assert not torch.allclose(found.up_FD, old.up_FD, atol=1e-2)


FEW: dict[str, dict[str, Any]] = {"learned": {"experts__steps": 2}}
"""Settings that make a strategy quick."""


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_every_strategy_is_exact_where_every_expert_is_chosen(
    dense: Dense, tmp_path: Path, split: dict[str, Any], strategy: str
) -> None:
    counts = {"target__num_experts": 3, "target__top_k": 3, "target__shared_experts": 1}
    settings = {k: v for k, v in split.items() if fits(strategy, k)} | FEW.get(strategy, {})
    manifest = converted(
        dense(),
        tmp_path / "out",
        target__architecture="glm4_moe",
        experts__strategy=strategy,
        **{**settings, **counts, "router__init": "zeros"},
    )
    assert manifest.exact
    assert difference(logits(tmp_path / "out"), logits(dense())) <= 1e-4
    assert (manifest.split is not None) == (STRATEGIES[strategy].needs != "nothing")


def fits(strategy: str, key: str) -> bool:
    """Whether a setting has an effect: data that nothing looks at are refused."""
    return STRATEGIES[strategy].needs != "nothing" or not key.startswith("data")


def test_seeds_decide_the_bytes_and_nothing_else_does(
    dense: Dense, tmp_path: Path, split: dict[str, Any]
) -> None:
    runs = (("one", 0), ("two", 0), ("other", 1))
    for number, (name, seed) in enumerate(runs):
        torch.manual_seed(100 + number)
        before = torch.get_rng_state()
        converted(dense(), tmp_path / name, experts__seed=seed, **split)
        assert torch.equal(torch.get_rng_state(), before)
    one, two, other = (digest(tmp_path / name)[WEIGHTS] for name, _ in runs)
    assert one == two != other


def test_an_interrupted_run_goes_on_where_it_was(
    dense: Dense, tmp_path: Path, split: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = list[int]()

    def stop(what: str, done: int, total: int) -> None:
        """Stop behind the embedding, layer 0 and layer 1, which is not on the disk by then."""
        steps.extend([done] if what == "split" else [])
        if len(steps) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(planned(dense(), tmp_path / "out", **split), stop)
    fitted, make = list[int](), Splitter._make

    def counted(self: Splitter, layer: int, ffn: Ffn) -> Any:
        fitted.append(layer)
        return make(self, layer, ffn)

    monkeypatch.setattr(Splitter, "_make", counted)
    resumed = converted(dense(), tmp_path / "out", **split)
    assert fitted == [1, 2]
    whole = converted(dense(), tmp_path / "whole", **split)
    assert digest(tmp_path / "out")[WEIGHTS] == digest(tmp_path / "whole")[WEIGHTS]
    assert resumed.split is not None
    assert whole.split is not None
    assert resumed.split.stream_error == pytest.approx(whole.split.stream_error, rel=1e-5)
    assert [error is None for error in resumed.split.layer_error] == [True, False, False]
    assert resumed.routing == whole.routing


@pytest.mark.parametrize(
    ("active", "ffn_size", "dtype", "counts"),
    [
        (0.25, 256, "fp32", (56, 8, 8)),
        (0.5, 256, "fp32", (48, 16, 16)),
        (0.25, 256, "bf16", (28, 4, 4)),
        (0.25, 96, "fp32", (7, 1, 1)),
        (0.75, 96, "fp32", (5, 3, 3)),
    ],
)
def test_a_share_sets_all_counts(
    dense: Dense,
    split: dict[str, Any],
    active: float,
    ffn_size: int,
    dtype: str,
    counts: tuple[int, int, int],
) -> None:
    plan = by_share(dense(intermediate_size=ffn_size), active, split, target__dtype=dtype)
    shape = plan.shape
    assert (shape.num_experts, shape.top_k, shape.num_shared) == counts
    fires = shape.shared_size + shape.top_k * shape.expert_size
    assert fires == pytest.approx(active * ffn_size, abs=shape.expert_size / 2)


def by_share(source: Path, active: float, split: Mapping[str, Any], **changes: Any) -> Plan:
    """Plan a split of which only the share is given."""
    places = {"source.model": str(source), "target.active": active, "target.architecture": "auto"}
    dotted = {
        k.replace("__", "."): v
        for k, v in {**split, "data__max_tokens": 2048, **changes}.items()
        if v is not None
    }
    return make_plan(build_recipe({"schema": SCHEMA}, {**places, **dotted}))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "not a split": ({"experts__method": "clone", "router__init": "normal"}, "Use --method split"),
    "counts too": ({"target__top_k": 2}, "sets target.top_k too"),
    "shared too": ({"target__shared_experts": 1}, "sets target.shared_experts too"),
    "too little": ({"target__active": 0.001}, "lets 0.001 of it fire"),
    "too wide": ({"target__dtype": "bf16"}, "multiples of 8"),
}


@pytest.mark.parametrize("mistake", list(REFUSED))
def test_shares_that_cannot_be_are_refused(
    dense: Dense, split: dict[str, Any], mistake: str
) -> None:
    changes, sentence = REFUSED[mistake]
    source = dense(intermediate_size=40 if mistake == "too wide" else 96)
    with pytest.raises(UsageError, match=sentence) as found:
        by_share(source, 0.25, split, **changes)
    assert found.value.hint


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "refit of clones": (
        {"experts__method": "clone", "router__init": "normal", "experts__edits": ["refit"]},
        "The edit refit fits parts of one FFN",
    ),
    "tune of clones": (
        {"experts__method": "clone", "router__init": "normal", "experts__edits": ["tune"]},
        "The edit tune fits parts of one FFN",
    ),
    "representative": ({"router__init": "representative"}, "comes out of the strategy cmoe"),
    "grouped": ({"router__init": "grouped"}, "strategy gradient or learned"),
    "few tokens": ({"data__max_tokens": 256}, "256 tokens, and solving for 96 neurons needs 384"),
    "not measured": ({"router__measure": False}, "--no-measure has no effect"),
    "not centred": ({"router__center": False}, "center has no effect: distill routers are not"),
}


@pytest.mark.parametrize("mistake", list(BAD))
def test_what_cannot_be_fitted_is_refused(
    dense: Dense, tmp_path: Path, split: dict[str, Any], mistake: str
) -> None:
    changes, sentence = BAD[mistake]
    edits = [{"edit": name} for name in changes.get("experts__edits", ())]
    changes = {**split, **changes, **({"experts__edits": edits} if edits else {})}
    with pytest.raises(UsageError, match=sentence):
        convert(planned(dense(), tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("strategy", list(STRATEGIES))
def test_too_few_tokens_for_the_experts_are_refused(
    dense: Dense, tmp_path: Path, split: dict[str, Any], strategy: str
) -> None:
    """Before anything is written, wherever data decide: in groups, or in routers alone."""
    changes = {**split, "experts__strategy": strategy, "experts__edits": [], "data__seq_len": 21}
    if STRATEGIES[strategy].needs == "nothing":
        changes["router__init"] = "distill"
    changes |= FEW.get(strategy, {})
    with pytest.raises(UsageError, match=r"63 tokens, and a split into 4 .* needs 64, 16 "):
        planned(dense(), tmp_path / "out", **{**changes, "data__max_tokens": 63})
    with pytest.raises(UsageError, match="a split into 4"):
        planned(
            dense(), tmp_path / "out", **{**changes, "data__max_tokens": 16, "data__seq_len": 16}
        )
    changes |= {"data__seq_len": 16, "data__max_tokens": 64}
    assert converted(dense(), tmp_path / "out", **changes).split is not None


def test_what_centres_random_rows_has_an_effect_where_they_are_drawn(
    dense: Dense, tmp_path: Path, split: dict[str, Any]
) -> None:
    changes = {**split, "experts__strategy": "random", "router__init": "normal"}
    changes["experts__edits"] = [{"edit": "refit"}]
    for center in (True, False):
        converted(dense(), tmp_path / f"{center}", **changes, router__center=center)
    one, other = (digest(tmp_path / f"{center}")[WEIGHTS] for center in (True, False))
    assert one != other


def test_random_groups_can_be_fitted_too(
    dense: Dense, tmp_path: Path, split: dict[str, Any]
) -> None:
    """Edits alone make a split that looks at data; solving brings it nearer to the dense model."""
    errors = {}
    for name, edits in (("as they are", []), ("solved", [{"edit": "refit"}])):
        changes = {**split, "experts__strategy": "random", "router__init": "distill"}
        manifest = converted(dense(), tmp_path / name, experts__edits=edits, **changes)
        assert manifest.split is not None
        errors[name] = manifest.split.stream_error[-1]
    assert errors["solved"] < 0.9 * errors["as they are"]
    changes = {**changes, "experts__edits": [{"edit": "refit"}], "router__init": "normal"}
    assert converted(dense(), tmp_path / "normal", **changes).split is not None


def test_a_source_without_tokenizer_writes_its_own_data(
    dense: Dense, tmp_path: Path, split: dict[str, Any]
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in dense().iterdir():
        if "token" not in file.name:
            (bare / file.name).symlink_to(file)
    manifest = converted(bare, tmp_path / "out", **{**split, "data__train": None})
    assert manifest.split is not None
    assert manifest.recipe["data"]["train"] == "self"


def test_a_tokenizer_of_another_model_is_refused(
    dense: Dense, tmp_path: Path, split: dict[str, Any]
) -> None:
    changes = {**split, "data__train": None}
    with pytest.raises(UsageError, match=r"makes token \d+, and the model knows 200"):
        converted(dense(vocab_size=200), tmp_path / "out", **changes)


SOLVED: dict[str, Any] = {"experts__edits": [{"edit": "refit"}]}
STEERED: dict[str, Any] = {"target__architecture": "glm4_moe", **SOLVED}
ON_GPU: dict[str, dict[str, Any]] = {
    **{
        name: {"experts__strategy": name, **(FEW.get(name, {})), **SOLVED}
        for name in STRATEGIES
        if STRATEGIES[name].needs != "nothing"
    },
    **{
        name: {"experts__strategy": name, "router__init": "ridge", **SOLVED}
        for name in STRATEGIES
        if STRATEGIES[name].needs == "nothing"
    },
    "tune": {"experts__edits": [{"edit": "tune", "steps": 32, "tokens": 1024}, {"edit": "refit"}]},
    "balance": {**STEERED, "router__balance": 0.1},
    "threshold": {**STEERED, "router__select": "threshold"},
    "layers auto": {**STEERED, "target__layers": "auto"},
    "offload": {"runtime__offload_dir": "states", **SOLVED},
    "small GPU": SOLVED,
}
"""Whatever can be done on a GPU, by what is tried."""


@pytest.mark.parametrize("case", list(ON_GPU))
@pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="torch sees no CUDA device: NOTHING of the GPU path is tested here",
)
def test_a_gpu_finds_what_a_cpu_finds(
    dense: Dense,
    tmp_path: Path,
    text: str,
    split: dict[str, Any],
    case: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Close calls may go to another cluster: only groups that are given are the same ones."""
    monkeypatch.setattr("moe_convert.plan.estimate.GPU_SHARE", 0.0 if case == "small GPU" else 0.5)
    changes, source = {**split, **ON_GPU[case]}, dense(num_hidden_layers=4)
    if "runtime__offload_dir" in changes:
        changes["runtime__offload_dir"] = str(tmp_path)
    found = {}
    for device in ("cpu", "cuda"):
        output = tmp_path / device
        manifest = converted(source, output, **{**changes, "runtime__device": device})
        assert manifest.split is not None
        assert manifest.routing is not None
        ids_BT = ids_of(source, text)
        with torch.no_grad():
            told = loss(load(output)(ids_BT).logits, ids_BT)
        found[device] = (manifest, manifest.split, manifest.routing, told, logits(output))
    (one, split_one, routing_one, loss_one, logits_one), other = found["cpu"], found["cuda"]
    same = STRATEGIES[changes.get("experts__strategy", "contribution")].needs == "nothing"
    assert other[1].stream_error == pytest.approx(split_one.stream_error, rel=1e-2 if same else 0.3)
    assert other[3] == pytest.approx(loss_one, rel=1e-3 if same else 2e-2)
    assert other[2].tokens_sha256 == routing_one.tokens_sha256
    for load_one, load_other in zip(routing_one.load, other[2].load, strict=True):
        assert sorted(load_other) == pytest.approx(sorted(load_one), abs=0.01 if same else 0.15)
    if routing_one.mean_k:
        assert other[2].mean_k == pytest.approx(routing_one.mean_k, rel=0.05)
    if one.sensitivity and other[0].sensitivity:
        assert other[0].sensitivity.kl == pytest.approx(one.sensitivity.kl, rel=1.0)
    if same:  # but for tokens that a close call sends to another expert
        away_BT = (other[4] - logits_one).abs().amax(dim=-1)
        assert float((away_BT > 0.05).float().mean()) < 0.05


def mapped() -> list[str]:
    """Return the lines of this process's memory map that are states without a name on disk."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if "/.moe-convert-" in line and line.endswith("(deleted)")]


def test_states_on_disk_give_the_same_bytes(
    dense: Dense, tmp_path: Path, split: dict[str, Any]
) -> None:
    usual, folder, seen = planned(dense(), tmp_path / "one", **split), tmp_path / "states", [0]
    one = convert(usual, lambda *_: seen.append(len(mapped())))
    assert max(seen) == 0
    folder.mkdir()
    plan = planned(dense(), tmp_path / "two", **split, runtime__offload_dir=str(folder))
    two = convert(plan, lambda *_: seen.append(len(mapped())))
    assert max(seen) >= 4
    files = [digest(output) | {MANIFEST_NAME: ""} for output in (usual.output, plan.output)]
    assert files[0] == files[1]
    assert one.split == two.split
    assert not list(folder.iterdir())
    assert not mapped()
    states = 5 * 4 * plan.layout.body.hidden_size * NUM_TOKENS
    assert plan.estimate.disk_bytes - usual.estimate.disk_bytes == states
    assert usual.estimate.ram_bytes - plan.estimate.ram_bytes == states
    assert str(folder) not in (tmp_path / "two" / "recipe.yaml").read_text(encoding="utf-8")


def test_states_on_disk_are_gone_after_an_error(
    dense: Dense, tmp_path: Path, split: dict[str, Any]
) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if what == "split" and done:
            assert mapped()
            raise KeyboardInterrupt

    folder = tmp_path / "states"
    folder.mkdir()
    with pytest.raises(KeyboardInterrupt):
        convert(planned(dense(), tmp_path / "out", **split, runtime__offload_dir=str(folder)), stop)
    gc.collect()
    assert not list(folder.iterdir())
    assert not mapped()


def test_large_states_go_to_disk_beside_the_output(
    dense: Dense, tmp_path: Path, split: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(dense(), tmp_path / "new" / "out", **split)
    assert offload_folder(plan) is None
    states = 5 * 4 * plan.layout.body.hidden_size * NUM_TOKENS
    monkeypatch.setattr("moe_convert.plan.estimate.available_ram_bytes", lambda: 2 * states - 2)
    assert offload_folder(plan) == tmp_path
    clone = planned(dense(), tmp_path / "out", data__train=split["data__train"])
    assert offload_folder(clone) is None


def test_a_full_disk_is_said_before_states_are_written(tmp_path: Path) -> None:
    with pytest.raises(DoesNotFitError, match="--offload-dir"):
        Room("cpu", tmp_path).empty(1 << 40, 1 << 10)
    assert not list(tmp_path.iterdir())


def test_a_folder_for_states_that_takes_none_is_refused(
    dense: Dense, tmp_path: Path, split: dict[str, Any]
) -> None:
    with pytest.raises(UsageError, match="no folder that can be written"):
        planned(dense(), tmp_path / "out", **split, runtime__offload_dir=str(tmp_path / "none"))
    with pytest.raises(UsageError, match="has no effect"):
        planned(dense(), tmp_path / "out", runtime__offload_dir=str(tmp_path))


def test_progress_goes_by_layers(dense: Dense, tmp_path: Path, split: dict[str, Any]) -> None:
    seen = list[tuple[str, int, int]]()
    convert(planned(dense(), tmp_path / "out", **split), lambda *report: seen.append(report))
    reports = [(done, total) for what, done, total in seen if what in {"convert", "split"}]
    assert reports == [(0, 3), (1, 3), (2, 3), (3, 3), (3, 3)]


def test_states_on_a_disk_of_their_own_need_no_room_beside_the_result(
    dense: Dense, tmp_path: Path, split: dict[str, Any]
) -> None:
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no second file system to put states on")
    output, source = tmp_path / "out", dense()

    def disk_bytes(place: Path, **more: Any) -> int:
        changes = {**split, "runtime__offload_dir": str(place), **more}
        return planned(source, output, **changes).estimate.disk_bytes

    assert disk_bytes(other) < disk_bytes(tmp_path)
    with pytest.raises(DoesNotFitError, match="hidden states take"):
        disk_bytes(other, data__max_tokens=10**13)
