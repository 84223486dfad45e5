"""Each value transform alone: what it does to a small tensor."""

from __future__ import annotations

import pytest
import torch

from moe_convert.ffn import Weight
from moe_convert.transforms import (
    half_split,
    plus_one,
    root_scaled,
    split_rows,
    spread_rotary,
    spread_wavelengths,
    transparent_norm,
    transposed,
)


def weight_of(*shape: int) -> tuple[torch.Tensor, Weight]:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    return tensor, Weight.of(tensor, "F32")


def test_plus_one_is_what_a_shifted_norm_multiplies_by() -> None:
    tensor, weight = weight_of(6)
    shifted = plus_one(weight)
    assert shifted.rounds
    assert torch.equal(shifted.load(), 1.0 + tensor)


def test_split_rows_puts_every_row_in_one_part() -> None:
    tensor, weight = weight_of(7, 3)
    parts = split_rows(weight, (4, 2, 1))
    assert [part.shape for part in parts] == [(4, 3), (2, 3), (1, 3)]
    assert torch.equal(torch.cat([part.load() for part in parts]), tensor)
    assert not any(part.rounds for part in parts)


def test_transposed_swaps_the_shape_too() -> None:
    tensor, weight = weight_of(5, 2)
    turned = transposed(weight)
    assert turned.shape == (2, 5)
    assert torch.equal(turned.load(), tensor.T)
    assert not turned.rounds


def test_only_a_power_of_two_scales_without_rounding() -> None:
    tensor, weight = weight_of(4, 4)
    assert weight.scaled(1.0) is weight
    assert not weight.scaled(0.25).rounds
    assert weight.scaled(3.0).rounds
    assert weight.scaled(3.0).rows(range(2)).cast("BF16").rounds
    assert torch.equal(weight.scaled(3.0).load(), tensor * 3.0)


def turned(rows: torch.Tensor, pairs: list[tuple[int, int]], angles: list[float]) -> torch.Tensor:
    """Return one head's vector with each pair of entries rotated by its angle."""
    result = rows.clone()
    for (one, other), angle in zip(pairs, torch.tensor(angles, dtype=torch.float64), strict=True):
        result[one] = rows[one] * angle.cos() - rows[other] * angle.sin()
        result[other] = rows[other] * angle.cos() + rows[one] * angle.sin()
    return result


def score(
    query: torch.Tensor, key: torch.Tensor, pairs: list[tuple[int, int]], angles: list[float]
) -> float:
    """Return q k of a head with the query 3 and the key 1 positions from the start."""
    q = turned(query, pairs, [3 * angle for angle in angles])
    return float(q @ turned(key, pairs, angles))


def test_half_split_keeps_the_product_of_interleaved_pairs() -> None:
    """Two heads of eight entries, six of which turn."""
    angles = [1.0, 0.3, 0.1]
    adjacent, apart = [(0, 1), (2, 3), (4, 5)], [(0, 3), (1, 4), (2, 5)]
    (query, q), (key, k) = weight_of(16), weight_of(16)
    moved_q, moved_k = (half_split(w, 2, 6).load().view(2, 8).double() for w in (q, k))
    for head in range(2):
        before = score(
            query.view(2, 8)[head].double(), key.view(2, 8)[head].double(), adjacent, angles
        )
        assert abs(score(moved_q[head], moved_k[head], apart, angles) - before) < 1e-12


def test_spread_rotary_turns_the_same_entries_in_a_full_rotation() -> None:
    """Two heads of eight entries, four of which turn: the other two pairs of eight stand still."""
    (query, q), (key, k) = weight_of(16), weight_of(16)
    divisors = spread_wavelengths(100.0, 8, 4)
    assert divisors[:2] == [1.0, 10.0]
    angles = [1 / divisor for divisor in divisors]
    moved_q, moved_k = (spread_rotary(w, 2, 4).load().view(2, 8).double() for w in (q, k))
    for head in range(2):
        before = score(
            query.view(2, 8)[head].double(),
            key.view(2, 8)[head].double(),
            [(0, 2), (1, 3)],
            [1.0, 0.1],
        )
        after = score(moved_q[head], moved_k[head], [(i, i + 4) for i in range(4)], angles)
        assert abs(after - before) < 1e-12


def test_spread_wavelengths_are_the_partial_rotation_s_bit_by_bit() -> None:
    divisors = torch.tensor(spread_wavelengths(10000.0, 80, 20))
    partial = 1.0 / (10000.0 ** (torch.arange(0, 20, 2, dtype=torch.float) / 20))
    assert torch.equal((1.0 / divisors)[:10], partial)
    assert torch.equal((4e6 / divisors[10:]).cos(), torch.ones(30))


def test_root_scaled_multiplies_by_the_root_of_the_width() -> None:
    scaled = root_scaled(Weight.of(torch.tensor([1.0, -0.5, 3.0, 0.25]), "F32"))
    assert scaled.load().tolist() == [2.0, -1.0, 6.0, 0.5]
    assert not scaled.rounds


def rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    return x / (x.square().mean() + eps).sqrt()


@pytest.mark.parametrize("size", [1e-5, 1e-3, 1.0, 1e3])
def test_a_transparent_norm_is_undone_by_the_next(size: float) -> None:
    """Also for values so small that epsilon counts, where a norm of weight one is not undone."""
    eps, factor = 1e-6, 2.0**-12
    weight = transparent_norm(eps, factor)
    assert weight == pytest.approx(4.096)
    x = torch.tensor([3.0, -1.0, 2.0, 0.5], dtype=torch.float64) * size
    after = rms(rms(x * factor, eps) * weight, eps)
    assert torch.allclose(after, rms(x, eps), rtol=1e-6)
    if size < 1e-2:
        assert not torch.allclose(rms(rms(x, eps), eps), rms(x, eps), rtol=1e-2)
