"""Splits that are learned: the pieces against literal versions, and what a run leaves behind.

L MoE layers · F FFN neurons · N routed neurons · E routed experts · D hidden size · X leading
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_convert.checkpoint.replace import WORK
from moe_convert.convert import convert
from moe_convert.data import Data, token_ids
from moe_convert.errors import UsageError
from moe_convert.experts import Learned
from moe_convert.ffn import Grouping
from moe_convert.grouping.learned import (
    fires,
    membership,
    rounded,
    sinkhorn,
    temperature_at,
)
from moe_convert.learning import Learning, Student, learn, whole
from moe_convert.plan import Plan
from moe_convert.training.optimizer import Stepper
from tests.conftest import Dense
from tests.tiny import VOCAB_SIZE, pairs
from tests.tools import converted, difference, digest, edit_tensors, load, planned

TEXT = "The river rose in the night, and by morning the lower fields were under water. "
SEQ_LEN, NUM_TOKENS = 32, 256
WEIGHTS = "model.safetensors"


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One of three experts beside a shared one, four steps, nothing fitted, fp32 on the CPU."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT * 40, encoding="utf-8")
    return {
        "target__architecture": "glm4_moe",
        "target__num_experts": 3,
        "target__top_k": 1,
        "target__shared_experts": 1,
        "experts__method": "split",
        "experts__strategy": "learned",
        "experts__steps": 4,
        "experts__tokens": 64,
        "router__init": "auto",
        "data__train": str(path),
        "data__seq_len": SEQ_LEN,
        "data__max_tokens": NUM_TOKENS,
        "runtime__precision": "full",
        "runtime__device": "cpu",
    }


def ids_of(source: Path, split: dict[str, Any]) -> torch.Tensor:
    data = Data(train=split["data__train"], seq_len=SEQ_LEN, max_tokens=NUM_TOKENS)
    return token_ids(data, source, VOCAB_SIZE)


def learned(plan: Plan, ids_BT: torch.Tensor, folder: Path) -> Learning:
    local = plan.source.fetch()
    weights = {name: ref.weight() for name, ref in local.tensors.items()}
    return learn(plan, local, weights, ids_BT, folder, "cpu", lambda what, done, total: None)


def student_of(plan: Plan) -> Student:
    weights = {name: ref.weight() for name, ref in plan.source.tensors.items()}
    model = whole(plan.source.config, weights, "cpu")
    return Student(model, plan.layout.family, plan.shape.moe_layers)


def test_shares_sum_to_one_and_fill_every_expert_equally() -> None:
    share_XNE = sinkhorn(0.3 * normal(2, 48, 6, seed=0), 0.1)
    assert torch.allclose(share_XNE.sum(dim=-1), torch.ones(2, 48), atol=1e-5)
    assert torch.allclose(share_XNE.sum(dim=-2), torch.full((2, 6), 8.0), atol=1e-2)
    assert float(share_XNE.max()) > 0.9
    hotter = sinkhorn(0.3 * normal(2, 48, 6, seed=0), 1.0)
    assert float(hotter.max()) < 0.5


def test_the_gradient_of_shares_is_that_of_the_unrolled_rounds() -> None:
    """200 rounds in fp64, differentiated one by one."""
    affinity_XNE = 0.1 * normal(2, 24, 4, seed=1)
    wanted_XNE = normal(2, 24, 4, seed=2)
    one, other = (affinity_XNE.clone().requires_grad_() for _ in range(2))
    (sinkhorn(one, 0.2) * wanted_XNE).sum().backward()
    log_XNE = other.double() / 0.2
    for _ in range(200):
        log_XNE = log_XNE - log_XNE.logsumexp(dim=-2, keepdim=True)
        log_XNE = log_XNE - log_XNE.logsumexp(dim=-1, keepdim=True)
    (log_XNE.exp() * wanted_XNE).sum().backward()
    assert one.grad is not None
    assert other.grad is not None
    assert torch.allclose(sinkhorn(one, 0.2), log_XNE.exp().float(), atol=1e-5)
    assert torch.allclose(one.grad, other.grad, atol=1e-4 * float(other.grad.abs().max()))


@pytest.mark.parametrize("levels", [3, 10**6])
def test_groups_are_those_of_the_greedy_rule(levels: int) -> None:
    """The largest share first, one by one; with three levels most of them tie."""
    share_XNE = (normal(3, 40, 5, seed=3).sigmoid() * levels).floor() / levels
    found_XN = rounded(share_XNE)
    for share_NE, found_N in zip(share_XNE, found_XN, strict=True):
        labels, room = [-1] * 40, [8] * 5
        for place in share_NE.flatten().argsort(descending=True, stable=True).tolist():
            neuron, expert = divmod(place, 5)
            if labels[neuron] < 0 and room[expert]:
                labels[neuron] = expert
                room[expert] -= 1
        assert found_N.tolist() == labels


def test_a_choice_is_hard_and_its_gradient_soft() -> None:
    logits_TE = normal(7, 4, seed=4).requires_grad_()
    chosen = fires(logits_TE, 2)
    assert chosen[:, -1].tolist() == [1.0] * 7
    assert chosen[:, :4].sum(dim=1).tolist() == [2.0] * 7
    assert set(chosen.flatten().tolist()) == {0.0, 1.0}
    weights_TE = normal(7, 5, seed=5)
    (chosen * weights_TE).sum().backward()
    again = logits_TE.detach().clone().requires_grad_()
    (again.softmax(dim=1) * weights_TE[:, :4]).sum().backward()
    assert logits_TE.grad is not None
    assert again.grad is not None
    assert torch.allclose(logits_TE.grad, again.grad)


def test_every_neuron_belongs_to_one_expert_or_is_shared() -> None:
    affinity_XNE = normal(2, 12, 3, seed=6).requires_grad_()
    share_XNE = sinkhorn(affinity_XNE, 0.5)
    rest_XN = torch.stack([torch.randperm(16)[:12].sort().values for _ in range(2)])
    labels_XN = rounded(share_XNE.detach())
    member = membership(labels_XN, share_XNE, rest_XN, 16)
    assert member.sum(dim=-1).unique().tolist() == [1.0]
    for index in range(2):
        owners = member[index].argmax(dim=-1)
        assert owners[rest_XN[index]].tolist() == labels_XN[index].tolist()
        assert (owners == 3).sum() == 4
    member[..., 0].square().sum().backward()
    assert affinity_XNE.grad is not None
    assert affinity_XNE.grad.abs().amax(dim=(1, 2)).min() > 0


def test_the_temperature_falls_over_a_fifth_of_the_steps() -> None:
    found = [temperature_at(step, 100, 0.1) for step in (0, 10, 20, 99)]
    assert found == pytest.approx([1.0, 0.55, 0.1, 0.1])


FAMILIES_ONCE = list({model_type: case for case in pairs() for model_type in case[:1]}.values())


@pytest.mark.parametrize(("model_type", "variant", "target"), FAMILIES_ONCE)
def test_the_student_is_the_dense_model_but_for_neurons_that_do_not_fire(
    dense: Dense, model_type: str, variant: str, target: str
) -> None:
    source = dense(model_type, variant)
    plan = planned(source, target__architecture=target)
    student, ids_BT = student_of(plan), torch.arange(3, 27).view(2, 12)
    with torch.no_grad():
        wanted = load(source)(ids_BT, use_cache=False).logits.flatten(0, 1)
    assert difference(student.dense(ids_BT), wanted) <= 1e-4
    layers, width = len(plan.shape.moe_layers), plan.layout.body.ffn_size
    router_LED = normal(layers, 2, plan.layout.body.hidden_size, seed=7)
    everyone = torch.zeros(layers, width, 3)
    everyone[..., -1] = 1
    with torch.no_grad():
        made, seen = student.masked(ids_BT, everyone, router_LED, 1)
        assert difference(made, wanted) <= 1e-4
        assert [tuple(logits.shape) for logits in seen] == [(24, 2)] * layers
        silent, _ = student.masked(ids_BT, torch.zeros_like(everyone), router_LED, 1)
    given = list[float]()
    for layer in plan.shape.moe_layers:
        block = student._model.get_submodule(f"{plan.layout.family.layers}.{layer}")
        ffn = block.get_submodule(plan.layout.family.ffn_module)
        ffn.register_forward_hook(lambda module, args, out: given.append(float(out.abs().max())))
    with torch.no_grad():
        assert torch.equal(
            student.masked(ids_BT, torch.zeros_like(everyone), router_LED, 1)[0], silent
        )
    assert given == [0.0] * layers
    assert difference(student.dense(ids_BT), wanted) <= 1e-4
    assert difference(silent, wanted) > 1e-3


def test_what_was_learned_is_what_is_written(
    dense: Dense, tmp_path: Path, split: dict[str, Any]
) -> None:
    """The masked dense model and the loaded MoE give the same logits."""
    plan = planned(dense(), tmp_path / "out", **split)
    ids_BT = ids_of(dense(), split)
    found = learned(plan, ids_BT, tmp_path)
    manifest = convert(plan)
    assert manifest.split is not None
    assert manifest.split.learning == found.report
    assert not (tmp_path / "out" / WORK).exists()
    assert {Path(info.path).parts[0] for info in manifest.target.files}.isdisjoint({WORK})
    groups = list(found.groups.values())
    member_LFX = torch.stack([member_of(grouping, plan.shape.dense_size) for grouping in groups])
    rows = [grouping.router_ED for grouping in groups]
    router_LED = torch.stack([rows_ED for rows_ED in rows if rows_ED is not None])
    with torch.no_grad():
        made, _ = student_of(plan).masked(ids_BT, member_LFX, router_LED, plan.shape.top_k)
        assert difference(load(tmp_path / "out")(ids_BT).logits.flatten(0, 1), made) <= 1e-4
        assert difference(load(dense())(ids_BT).logits.flatten(0, 1), made) > 1e-2


def member_of(grouping: Grouping, width: int) -> torch.Tensor:
    member = torch.zeros(width, len(grouping.routed_EN) + 1)
    for expert, neurons_N in enumerate([*grouping.routed_EN, grouping.shared_N]):
        member[neurons_N, expert] = 1
    assert member.sum(dim=1).unique().tolist() == [1.0]
    return member


@pytest.mark.parametrize("start", ["contribution", "random"])
def test_affinities_and_routers_learn_and_nothing_else_changes(
    dense: Dense, tmp_path: Path, split: dict[str, Any], start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss falls, all layers get gradients, and the dense weights keep their bits."""
    gradients, models = dict[str, torch.Tensor](), list[Any]()
    from moe_convert import learning

    step, made = Stepper.step, learning.whole

    def watched(self: Any, number: int) -> torch.Tensor:
        for one in self.trained:
            gradients.setdefault(one.name, one.master.grad.clone())
        return step(self, number)

    def kept(*args: Any) -> Any:
        models.append(made(*args))
        return models[-1]

    monkeypatch.setattr(Stepper, "step", watched)
    monkeypatch.setattr(learning, "whole", kept)
    changes = {"experts__steps": 40, "experts__lr": 0.01, "experts__start": start}
    plan = planned(dense(), tmp_path / "out", **split | changes)
    report = learned(plan, ids_of(dense(), split), tmp_path).report
    assert report.steps == 40
    assert report.tokens == 40 * 64
    assert report.loss_last < report.loss_first - 0.002
    assert set(gradients) == {"affinity", "router"}
    for gradient in gradients.values():
        assert gradient.flatten(1).abs().amax(dim=1).min() > 0
    (model,) = models
    state = load(dense()).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_neurons_of_two_kinds_of_tokens_are_told_apart(
    dense: Dense, tmp_path: Path, split: dict[str, Any]
) -> None:
    """Even tokens open half of the neurons and odd tokens the others; attention says nothing.

    What the neurons of one kind add is nearly the same direction, so that each of them is missed.
    """
    source = tmp_path / "planted"
    copy_of(dense("llama", "plain", num_hidden_layers=1), source)
    kinds_F = torch.randperm(96, generator=torch.Generator().manual_seed(8)) % 2

    def plant(data: dict[str, torch.Tensor]) -> None:
        embedding = data["model.embed_tokens.weight"]
        embedding[:] = 0.1 * normal(*embedding.shape, seed=9)
        embedding[::2, 0], embedding[1::2, 1] = 2.0, 2.0
        layer = "model.layers.0."
        data[f"{layer}self_attn.o_proj.weight"].zero_()
        gate_FD, up_FD = data[f"{layer}mlp.gate_proj.weight"], data[f"{layer}mlp.up_proj.weight"]
        gate_FD[:], up_FD[:] = 0, 0
        gate_FD[torch.arange(96), kinds_F] = 1.0
        gate_FD[torch.arange(96), 1 - kinds_F] = -1.0
        up_FD[:, :2] = 0.5
        down_DF = data[f"{layer}mlp.down_proj.weight"]
        down_DF[:] = 2e-4 * normal(*down_DF.shape, seed=10)
        down_DF[2 + kinds_F, torch.arange(96)] += 1.5e-3
        data["lm_head.weight"][:] = 0.3 * normal(*data["lm_head.weight"].shape, seed=12)
        for name in ("input_layernorm", "post_attention_layernorm"):
            data[f"{layer}{name}.weight"].fill_(1.0)

    edit_tensors(source, plant)
    counts = {"target__num_experts": 2, "target__top_k": 1, "target__shared_experts": 0}
    rates = {"experts__steps": 60, "experts__lr": 0.02, "experts__start": "random"}
    rates["experts__tokens"] = 128
    plan = planned(source, tmp_path / "out", **split | counts | rates)
    assert plan.shape.dense_size == 96
    ids_BT = written(source)
    found = learned(plan, ids_BT, tmp_path)
    share_E = torch.stack([kinds_F[row].float().mean() for row in found.groups[0].routed_EN])
    assert share_E.min() < 0.05
    assert share_E.max() > 0.95
    rows_ED = found.groups[0].router_ED
    assert rows_ED is not None
    axes = torch.eye(rows_ED.shape[1])[:2]
    assert (rows_ED @ axes.T).argmax(dim=0).tolist() == [
        int(share_E.argmin()),
        int(share_E.argmax()),
    ]
    assert found.report.loss_last < found.report.loss_first


def written(source: Path) -> torch.Tensor:
    """Return rows of which the model itself is the best predictor."""
    draw, model = torch.Generator().manual_seed(11), load(source)
    ids_BT = torch.randint(VOCAB_SIZE, (16, 1), generator=draw)
    with torch.no_grad():
        for _ in range(SEQ_LEN - 1):
            chances = model(ids_BT).logits[:, -1].softmax(dim=-1)
            ids_BT = torch.cat([ids_BT, torch.multinomial(chances, 1, generator=draw)], dim=1)
    return ids_BT


def copy_of(folder: Path, to: Path) -> None:
    import shutil

    shutil.copytree(folder, to)


def test_seeds_decide_the_bytes_and_nothing_else_does(
    dense: Dense, tmp_path: Path, split: dict[str, Any]
) -> None:
    for number, (name, seed) in enumerate((("one", 0), ("two", 0), ("other", 1))):
        torch.manual_seed(100 + number)
        before = torch.get_rng_state()
        converted(dense(), tmp_path / name, experts__seed=seed, **split)
        assert torch.equal(torch.get_rng_state(), before)
    one, two, other = (digest(tmp_path / name)[WEIGHTS] for name in ("one", "two", "other"))
    assert one == two != other


@pytest.mark.parametrize(("phase", "at"), [("learn", 3), ("split", 3)])
def test_an_interrupted_run_learns_nothing_twice(
    dense: Dense,
    tmp_path: Path,
    split: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    phase: str,
    at: int,
) -> None:
    """Stopped within the learning by a signal, or behind layer 1."""
    changes = split | {"experts__steps": 6, "experts__refresh": 4}
    calls, steps = list[int](), list[int]()

    def stop(what: str, done: int, total: int) -> None:
        calls.extend([done] if what == phase else [])
        if what == phase == "learn" and done == at - 1:
            os.kill(os.getpid(), signal.SIGINT)
        if what == phase == "split" and len(calls) == at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(planned(dense(), tmp_path / "out", **changes), stop)
    step = Stepper.step

    def counted(self: Any, number: int) -> torch.Tensor:
        steps.append(number)
        return step(self, number)

    monkeypatch.setattr(Stepper, "step", counted)
    resumed = converted(dense(), tmp_path / "out", **changes)
    assert steps == ([3, 4, 5] if phase == "learn" else [])
    whole_run = converted(dense(), tmp_path / "whole", **changes)
    assert digest(tmp_path / "out")[WEIGHTS] == digest(tmp_path / "whole")[WEIGHTS]
    assert resumed.split is not None
    assert whole_run.split is not None
    assert resumed.split.learning == whole_run.split.learning
    assert not (tmp_path / "out" / WORK).exists()


def test_a_run_of_another_length_is_not_taken_up(
    dense: Dense, tmp_path: Path, split: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the steps follow from the device, a plan that goes on elsewhere is another run."""
    changes = {key: value for key, value in split.items() if key != "experts__steps"}
    plan = planned(dense(), tmp_path / "out", **changes)
    ids_BT = ids_of(dense(), split)
    monkeypatch.setattr(Learned, "num_steps", lambda method, *, gpu: 4)
    assert learned(plan, ids_BT, tmp_path).report.steps == 4
    assert learned(plan, ids_BT, tmp_path).report.steps == 4
    monkeypatch.setattr(Learned, "num_steps", lambda method, *, gpu: 2)
    with pytest.raises(UsageError, match="a run with other settings") as found:
        learned(plan, ids_BT, tmp_path)
    assert "--device" in found.value.hint
    assert str(tmp_path) in found.value.hint
    assert "--no-resume" not in found.value.hint


def test_nothing_is_learned_where_every_expert_is_chosen(
    dense: Dense, tmp_path: Path, split: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = list[int]()
    monkeypatch.setattr(Stepper, "step", lambda stepper, number: steps.append(number))
    changes = split | {"target__top_k": 3}
    manifest = converted(dense(), tmp_path / "out", **changes)
    assert manifest.exact
    assert manifest.split is not None
    assert manifest.split.learning is None
    assert not steps
