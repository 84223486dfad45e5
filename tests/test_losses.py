"""Loss formulas against values worked out by hand, and gradients against autograd's own."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from moe_convert import losses
from moe_convert.losses import (
    bias_step,
    cross_entropy,
    distillation,
    hidden_error,
    load_balance,
    max_violation,
    num_dead,
    router_z,
    score_spread,
    straight_through,
)

E, K, TOKENS = 4, 2, 8


def collapsed(first: int, strength: float = 50.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits [T, E] and counts [E] of a router that sends all to two adjacent experts."""
    logits_TE = torch.zeros(TOKENS, E)
    logits_TE[:, first : first + K] = strength
    counts_E = torch.zeros(E)
    counts_E[first : first + K] = TOKENS
    return logits_TE, counts_E


@pytest.mark.parametrize("sigmoid", [False, True])
def test_balance_is_one_when_even(sigmoid: bool) -> None:
    even = load_balance(torch.zeros(TOKENS, E), torch.full((E,), 4.0), sigmoid)
    assert float(even) == pytest.approx(1.0)


def test_balance_is_experts_over_top_k_when_collapsed() -> None:
    """Every layer by itself: two layers on different experts stay at E/K each."""
    for first in (0, 2):
        assert float(load_balance(*collapsed(first), sigmoid=False)) == pytest.approx(E / K)
    one, other = collapsed(0), collapsed(2)
    together = load_balance(torch.cat([one[0], other[0]]), one[1] + other[1], sigmoid=False)
    assert float(together) == pytest.approx(1.0)


def test_layers_at_once_are_the_layers_one_by_one() -> None:
    """The same logits in two layers, which count differently."""
    logits_LTE = torch.randn(2, TOKENS, E, generator=torch.Generator().manual_seed(0))
    counts_LE = torch.tensor([[5.0, 3.0, 7.0, 1.0], [16.0, 0.0, 0.0, 0.0]])
    found = load_balance(logits_LTE, counts_LE, False)
    for layer in range(2):
        alone = load_balance(logits_LTE[layer], counts_LE[layer], False)
        assert float(found[layer]) == pytest.approx(float(alone))


def test_balance_by_hand() -> None:
    """Shares 3/4 and 1/4, mean probabilities 0.7 and 0.3: 2 (0.75 · 0.7 + 0.25 · 0.3) = 1.2."""
    logits_TE = torch.tensor([[0.8, 0.2], [0.6, 0.4]]).log()
    assert float(load_balance(logits_TE, torch.tensor([3, 1]), False)) == pytest.approx(1.2)
    scores_TE = torch.tensor([[0.8, 0.2], [0.3, 0.2]])  # normalised: .8 .2 and .6 .4
    logits_TE = torch.logit(scores_TE)
    assert float(load_balance(logits_TE, torch.tensor([3, 1]), True)) == pytest.approx(1.2)


def test_balance_of_parts_adds_up_to_that_of_the_whole() -> None:
    """With the counts of all, the mean over micro-batches is the loss of the global batch."""
    logits_TE = torch.randn(TOKENS, E, generator=torch.Generator().manual_seed(0))
    counts_E = torch.tensor([5.0, 3.0, 7.0, 1.0])
    whole = load_balance(logits_TE, counts_E, False)
    parts = [load_balance(half, counts_E, False) for half in logits_TE.chunk(2)]
    assert float(sum(parts) / 2) == pytest.approx(float(whole))


def test_balance_pushes_tokens_off_the_busy_expert() -> None:
    logits_TE = torch.zeros(TOKENS, E, requires_grad=True)
    load_balance(logits_TE, torch.tensor([10.0, 2.0, 2.0, 2.0]), False).backward()
    assert logits_TE.grad is not None
    assert (logits_TE.grad[:, 0] > 0).all()
    assert (logits_TE.grad[:, 1:] < 0).all()


def test_z_by_hand() -> None:
    """Two zeros: log 2 squared; ln 3 and 0: log 4 squared."""
    expected = (math.log(2) ** 2 + math.log(4) ** 2) / 2
    found = router_z(torch.tensor([[0.0, 0.0], [math.log(3), 0.0]]))
    assert float(found) == pytest.approx(expected)


def test_hidden_error_by_hand() -> None:
    dense_TD = torch.tensor([[3.0, 4.0]])
    assert float(hidden_error(dense_TD, dense_TD)) == 0.0
    assert float(hidden_error(torch.zeros(1, 2), dense_TD)) == pytest.approx(1.0)
    assert float(hidden_error(torch.tensor([[3.0, 3.0]]), dense_TD)) == pytest.approx(1 / 25)
    assert float(hidden_error(torch.zeros(1, 2), dense_TD, torch.tensor(50.0))) == pytest.approx(
        0.5
    )


def test_distillation_by_hand() -> None:
    """KL of (1/2, 1/2) from (1/4, 3/4): ½ ln 2 + ½ ln 2/3."""
    teacher_TV, student_TV = torch.zeros(1, 2), torch.tensor([[0.0, math.log(3)]])
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert float(distillation(student_TV, teacher_TV)) == pytest.approx(expected)
    assert float(distillation(teacher_TV, teacher_TV)) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_give_value_and_gradient_of_the_whole(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three tokens at a time, against what autograd finds in one go."""
    monkeypatch.setitem(losses.CHUNK_BYTES, "cpu", 3 * 4 * 11)
    generator = torch.Generator().manual_seed(1)
    student, teacher = (3 * torch.randn(8, 11, generator=generator).to(dtype) for _ in range(2))
    labels_T = torch.randint(11, (8,), generator=generator)
    labels_T[[2, 7]] = losses.NO_LABEL
    mine, theirs = (student.clone().requires_grad_() for _ in range(2))
    found = 2.0 * distillation(mine, teacher) + 0.5 * cross_entropy(mine, labels_T)
    log, target = theirs.float().log_softmax(-1), teacher.float().log_softmax(-1)
    expected = 2.0 * functional.kl_div(log, target, reduction="batchmean", log_target=True)
    expected = expected + 0.5 * functional.cross_entropy(theirs.float(), labels_T)
    found.backward()
    expected.backward()
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert mine.grad is not None
    close = 1e-6 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(mine.grad, theirs.grad, atol=close, rtol=close)


def test_bias_step_by_hand() -> None:
    counts_LE = torch.tensor([[4, 0, 2], [2, 2, 2], [0, 1, 2]])
    step = bias_step(counts_LE, torch.tensor([0.2, 0.2, 0.05]), 0.5)
    expected = torch.tensor([[-0.5, 0.5, 0.0], [0.0, 0.0, 0.0], [0.125, 0.0, -0.125]])
    torch.testing.assert_close(step, expected)


def test_spread_of_scores_by_hand() -> None:
    assert score_spread(torch.tensor([[3.0, 1.0], [1.0, 1.0]]).log(), False) == pytest.approx(0.125)
    assert score_spread(torch.tensor([[3.0, 1.0]]).log(), True) == pytest.approx(0.125)


def test_violation_and_dead_experts_by_hand() -> None:
    counts_LE = torch.tensor([[2, 2, 2, 2], [8, 0, 0, 0], [0, 39, 40, 1]])
    assert max_violation(counts_LE).tolist() == [0.0, 3.0, 1.0]
    assert num_dead(counts_LE) == 0 + 3 + 2


def test_straight_through_tells_the_router_of_experts_not_chosen() -> None:
    """The value is the sparse one; the gradient of a gate is that expert's output."""
    outputs_ETD = torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]], [[5.0, 5.0]]])
    gates_TE = torch.tensor([[0.6, 0.4, 0.2]], requires_grad=True)
    sparse_TD = torch.tensor([[0.6, 0.8]])
    mixed_TD = straight_through(sparse_TD, outputs_ETD, gates_TE)
    assert mixed_TD.tolist() == sparse_TD.tolist()
    mixed_TD.sum().backward()
    assert gates_TE.grad is not None
    assert gates_TE.grad.tolist() == [[1.0, 2.0, 10.0]]
