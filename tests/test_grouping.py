"""Published strategies of grouping neurons: planted structure, and literal slow versions.

D hidden size · F FFN neurons · E routed experts · N neurons per expert · T tokens
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from moe_convert import gradients
from moe_convert.families import FAMILIES
from moe_convert.ffn import FfnSample, Grouping, Neurons
from moe_convert.gradients import spill_gradients
from moe_convert.grouping import (
    cmoe,
    contribution,
    expertweaver,
    fitted,
    gradient,
    graph,
    learned,
    moefication,
    routers,
)
from tests.conftest import Dense
from tests.tools import load

EXPERTS, SIZE, SHARED, ROW = 4, 8, 1, 16


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=draw(seed))


def toy(num_neurons: int, num_dims: int, num_tokens: int) -> tuple[Neurons, FfnSample]:
    """Return a random FFN, and inputs and gradients of it that have nothing to do with it."""
    neurons = Neurons(
        normal(num_neurons, num_dims, seed=1),
        normal(num_neurons, num_dims, seed=2),
        normal(num_dims, num_neurons, seed=3),
    )
    x_TD, dense_TD = normal(num_tokens, num_dims, seed=4), normal(num_tokens, num_dims, seed=5)
    gradient_TD = normal(num_tokens, num_dims, seed=6)
    return neurons, FfnSample(x_TD, dense_TD, x_TD, ROW, lambda: gradient_TD)


def kinds() -> torch.Tensor:
    """Return which block every token of `planted` fires, int64 [T]."""
    return torch.randint(EXPERTS, (64,), generator=draw(1)).repeat_interleave(ROW)


def planted() -> tuple[Neurons, FfnSample, torch.Tensor]:
    """Return an FFN with blocks of neurons that fire on one kind of text each, and the blocks.

    Block -1 fires on every text and has the largest weights. One neuron of every block has a
    stronger `up` than the rest, so that CMoE, which starts from the neurons that are marked most
    often, starts in every block.
    """
    block_F = torch.cat([torch.arange(EXPERTS).repeat(SIZE), torch.full((SHARED,), -1)])
    kind_T = kinds()
    axes_DD = torch.linalg.qr(normal(12, 12, seed=2)).Q
    always_D, unused_D = axes_DD[EXPERTS], axes_DD[EXPERTS + 1]
    gate_FD = 6 * axes_DD[block_F] - 3 * always_D
    gate_FD[block_F < 0] = 9 * always_D
    up_FD = (2 * always_D + 0.85 * unused_D).repeat(len(block_F), 1)
    up_FD[:EXPERTS] = 2 * always_D
    gate_FD, up_FD = (rows + 0.05 * normal(*rows.shape, seed=3) for rows in (gate_FD, up_FD))
    down_DF = torch.nn.functional.normalize(normal(12, len(block_F), seed=6), dim=0)
    x_TD = axes_DD[kind_T] + always_D + 0.02 * normal(len(kind_T), 12, seed=4)
    gradient_TD = normal(len(kind_T), 12, seed=7)
    sample = FfnSample(x_TD, x_TD, x_TD, ROW, lambda: gradient_TD)
    order_F = torch.randperm(len(block_F), generator=draw(0))
    neurons = Neurons(gate_FD[order_F], up_FD[order_F], down_DF[:, order_F])
    return neurons, sample, block_F[order_F]


Strategy = Callable[[Neurons, FfnSample, int, int, int], Grouping]

STRATEGIES: dict[str, Strategy] = {
    "weights": lambda neurons, sample, *counts: moefication.weights(neurons, *counts),
    "coactivation": moefication.coactivation,
    "cmoe": cmoe.group,
    "cmoe paper": lambda *args: cmoe.group(*args, rounds=3, distance="l2"),
    "expertweaver": expertweaver.group,
    "gradient": gradient.group,
    "contribution": contribution.group,
    "learned": learned.start,
}


@pytest.mark.parametrize("num_shared", [0, 8, 40])
@pytest.mark.parametrize("name", STRATEGIES)
def test_every_neuron_is_in_one_group_of_the_right_size(name: str, num_shared: int) -> None:
    neurons, sample = toy(64, 12, 250)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    grouping = STRATEGIES[name](neurons, sample, 4, num_shared, 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert grouping.routed_EN.shape == (4, (64 - num_shared) // 4)
    assert grouping.shared_N.shape == (num_shared,)
    every_F = torch.cat([grouping.shared_N, grouping.routed_EN.flatten()])
    assert every_F.dtype == torch.int64
    assert every_F.sort().values.tolist() == list(range(64))
    torch.manual_seed(2)
    again = STRATEGIES[name](neurons, sample, 4, num_shared, 3)
    assert torch.equal(again.routed_EN, grouping.routed_EN)
    assert torch.equal(again.shared_N, grouping.shared_N)
    if grouping.representative_E is not None:
        assert (grouping.routed_EN == grouping.representative_E.unsqueeze(1)).sum(dim=1).all()


@pytest.mark.parametrize("name", sorted(set(STRATEGIES) - {"cmoe", "cmoe paper"}))
def test_another_seed_gives_other_groups_where_nothing_is_planted(name: str) -> None:
    neurons, sample = toy(64, 12, 250)
    one, other = (STRATEGIES[name](neurons, sample, 4, 8, seed) for seed in (0, 1))
    assert not torch.equal(one.routed_EN, other.routed_EN)


@pytest.mark.parametrize("name", STRATEGIES)
def test_planted_blocks_are_found(name: str) -> None:
    """The gradients are noise: a block's neurons matter where they fire."""
    neurons, sample, block_F = planted()
    grouping = STRATEGIES[name](neurons, sample, EXPERTS, SHARED, 0)
    assert set(block_F[grouping.shared_N].tolist()) == {-1}
    found = {frozenset(row.tolist()) for row in block_F[grouping.routed_EN]}
    assert found == {frozenset({block}) for block in range(EXPERTS)}


def test_the_neurons_that_contribute_most_are_shared() -> None:
    """The largest mean of (|h|·‖w‖)², where neither the mean of |h| nor ‖w‖ alone gives them."""
    neurons, sample = toy(24, 6, 200)
    energies, opened, lengths = [], [], []
    for gate_D, up_D, down_D in zip(neurons.gate_FD, neurons.up_FD, neurons.down_DF.T, strict=True):
        hidden_T = torch.nn.functional.silu(sample.x_TD @ gate_D) * (sample.x_TD @ up_D)
        opened.append(float(hidden_T.abs().mean()))
        lengths.append(float(down_D.norm()))
        energies.append(float((hidden_T.abs() * down_D.norm()).square().mean()))
    shared = contribution.group(neurons, sample, 4, 8, 0).shared_N.tolist()
    assert shared == largest(energies)
    assert shared != largest(opened)
    assert shared != largest(lengths)
    energy_F, _ = contribution.describe(neurons, sample.x_TD)
    torch.testing.assert_close(energy_F / 200, torch.tensor(energies), rtol=1e-4, atol=0)


def largest(scores: list[float]) -> list[int]:
    return sorted(sorted(range(len(scores)), key=lambda i: -scores[i])[:8])


def test_neurons_are_described_by_what_least_squares_predicts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The described neurons' products are those of predictions and contributions themselves."""
    neurons, sample = toy(24, 6, 200)
    x_TD = sample.x_TD + 0.5
    monkeypatch.setattr("moe_convert.grouping.parts.PORTION", 24 * 33)
    _, predictor_DF = contribution.describe(neurons, x_TD)
    value_TF = neurons.hidden(x_TD).abs() * neurons.down_DF.norm(dim=0)
    value_TF = (value_TF - value_TF.mean(dim=0)).double()
    predicted_TF = x_TD.double() @ ridge_solution(x_TD, value_TF, contribution.RIDGE)
    expected_FF = value_TF.T @ predicted_TF
    torch.testing.assert_close(
        (predictor_DF.T @ predictor_DF).double(), expected_FF, rtol=1e-3, atol=1e-2
    )


def ridge_solution(x_TD: torch.Tensor, wanted_TX: torch.Tensor, ridge: float) -> torch.Tensor:
    """Solve [X; √λ I] · rows = [wanted; 0] by a direct solver in fp64."""
    wide_TD = x_TD.double()
    damping = ridge * float(wide_TD.square().sum(dim=0).mean())
    below_DD = damping**0.5 * torch.eye(x_TD.shape[1], dtype=torch.float64)
    none_DX = torch.zeros(x_TD.shape[1], wanted_TX.shape[1], dtype=torch.float64)
    stacked, wanted = torch.cat([wide_TD, below_DD]), torch.cat([wanted_TX.double(), none_DX])
    solution: torch.Tensor = torch.linalg.lstsq(stacked, wanted).solution
    return solution


def test_energies_are_the_squared_lengths_of_what_experts_give(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    neurons, sample = toy(20, 6, 50)
    routed_EN = torch.randperm(20, generator=draw(0))[:15].view(3, 5)
    monkeypatch.setattr("moe_convert.grouping.parts.PORTION", 15 * 7)
    energy_TE = fitted.expert_energies(neurons, routed_EN, sample.x_TD)
    assert energy_TE.shape == (50, 3)
    for token, x_D in enumerate(sample.x_TD):
        for expert, neurons_N in enumerate(routed_EN):
            gate_N = torch.nn.functional.silu(neurons.gate_FD[neurons_N] @ x_D)
            given_D = neurons.down_DF[:, neurons_N] @ (gate_N * (neurons.up_FD[neurons_N] @ x_D))
            expected = float(given_D.square().sum())
            assert float(energy_TE[token, expert]) == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_ridge_rows_predict_the_lengths_best(monkeypatch: pytest.MonkeyPatch) -> None:
    x_TD, energy_TE = normal(300, 6, seed=1) + 0.5, normal(300, 4, seed=2).square()
    monkeypatch.setattr(fitted, "TOKENS", 128)
    expected_DE = ridge_solution(x_TD, energy_TE.sqrt(), fitted.RIDGE)
    rows_ED = fitted.ridge_rows(energy_TE, x_TD)
    torch.testing.assert_close(rows_ED.double(), expected_DE.T, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(rows_ED.double(), ridge_solution(x_TD, energy_TE, fitted.RIDGE).T)


def test_fitted_routers_choose_the_expert_that_was_planted() -> None:
    neurons, sample, block_F = planted()
    routed_EN = torch.stack([(block_F == block).nonzero().flatten() for block in range(EXPERTS)])
    energy_TE = fitted.expert_energies(neurons, routed_EN, sample.x_TD)
    assert torch.equal(energy_TE.argmax(dim=1), kinds())
    for rows_ED in (
        fitted.ridge_rows(energy_TE, sample.x_TD),
        fitted.distilled_rows(energy_TE, sample.x_TD, 0),
    ):
        assert rows_ED.shape == (EXPERTS, 12)
        assert torch.equal((sample.x_TD @ rows_ED.T).argmax(dim=1), kinds())


def test_distilled_rows_come_near_the_shares_of_the_energy() -> None:
    """Nearly as near as a long descent over all tokens, by a seed, whatever else is drawn."""
    x_TD, wanted_ED = normal(600, 6, seed=1), normal(4, 6, seed=2)
    share_TE = (x_TD @ wanted_ED.T).softmax(dim=1)
    energy_TE = 7.0 * share_TE * normal(600, 1, seed=3).square()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    rows_ED = fitted.distilled_rows(energy_TE, x_TD, 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(fitted.distilled_rows(energy_TE, x_TD, 0), rows_ED)
    centred_ED, expected_ED = (rows - rows.mean(dim=0) for rows in (rows_ED, wanted_ED))
    torch.testing.assert_close(centred_ED, expected_ED, rtol=0, atol=0.1)


def test_every_token_counts_once_whatever_its_energy() -> None:
    """Of tokens that look alike a quarter wants one expert, with a hundred times the energy."""
    energy_TE = torch.tensor([[100.0, 0.0]] * 100 + [[0.0, 1.0]] * 300)
    rows_ED = fitted.distilled_rows(energy_TE, torch.ones(400, 1), 0)
    assert rows_ED.flatten().softmax(dim=0).tolist() == pytest.approx([0.25, 0.75], abs=0.05)


@pytest.mark.parametrize("num_shared", [0, 8])
def test_cmoe_gives_the_groups_of_a_literal_version(num_shared: int) -> None:
    neurons, sample = toy(40, 8, 400)
    grouping = cmoe.group(neurons, sample, 4, num_shared, 0)
    shared, groups, representatives = literal_cmoe(neurons, sample.x_TD, 4, num_shared)
    assert grouping.shared_N.tolist() == sorted(shared)
    assert [set(row) for row in grouping.routed_EN.tolist()] == groups
    assert grouping.representative_E is not None
    assert grouping.representative_E.tolist() == representatives


def literal_cmoe(
    neurons: Neurons, x_TD: torch.Tensor, num_experts: int, num_shared: int
) -> tuple[list[int], list[set[int]], list[int]]:
    """CMoE as its code does it: token by token, and with every centre repeated N times."""

    def unit(row: torch.Tensor) -> torch.Tensor:
        return row / row.norm()

    num_neurons = len(neurons.gate_FD)
    marks_FT = torch.zeros(num_neurons, len(x_TD), dtype=torch.float64)
    for token, x_D in enumerate(x_TD):
        sizes = []
        for gate_D, up_D in zip(neurons.gate_FD, neurons.up_FD, strict=True):
            opened = unit(x_D) @ unit(gate_D)
            sizes.append(abs(float(opened * opened.sigmoid() * (unit(x_D) @ unit(up_D)))))
        for neuron in sorted(range(num_neurons), key=lambda i: -sizes[i])[:10]:
            marks_FT[neuron, token] = 1
    by_rate = sorted(range(num_neurons), key=lambda i: (-float(marks_FT[i].sum()), i))
    shared, rest = by_rate[:num_shared], sorted(by_rate[num_shared:])
    centres = [marks_FT[i] for i in by_rate[num_shared : num_shared + num_experts]]
    size = len(rest) // num_experts
    cost = torch.tensor(
        [[float((marks_FT[i] - c).abs().sum()) for c in centres for _ in range(size)] for i in rest]
    )
    rows, slots = linear_sum_assignment(cost.numpy())
    groups: list[set[int]] = [set() for _ in range(num_experts)]
    for row, slot in zip(rows, slots, strict=True):
        groups[slot // size].add(rest[row])
    representatives = []
    for group in groups:
        mean_T = torch.stack([marks_FT[i] for i in sorted(group)]).mean(dim=0)
        distances = {i: float((marks_FT[i] - mean_T).abs().sum()) for i in sorted(group)}
        representatives.append(min(distances, key=lambda i: distances[i]))
    return shared, groups, representatives


def test_cmoe_measures_distances_as_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    marked_TK = torch.stack([torch.randperm(12, generator=draw(t))[:3] for t in range(50)])
    marks_TF = torch.zeros(50, 12).scatter_(1, marked_TK, 1.0)
    centres_TE = torch.rand(50, 4, generator=draw(60))
    monkeypatch.setattr("moe_convert.grouping.parts.PORTION", 12 * 7)
    for distance, power in {"l1": 1.0, "l2": 2.0}.items():
        found_FE = cmoe._distances(marked_TK, 12, centres_TE, distance)
        expected_FE = torch.cdist(marks_TF.T.double(), centres_TE.T.double(), p=power)
        torch.testing.assert_close(found_FE, expected_FE, rtol=1e-5, atol=1e-5)


def test_expertweaver_measures_texts_and_the_share_of_shared_neurons() -> None:
    neurons, sample = toy(10, 6, 3 * ROW + 5)
    mean_RF, size_RF = expertweaver.profiles(neurons, sample)
    assert mean_RF.shape == (4, 10)
    for text in range(4):
        x_TD = sample.dense_TD[text * ROW : (text + 1) * ROW]
        gate_TF = torch.nn.functional.silu(x_TD @ neurons.gate_FD.T)
        torch.testing.assert_close(mean_RF[text], gate_TF.mean(dim=0))
        torch.testing.assert_close(size_RF[text], gate_TF.abs().mean(dim=0))
    constant_RF = torch.ones(4, 10)
    assert expertweaver.shared_share(constant_RF) == pytest.approx(0.7)
    constant_RF[0, :5] = 100.0
    assert expertweaver.shared_share(constant_RF) == pytest.approx(0.45)
    assert expertweaver.shared_share(constant_RF, least=0.0, most=1.0) == pytest.approx(0.5)


def test_the_cut_of_a_graph_is_low_and_swaps_lower_it() -> None:
    planted_N = torch.randperm(60, generator=draw(0)) % 5
    links_NN = 0.8 * torch.rand(60, 60, generator=draw(1))
    links_NN += 0.6 * (planted_N.unsqueeze(0) == planted_N.unsqueeze(1))
    links_NN = (links_NN + links_NN.T).fill_diagonal_(0)
    found_N = graph.partition(links_NN, 5, seed=0)
    assert found_N.bincount().tolist() == [12] * 5
    assert graph.cut(links_NN, found_N) <= graph.cut(links_NN, planted_N) + 1e-6
    for seed in range(5):
        noise_NN = torch.rand(60, 60, generator=draw(seed + 2)).square()
        noise_NN = (noise_NN + noise_NN.T).fill_diagonal_(0)
        random_N = torch.arange(60) % 5
        assert graph.cut(noise_NN, graph.partition(noise_NN, 5, seed)) < 0.97 * graph.cut(
            noise_NN, random_N
        )


def test_a_swap_saves_what_it_says() -> None:
    links_NN = torch.rand(30, 30, generator=draw(0))
    links_NN = (links_NN + links_NN.T).fill_diagonal_(0)
    labels_N = torch.arange(30) % 3
    to_NE = links_NN @ torch.nn.functional.one_hot(labels_N).float()
    node_EE, saved_EE = graph._best_swaps(links_NN, to_NE, labels_N)
    for a, b in [(0, 1), (0, 2), (2, 1)]:
        swapped_N = labels_N.clone()
        swapped_N[node_EE[a, b]], swapped_N[node_EE[b, a]] = b, a
        lower = graph.cut(links_NN, labels_N) - graph.cut(links_NN, swapped_N)
        assert float(saved_EE[a, b]) == pytest.approx(lower * float(links_NN.sum()) / 2, abs=0.01)


def test_neurons_are_linked_where_both_fire() -> None:
    neurons, sample = toy(12, 6, 40)
    links_FF = moefication._links(neurons, sample.dense_TD)
    expected_FF = torch.zeros(12, 12)
    for x_D in sample.dense_TD:
        opened_F = neurons.gate_FD @ x_D
        sent_F = (opened_F * opened_F.sigmoid() * (neurons.up_FD @ x_D)).abs()
        for one, other in itertools.permutations(range(12), 2):
            if opened_F[one] > 0 and opened_F[other] > 0:
                expected_FF[one, other] += sent_F[one] * sent_F[other]
    torch.testing.assert_close(links_FF, expected_FF)


def test_importance_is_that_of_autograd() -> None:
    neurons, sample = toy(24, 6, 200)
    readout_D = normal(6, seed=9)
    hidden_TF = neurons.hidden(sample.dense_TD).requires_grad_()
    output_TD = hidden_TF @ neurons.down_DF.T
    output_TD.retain_grad()
    (output_TD.tanh() @ readout_D).square().mean().backward()
    passed_TD = output_TD.grad
    assert passed_TD is not None
    assert hidden_TF.grad is not None
    sample = replace(sample, gradient_TD=lambda: passed_TD)
    centres_ED = normal(4, 6, seed=10)
    found_EF = gradient.importance(neurons, sample, centres_ED)
    owner_T = torch.stack([(centres_ED @ x_D).argmax() for x_D in sample.dense_TD])
    product_TF = (hidden_TF * hidden_TF.grad).abs().detach()
    for expert in range(4):
        expected_F = product_TF[owner_T == expert].mean(dim=0)
        torch.testing.assert_close(found_EF[expert], expected_F)


def test_neurons_are_dealt_out_as_a_literal_version_does() -> None:
    neurons, sample = toy(60, 6, 300)
    grouping = gradient.group(neurons, sample, 5, 10, 0)
    assert grouping.router_ED is not None
    importance_EF = gradient.importance(neurons, sample, grouping.router_ED)
    shared: list[int] = []
    while len(shared) < 10:
        lists: dict[int, int] = {}
        for row_F in importance_EF:
            free = [i for i in range(60) if i not in shared]
            for neuron in sorted(free, key=lambda i: -float(row_F[i]))[:10]:
                lists[neuron] = lists.get(neuron, 0) + 1
        most = sorted(i for i, count in lists.items() if count == max(lists.values()))
        shared += most[: 10 - len(shared)]
    routed: list[set[int]] = [set() for _ in range(5)]
    while sum(map(len, routed)) < 50:
        taken = set(shared).union(*routed)
        options = [
            (float(importance_EF[e, i]), e, i)
            for e in range(5)
            for i in range(60)
            if i not in taken and len(routed[e]) < 10
        ]
        _, expert, neuron = max(options)
        routed[expert].add(neuron)
    assert grouping.shared_N.tolist() == sorted(shared)
    assert [set(row) for row in grouping.routed_EN.tolist()] == routed


def test_the_router_of_the_gradient_split_has_the_means_of_equal_clusters() -> None:
    neurons, sample, _ = planted()
    grouping = gradient.group(neurons, sample, EXPERTS, SHARED, 0)
    assert grouping.router_ED is not None
    assert grouping.router_ED.shape == (EXPERTS, 12)
    torch.testing.assert_close(
        grouping.router_ED.mean(dim=0), sample.dense_TD.mean(dim=0), atol=1e-5, rtol=1e-5
    )
    with pytest.raises(ValueError, match="needs the gradients"):
        gradient.group(neurons, replace(sample, gradient_TD=None), EXPERTS, SHARED, 0)


@pytest.mark.parametrize(("model_type", "variant"), [("llama", "plain"), ("lfm2", "plain")])
@pytest.mark.parametrize("frozen", [True, False])
def test_spilled_gradients_are_those_of_one_backward_pass(
    dense: Dense, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str, variant: str,
    frozen: bool,
) -> None:  # fmt: skip
    """Against the loss that transformers computes, with all rows in one batch."""
    family = FAMILIES[model_type]
    model = load(dense(model_type, variant)).requires_grad_(not frozen)
    ids_BT = torch.randint(2, 272, (5, 12), generator=draw(0))
    monkeypatch.setattr(gradients, "BATCH_TOKENS", 24)
    loaders = spill_gradients(model, family, ids_BT, tmp_path, "float32")
    assert all(parameter.grad is None for parameter in model.parameters())
    model.requires_grad_(True)
    outputs: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, args: object, output: torch.Tensor) -> None:
        output.retain_grad()
        outputs.append(output)

    for layer in model.get_submodule(family.layers):
        layer.get_submodule(family.ffn_module).register_forward_hook(keep)
    model(input_ids=ids_BT, labels=ids_BT).loss.backward()
    assert len(loaders) == len(outputs) == 3
    for load_gradient, output_BTD in zip(loaders, outputs, strict=True):
        assert output_BTD.grad is not None
        torch.testing.assert_close(load_gradient(), output_BTD.grad.flatten(0, 1))


def test_spilled_gradients_may_be_rounded(dense: Dense, tmp_path: Path) -> None:
    model, ids_BT = load(dense()), torch.randint(2, 272, (2, 12), generator=draw(0))
    (tmp_path / "exact").mkdir()
    exact = spill_gradients(model, FAMILIES["llama"], ids_BT, tmp_path / "exact", "float32")
    for rounded, full in zip(
        spill_gradients(model, FAMILIES["llama"], ids_BT, tmp_path), exact, strict=True
    ):
        assert torch.equal(rounded(), full().bfloat16())


def test_representative_scores_are_cmoes_and_the_rows_come_near_them() -> None:
    neurons, sample = toy(20, 6, 500)
    chosen_E = torch.tensor([3, 11, 7, 0])
    score_TE = routers.representative_scores(neurons, chosen_E, sample.x_TD)
    for token, expert in [(0, 0), (7, 2), (499, 3)]:
        x_D, neuron = sample.x_TD[token], chosen_E[expert]
        gate_D, up_D = neurons.gate_FD[neuron], neurons.up_FD[neuron]
        opened = torch.nn.functional.silu(x_D @ gate_D / gate_D.norm())
        assert float(score_TE[token, expert]) == pytest.approx(
            abs(float(opened * (x_D @ up_D / up_D.norm()))), rel=1e-5
        )
    rows_ED = routers.representative_rows(neurons, chosen_E, sample.x_TD)
    target_TE = (score_TE - score_TE.mean(dim=1, keepdim=True)).double()
    best_DE = torch.linalg.lstsq(sample.x_TD.double(), target_TE).solution
    assert rows_ED.shape == (4, 6)
    torch.testing.assert_close(rows_ED.double(), best_DE.T, rtol=0.02, atol=0.002)


def test_mean_gate_rows_give_the_mean_of_the_gates_inputs() -> None:
    neurons, sample = toy(20, 6, 30)
    routed_EN = torch.randperm(20, generator=draw(0)).view(4, 5)
    logits_TE = sample.x_TD @ routers.mean_gate_rows(neurons, routed_EN).T
    inputs_TF = sample.x_TD @ neurons.gate_FD.T
    for expert, neurons_N in enumerate(routed_EN):
        torch.testing.assert_close(logits_TE[:, expert], inputs_TF[:, neurons_N].mean(dim=1))
