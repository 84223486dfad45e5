"""What a result asks of several devices under expert parallelism, worked out from its config alone.

Every device holds the whole model but only its share of the routed experts, a block of adjacent
ones; in every MoE layer a token's state travels to the devices of its chosen experts and back.

D hidden size · E routed experts · K experts per token · P devices
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from moe_convert.families import Body
from moe_convert.ffn import ITEM_BITS
from moe_convert.targets import MoeShape

MAX_DEVICES = 64


@dataclass(frozen=True)
class DeviceRow:
    """One number of devices; sizes in bytes, work in floating-point operations (FLOP).

    `expected_devices` is to how many distinct devices a token goes in one layer if its experts are
    drawn at random, `max_devices` the most it can be. The three `all_to_all` figures are what one
    token costs on the links, there and back through all layers: with one copy for each chosen
    expert, with one for each expected device, and with one for each device at most.
    `flop_per_byte` is the work of the chosen experts over the expected bytes. Where a device can do
    more than that while its link moves a byte, the links and not the experts set the pace: an H100
    in bf16 does about 2200 per byte over NVLink (989 TFLOP/s, 450 GB/s), 20000 over 400 Gbit/s.
    """

    num_devices: int
    weight_bytes: int
    expected_devices: float
    max_devices: int
    all_to_all_bytes: int
    expected_all_to_all_bytes: int
    max_all_to_all_bytes: int
    flop_per_byte: float


def device_rows(
    body: Body, shape: MoeShape, dtype: str, *, total_bytes: int, routed_bytes: int
) -> tuple[DeviceRow, ...]:
    """Return a row for 2, 4, 8, … devices: up to one routed expert each and at most 64.

    `total_bytes` is the size of all weights and `routed_bytes` of the routed experts among them.
    Sizes that do not divide the experts are left out, as engines refuse them.
    """
    sizes = [2**n for n in range(1, MAX_DEVICES.bit_length()) if shape.num_experts % 2**n == 0]
    return tuple(
        _row(num_devices, body, shape, dtype, total_bytes, routed_bytes) for num_devices in sizes
    )


def _row(
    num_devices: int,
    body: Body,
    shape: MoeShape,
    dtype: str,
    total_bytes: int,
    routed_bytes: int,
) -> DeviceRow:
    expected, most = expected_devices(shape, num_devices), max_devices(shape, num_devices)
    expected_bytes = all_to_all_bytes(expected, num_devices, body, shape, dtype)
    return DeviceRow(
        num_devices=num_devices,
        weight_bytes=total_bytes - routed_bytes + routed_bytes // num_devices,
        expected_devices=expected,
        max_devices=most,
        all_to_all_bytes=all_to_all_bytes(shape.top_k, num_devices, body, shape, dtype),
        expected_all_to_all_bytes=expected_bytes,
        max_all_to_all_bytes=all_to_all_bytes(most, num_devices, body, shape, dtype),
        flop_per_byte=expert_flop(shape, dtype, routed_bytes) / expected_bytes,
    )


def all_to_all_bytes(
    copies: float, num_devices: int, body: Body, shape: MoeShape, dtype: str
) -> int:
    """Return dispatch and combine of one token: 2 · copies · D · item bytes · layers · (1 - 1/P).

    One of the P devices is the token's own; it is assumed to be chosen as often as any other, and
    that share does not travel. States are assumed to travel in the dtype of the weights.
    """
    item_bytes = ITEM_BITS[dtype] // 8
    sent_bytes = copies * body.hidden_size * item_bytes * len(shape.moe_layers)
    return round(2 * sent_bytes * (1 - 1 / num_devices))


def expert_flop(shape: MoeShape, dtype: str, routed_bytes: int) -> int:
    """Return the work of the routed experts on one token in all layers: 2 FLOP per weight used."""
    weights = routed_bytes * 8 // ITEM_BITS[dtype]
    return 2 * weights * shape.top_k // shape.num_experts


def max_devices(shape: MoeShape, num_devices: int) -> int:
    """Return on how many distinct devices the experts of one token can lie at most.

    It is sent at most once to a device and no more often than it has experts: min(K, P). With
    group-limited routing the devices of `top_groups` groups are a further bound.
    """
    size = shape.num_experts // num_devices
    group_size = shape.num_experts // shape.num_groups
    starts = range(0, shape.num_experts, group_size)
    spans = sorted((start + group_size - 1) // size - start // size + 1 for start in starts)
    return min(shape.top_k, num_devices, sum(spans[-shape.top_groups :]))


def expected_devices(shape: MoeShape, num_devices: int) -> float:
    """Return on how many distinct devices the experts of one token lie, under uniform routing.

    `top_groups` groups are drawn, and K experts without replacement from the C in them. A device
    with h of these is spared with probability (C-h choose K) / (C choose K), so the expectation is
    the sum over devices of 1 minus that: P · (1 - (E - E/P choose K) / (E choose K)) without
    groups. A trained router is not uniform; experts that are often chosen together and lie
    together lower the number.
    """
    size = shape.num_experts // num_devices
    group_size = shape.num_experts // shape.num_groups
    candidates = shape.top_groups * group_size
    drawn = math.comb(candidates, shape.top_k)
    total = 0.0
    for first in range(0, shape.num_experts, size):
        held = [
            max(0, min(first + size, start + group_size) - max(first, start))
            for start in range(0, shape.num_experts, group_size)
        ]
        for count, share in _held_shares(held, shape.top_groups).items():
            total += share * (1 - math.comb(candidates - count, shape.top_k) / drawn)
    return total


def _held_shares(held: Sequence[int], num_chosen: int) -> dict[int, float]:
    """Return how likely it is that the chosen groups have this many experts on a device.

    `held` counts a device's experts in each group; `num_chosen` groups are drawn uniformly.
    """
    ways = {(0, 0): 1}
    for experts in held:
        for (chosen, count), number in list(ways.items()):
            if chosen < num_chosen:
                key = chosen + 1, count + experts
                ways[key] = ways.get(key, 0) + number
    total = math.comb(len(held), num_chosen)
    return {count: n / total for (chosen, count), n in ways.items() if chosen == num_chosen}
