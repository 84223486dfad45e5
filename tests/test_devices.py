"""What several devices must hold and send, against values worked out by hand."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import pytest

from moe_convert.devices import (
    all_to_all_bytes,
    device_rows,
    expected_devices,
    expert_flop,
    max_devices,
)
from moe_convert.families import Body
from moe_convert.targets import MoeShape
from tests.conftest import Dense
from tests.tools import planned

BODY = Body(
    vocab_size=1000,
    hidden_size=4096,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    ffn_size=14336,
    act="silu",
    norm_eps=1e-5,
    max_positions=32768,
    rope={},
    tied=False,
    head_dim=128,
)
MIXTRAL = MoeShape(
    num_experts=8,
    top_k=2,
    expert_size=14336,
    shared_size=0,
    dense_size=14336,
    num_layers=32,
    moe_layers=tuple(range(32)),
)
EXPERT_BYTES = 3 * 4096 * 14336 * 2
ROUTED_BYTES = EXPERT_BYTES * 8 * 32
GROUPED = replace(MIXTRAL, num_experts=16, top_k=4, num_groups=4, top_groups=2)


def test_mixtral_by_hand() -> None:
    """8x7B in bf16: 90 GB of experts, at most 2 · 2 · 4096 · 2 bytes · 32 layers per token."""
    rows = device_rows(
        BODY, MIXTRAL, "BF16", total_bytes=ROUTED_BYTES + 10**9, routed_bytes=ROUTED_BYTES
    )
    assert [row.num_devices for row in rows] == [2, 4, 8]
    assert [row.weight_bytes for row in rows] == [
        10**9 + 45097156608,
        10**9 + 22548578304,
        10**9 + 11274289152,
    ]
    assert [row.all_to_all_bytes for row in rows] == [524288, 786432, 917504]
    assert [row.max_devices for row in rows] == [2, 2, 2]
    assert [row.max_all_to_all_bytes for row in rows] == [524288, 786432, 917504]
    # two of eight experts, four on each device: 2 · (1 - 6/28); two on each: 4 · (1 - 15/28)
    assert [round(row.expected_devices, 6) for row in rows] == [1.571429, 1.857143, 2.0]
    assert [row.expected_all_to_all_bytes for row in rows] == [411941, 730258, 917504]
    # 2 FLOP · 3 · 4096 · 14336 weights · 2 experts · 32 layers = 22.5 GFLOP per token
    assert expert_flop(MIXTRAL, "BF16", ROUTED_BYTES) == 22548578304
    assert rows[2].flop_per_byte == pytest.approx(24576)


def test_wider_numbers_and_fewer_layers_count() -> None:
    half = replace(MIXTRAL, moe_layers=tuple(range(0, 32, 2)))
    assert all_to_all_bytes(2, 8, BODY, half, "BF16") == 917504 // 2
    assert all_to_all_bytes(2, 8, BODY, MIXTRAL, "F32") == 917504 * 2
    assert expert_flop(half, "F32", ROUTED_BYTES) == 22548578304 // 2


@pytest.mark.parametrize(
    ("num_experts", "sizes"),
    [(2, [2]), (6, [2]), (7, []), (12, [2, 4]), (256, [2, 4, 8, 16, 32, 64])],
)
def test_sizes_are_powers_of_two_that_divide_the_experts(
    num_experts: int, sizes: list[int]
) -> None:
    shape = replace(MIXTRAL, num_experts=num_experts)
    rows = device_rows(BODY, shape, "BF16", total_bytes=1000, routed_bytes=512)
    assert [row.num_devices for row in rows] == sizes


def test_groups_bound_the_devices() -> None:
    """Four groups of four on 2, 4, 8 and 16 devices; a token uses two groups and four experts."""
    assert [max_devices(GROUPED, n) for n in (2, 4, 8, 16)] == [2, 2, 4, 4]
    assert [max_devices(replace(GROUPED, top_groups=1), n) for n in (2, 4, 8, 16)] == [1, 1, 2, 4]
    # each of two groups is hit unless all four experts lie in the other: 2 · (1 - 1/70)
    assert expected_devices(GROUPED, 4) == pytest.approx(2 * (1 - 1 / 70))
    # two groups on one device with chance 1/3, then one device; else as above
    assert expected_devices(GROUPED, 2) == pytest.approx(1 / 3 + 2 / 3 * 2 * (1 - 1 / 70))


@pytest.mark.parametrize(
    "shape",
    [
        replace(MIXTRAL, top_k=3),
        replace(GROUPED, num_experts=12, num_groups=3, top_groups=2, top_k=3),
        replace(GROUPED, num_experts=8, num_groups=4, top_groups=3, top_k=3),
    ],
)
@pytest.mark.parametrize("num_devices", [2, 4])
def test_the_expectation_is_that_of_all_draws(shape: MoeShape, num_devices: int) -> None:
    group_size, size = shape.num_experts // shape.num_groups, shape.num_experts // num_devices
    counts = []
    for groups in itertools.combinations(range(shape.num_groups), shape.top_groups):
        candidates = [g * group_size + n for g in groups for n in range(group_size)]
        draws = itertools.combinations(candidates, shape.top_k)
        counts += [len({expert // size for expert in draw}) for draw in draws]
    assert expected_devices(shape, num_devices) == pytest.approx(sum(counts) / len(counts))
    assert max(counts) <= max_devices(shape, num_devices) <= shape.top_k


def test_fine_experts_spread_wider() -> None:
    """256 experts, eight of them per token: nearly eight of 64 devices, and 8/64 stay at home."""
    fine = replace(MIXTRAL, num_experts=256, top_k=8)
    spared = math.comb(252, 8) / math.comb(256, 8)
    assert expected_devices(fine, 64) == pytest.approx(64 * (1 - spared))
    assert max_devices(fine, 64) == 8


def test_the_plan_shows_them(dense: Dense) -> None:
    """The tiny Llama in fp32: 3 layers of 64 x 96, so a token sends 2 · 2 · 64 · 4 · 3 · 1/2."""
    from rich.console import Console

    from moe_convert.console import plan_sections, plan_table

    plan = planned(dense())
    sections = json.loads(json.dumps(plan_sections(plan)))["devices"]
    assert [row["num_devices"] for row in sections] == [2, 4]
    experts_bytes = 4 * 3 * 3 * 64 * 96 * 4
    total_bytes = sum(spec.num_bytes for spec in plan.specs)
    assert sections[0]["weight_bytes"] == total_bytes - experts_bytes // 2
    assert sections[0]["all_to_all_bytes"] == 1536
    console = Console(width=200)
    with console.capture() as captured:
        console.print(plan_table(plan))
    assert "4 devices" in captured.get()
    assert "expert FLOP per byte" in captured.get()
