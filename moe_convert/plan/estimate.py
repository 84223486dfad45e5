"""What a conversion takes on this machine, and whether it fits."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from moe_convert.compose import distinct
from moe_convert.data.writing import ram_bytes
from moe_convert.errors import DoesNotFitError
from moe_convert.plan.model import Estimate, Plan, count

LARGE_DROP = 0.5
INTERPRETER_BYTES = 450 * 10**6
WRITE_RATE = (0.2e9, 2e9)
"""Bytes per second that disks are assumed to write, slowest and fastest."""
RUN_RATE = (2e10, 5e11)
"""Floating-point operations per second that models are assumed to run with, slowest and fastest."""
START_S = {"copying": (3.0, 1.0), "running": (12.0, 4.0)}
"""Seconds until the first byte, slowest and fastest: weights alone, or models that have to run."""
SAMPLE_TOKENS = 512
VERIFY_TOKENS = 1600
"""What a check runs through each of the two models: a text, random tokens, two dtypes."""


def estimate(plan: Plan) -> Estimate:
    """Return what the conversion will take."""
    output_bytes = sum(shard.num_bytes for shard in plan.shards)
    sources = [plan.source, *(e.source for e in distinct(plan.experts) if not e.adapter)]
    download = sum(source.download_bytes for source in sources)
    kept = sum(source.download_bytes for source in sources if not source.streamed)
    fetched = kept + sum(source.unpack_bytes for source in sources)
    largest = max(count(ref.shape) for ref in plan.source.tensors.values())
    params, dense = plan.params_total, plan.params_dense
    unpacking = 3 * max(source.unpack_bytes for source in sources)
    verify = 4 * max(params, dense) if plan.recipe.verify.enabled else 0
    writing = ram_bytes(dense) if plan.recipe.data.is_self else 0
    buffers = sum(source.buffer_bytes for source in sources)
    runs = plan.recipe.verify.enabled or plan.recipe.needs_input
    start_s = START_S["running" if runs else "copying"]
    slow, quick = (
        start + (output_bytes + fetched) / rate + verify / (10 * rate) + _flop(plan) / run_rate
        for start, rate, run_rate in zip(start_s, WRITE_RATE, RUN_RATE, strict=True)
    )
    folder = plan.output.absolute().parent
    while not folder.exists():
        folder = folder.parent
    return Estimate(
        download_bytes=download,
        disk_bytes=output_bytes + fetched,
        free_disk_bytes=shutil.disk_usage(folder).free,
        ram_bytes=INTERPRETER_BYTES
        + buffers
        + max(unpacking, writing, 8 * largest + _states_bytes(plan)),
        verify_ram_bytes=INTERPRETER_BYTES + verify,
        free_ram_bytes=available_ram_bytes(),
        time_s=(round(quick, 1), round(slow, 1)),
    )


def _flop(plan: Plan) -> float:
    """Return the floating-point operations of running the models: over data, and for the check."""
    recipe, dense = plan.recipe, plan.params_dense
    wanted = SAMPLE_TOKENS if recipe.data.train is None else recipe.data.max_tokens
    measured = wanted if recipe.needs_input else 0
    checked = VERIFY_TOKENS if recipe.verify.enabled else 0
    return 2.0 * (dense * (measured + checked) + plan.params_active * checked)


def _states_bytes(plan: Plan) -> int:
    """Return what the hidden states of the data take, in fp32: two sets, and a copy in between."""
    data = plan.recipe.data
    return 12 * plan.layout.body.hidden_size * data.max_tokens if data.train is not None else 0


def available_ram_bytes() -> int:
    """Return the memory that new processes can use."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        fields = dict(line.split(":") for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_fits(plan: Plan, force: bool) -> None:
    """Refuse to begin what cannot end.

    Raises:
        DoesNotFitError: disk or memory is too small and `force` is off.
    """
    estimate = plan.estimate
    needs = (
        ("disk", estimate.disk_bytes, estimate.free_disk_bytes),
        ("memory", estimate.ram_bytes, estimate.free_ram_bytes),
    )
    for what, needed, free in needs:
        if needed > free and not force:
            raise DoesNotFitError(
                f"The conversion needs {needed / 1e9:.3g} GB of {what}, and {free / 1e9:.3g} GB "
                "are free.",
                "Use fewer experts or a smaller --dtype, or --force to try all the same.",
            )
