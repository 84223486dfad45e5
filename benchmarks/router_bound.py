"""Speed and memory of training routers alone, beside what the same model cannot go below.

python benchmarks/router_bound.py FOLDER --source DENSE [--seq-len 256 --batch-size 2]

The bound is a forward pass and a backward one to the activations of the same model, its experts run
in the same way, with nothing to train; it is given for transformers' own experts as well. On a CPU
seconds are those of the process, so that other work on the machine does not count. Memory is that
of the steps alone: of the device, or of this process, interpreter included. Training may take what
the bound does, what the gradient of a router's rows and of the balance terms needs to have kept,
which are its input and its logits in fp32, and 16 bytes for each trained parameter.
"""

from __future__ import annotations

import argparse
import gc
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoConfig

from moe_convert.calibrate.dense_experts import widen_experts
from moe_convert.calibrate.job import Job, Request, prepare
from moe_convert.calibrate.models import load, prepare_student, target_of
from moe_convert.calibrate.report import Silent, StepRecord
from moe_convert.calibrate.run import DTYPES, run
from moe_convert.calibration import Calibration
from moe_convert.checkpoint import Source, open_source
from moe_convert.data import Data
from moe_convert.losses import cross_entropy
from moe_convert.manifest import load_manifest
from moe_convert.training.batches import labels_of

CUDA = torch.cuda.is_available()
BYTES_PER_TRAINED = 16
SKIPPED_STEPS = 5 if CUDA else 1
clock = time.monotonic if CUDA else time.process_time
ROUTERS: dict[str, Any] = {
    "train": "router",
    "objective": {"distill": 0, "lm": 1, "aux": 0.01, "z": 0.001},
    "gradient_checkpointing": False,
}


def start_peak() -> None:
    """Forget how much memory there was at most until now."""
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_bytes() -> int:
    """Return the most memory since then: of the device, or of this process on the host."""
    if CUDA:
        return int(torch.cuda.max_memory_allocated())
    status = Path("/proc/self/status").read_text(encoding="ascii")
    fields = dict(line.split(":", 1) for line in status.splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024


@dataclass
class Speed(Silent):
    """Keeps the speed of every step, and the peak of memory after the warm-up."""

    found: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    _before: tuple[float, int] = (0.0, 0)

    def step(self, record: StepRecord) -> None:
        """Keep it."""
        now, (then, tokens) = clock(), self._before
        self.found.append((record.tokens - tokens) / (now - then))
        self._before = (now, record.tokens)
        if len(self.found) == SKIPPED_STEPS:
            start_peak()
        self.peak_bytes = peak_bytes()
        if record.step % 50 == 0:
            print(f"  step {record.step}/{record.steps} loss {record.loss:.4f}", flush=True)

    @property
    def tokens_per_s(self) -> float:
        """The median, warm-up aside."""
        return median(self.found[SKIPPED_STEPS:] or self.found)


@dataclass(frozen=True)
class Usage:
    """Speed and peak memory of some steps."""

    tokens_per_s: float
    peak_bytes: int


def timed(step: Callable[[], None], tokens: int, steps: int) -> Usage:
    """Run a step several times and return its median speed and the peak of memory."""
    seconds = []
    for number in range(SKIPPED_STEPS + steps):
        if number == SKIPPED_STEPS:
            start_peak()
        started = clock()
        step()
        if CUDA:
            torch.cuda.synchronize()
        seconds.append(clock() - started)
    return Usage(tokens / median(seconds[SKIPPED_STEPS:]), peak_bytes())


def bound(job: Job, ids_BT: torch.Tensor, steps: int, *, stock: bool = False) -> Usage:
    """Return what forward and backward to the activations take, with nothing trained."""
    model = load(job.folder, torch.float32)
    dtype = DTYPES[job.section.mixed_precision]
    prepare_student(model, target_of(job.folder), job.section, dtype, job.device)
    model.requires_grad_(False)
    if not stock:
        widen_experts(model, job.top_k, job.device)
    ids_BT = ids_BT[: job.batch_size].to(job.device)

    def step() -> None:
        embedded = model.get_input_embeddings()(ids_BT).requires_grad_(True)
        logits = model(inputs_embeds=embedded, use_cache=False).logits.flatten(0, 1)
        loss = cross_entropy(logits, labels_of(ids_BT))
        del logits
        loss.backward()

    return timed(step, ids_BT.numel(), steps)


def kept_bytes(job: Job) -> int:
    """Return the size of the inputs and logits of all routers for one step, fp32."""
    target = load_manifest(job.folder).target
    hidden_size: int = AutoConfig.from_pretrained(job.folder).get_text_config().hidden_size
    values = len(target.moe_layers) * (hidden_size + target.num_experts)
    return 4 * job.batch_size * job.width * values


def routers(folder: Path, source: Source, data: Data, steps: int, rows: int | None) -> None:
    """Print speed and memory of training the routers alone, beside their bounds."""
    section = Calibration.model_validate({**ROUTERS, "max_steps": steps, "batch_size": rows})
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        copy = Path(shutil.copytree(folder, Path(work) / folder.name))
        job, ids_BT = prepare(Request(copy, source, section, data, resume=False))
        limit, stock = (bound(job, ids_BT, steps, stock=stock) for stock in (False, True))
        gc.collect()
        speed = Speed()
        report = run(job, ids_BT, speed)
        kept = kept_bytes(job)
    allowed = limit.peak_bytes + kept + BYTES_PER_TRAINED * report.trained_params
    ratio = speed.tokens_per_s / limit.tokens_per_s
    print(f"\n{folder.name}, routers alone: {speed.tokens_per_s:,.0f} tokens/s")
    print(f"  bound {limit.tokens_per_s:,.0f} tokens/s: ratio {ratio:.2f}, wanted 0.80")
    own = f"{stock.tokens_per_s:,.0f} tokens/s, {stock.peak_bytes / 1e6:.0f} MB"
    print(f"  bound with transformers' own experts {own}")
    print(f"  peak {speed.peak_bytes / 1e6:.0f} MB, bound {limit.peak_bytes / 1e6:.0f} MB", end="")
    print(
        f", inputs and logits of routers {kept / 1e6:.0f} MB, allowed {allowed / 1e6:.0f} MB",
        flush=True,
    )


def main() -> None:
    """Measure one folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("folder", type=Path, help="a conversion")
    parser.add_argument("--source", required=True, help="its dense model")
    parser.add_argument(
        "--data", default="self", help="text; the source writes it if none is given"
    )
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=None, help="rows of a step")
    parser.add_argument("--speed-steps", type=int, default=30)
    args = parser.parse_args()
    data = Data(train=args.data, seq_len=args.seq_len)
    source = open_source(args.source).fetch()
    routers(args.folder, source, data, args.speed_steps, args.batch_size)


if __name__ == "__main__":
    main()
