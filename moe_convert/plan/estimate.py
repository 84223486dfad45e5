"""What a conversion takes on this machine, and whether it fits."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from moe_convert.compose import distinct
from moe_convert.errors import DoesNotFitError
from moe_convert.plan.model import Estimate, Plan, count

LARGE_DROP = 0.5
INTERPRETER_BYTES = 450 * 10**6
WRITE_RATE = (0.2e9, 2e9)
"""Bytes per second that disks are assumed to write, slowest and fastest."""


def estimate(plan: Plan) -> Estimate:
    """Return what the conversion will take."""
    output_bytes = sum(shard.num_bytes for shard in plan.shards)
    sources = [plan.source, *(e.source for e in distinct(plan.experts) if not e.adapter)]
    download = sum(source.download_bytes for source in sources)
    fetched = download + sum(source.unpack_bytes for source in sources)
    largest = max(count(ref.shape) for ref in plan.source.tensors.values())
    params, dense = plan.params_total, plan.params_dense
    unpacking = 3 * max(source.unpack_bytes for source in sources)
    verify = 4 * max(params, dense) if plan.recipe.verify.enabled else 0
    quick, slow = (
        (output_bytes + fetched) / rate + verify / (10 * rate) for rate in WRITE_RATE[::-1]
    )
    folder = plan.output.absolute().parent
    while not folder.exists():
        folder = folder.parent
    return Estimate(
        download_bytes=download,
        disk_bytes=output_bytes + fetched,
        free_disk_bytes=shutil.disk_usage(folder).free,
        ram_bytes=INTERPRETER_BYTES + max(unpacking, 8 * largest + _states_bytes(plan)),
        verify_ram_bytes=INTERPRETER_BYTES + verify,
        free_ram_bytes=available_ram_bytes(),
        time_s=(round(quick, 1), round(slow, 1)),
    )


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
