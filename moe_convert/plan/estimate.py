"""What a conversion takes on this machine, and whether it fits."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from moe_convert.carving import PORTION
from moe_convert.compose import distinct
from moe_convert.data.writing import ram_bytes
from moe_convert.edits import Refit
from moe_convert.errors import DoesNotFitError, UsageError
from moe_convert.experts import Learned, Split
from moe_convert.inputs import FITTED_TOKENS, JUDGED_TOKENS
from moe_convert.plan.model import Estimate, Plan, count
from moe_convert.recipe import Recipe
from moe_convert.runtime import free_gpu_bytes
from moe_convert.streams import HEAD_TOKENS
from moe_convert.streams.converted import FFN_TOKENS

INTERPRETER_BYTES = 450 * 10**6
WRITE_RATE = (0.2e9, 2e9)
"""Bytes per second that disks are assumed to write, slowest and fastest."""
RUN_RATE = (2e10, 5e11)
"""Floating-point operations per second that models are assumed to run with, slowest and fastest."""
START_S = {"copying": (3.0, 1.0), "running": (12.0, 4.0)}
"""Seconds until the first byte, slowest and fastest: weights alone, or models that have to run."""
SPLIT_RUNS = 8.0
"""Operations for every token and dense parameter that a fitted split takes beside running it."""
GPU_SHARE = 0.5
"""Of a GPU's free memory, that hidden states may take."""
LARGEST_SHARE = 0.5
"""Of the free memory, from which on hidden states go to the disk."""
LEARNING_RUNS = 8.0
"""Operations for every token and dense parameter that a step of learning a split takes."""
LEARNING_TOKENS = 2048
"""Tokens that go through the model at once while a split is learned."""
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
    offloaded = offload_folder(plan)
    in_memory, spilled = (0, _states_bytes(plan)) if offloaded else (_states_bytes(plan), 0)
    spilled += _gradients_bytes(plan)
    runs = plan.recipe.verify.enabled or plan.recipe.needs_input
    start_s = START_S["running" if runs else "copying"]
    slow, quick = (
        start + (output_bytes + fetched) / rate + verify / (10 * rate) + _flop(plan) / run_rate
        for start, rate, run_rate in zip(start_s, WRITE_RATE, RUN_RATE, strict=True)
    )
    folder = _existing(plan.output.absolute().parent)
    if offloaded and offloaded.stat().st_dev != folder.stat().st_dev:
        _check_room(offloaded, spilled)
        spilled = 0
    return Estimate(
        download_bytes=download,
        disk_bytes=output_bytes + fetched + spilled,
        free_disk_bytes=shutil.disk_usage(folder).free,
        ram_bytes=INTERPRETER_BYTES
        + buffers
        + max(
            unpacking,
            writing,
            8 * largest
            + max(_fitting_bytes(plan) + in_memory, _trials_bytes(plan), _learning_bytes(plan)),
        ),
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
    fitted = SPLIT_RUNS * dense * measured + _gram_flop(plan, measured) if recipe.carves else 0.0
    runs = 2.0 * (dense * (measured + checked) + plan.params_active * checked)
    return runs + fitted + _trials_flop(plan) + _learning_flop(plan)


def _learning_flop(plan: Plan) -> float:
    """Return the operations of learning a split on a CPU: four runs of the model, one backwards."""
    method = plan.recipe.experts
    if not isinstance(method, Learned):
        return 0.0
    return LEARNING_RUNS * plan.params_dense * method.num_steps(gpu=False) * method.tokens


def _learning_bytes(plan: Plan) -> int:
    """Return what learning takes: the model in fp32, and for some tokens what it computes.

    That is the input of every layer, all of one layer, and a few copies of the logits.
    """
    body, method = plan.layout.body, plan.recipe.experts
    if not isinstance(method, Learned):
        return 0
    inside = 20 * body.hidden_size + 10 * body.ffn_size
    kept = body.num_layers * body.hidden_size + inside + 5 * body.vocab_size
    return 4 * (plan.params_dense + LEARNING_TOKENS * kept)


def _trial_tokens(plan: Plan) -> int:
    """Return how many tokens go through every trial split of one layer; none if there is none."""
    return min(JUDGED_TOKENS, plan.recipe.data.max_tokens // 8) if plan.densest else 0


def _trials_flop(plan: Plan) -> float:
    """Return the operations of trying to split each layer alone.

    A trial runs the layers behind its own, on average half of them, and the head.
    """
    if not plan.densest:
        return 0.0
    body, dense, tokens = plan.layout.body, plan.params_dense, _trial_tokens(plan)
    fitted = (2.0 + SPLIT_RUNS) * dense * min(FITTED_TOKENS, plan.recipe.data.max_tokens)
    head = 2.0 * body.vocab_size * body.hidden_size
    return fitted + body.num_layers * tokens * (dense + head)


def _trials_bytes(plan: Plan) -> int:
    """Return what the states of all trials take, and some tokens' probabilities, in fp32."""
    body, tokens = plan.layout.body, _trial_tokens(plan)
    states = body.hidden_size * tokens * (body.num_layers + 2)
    return 4 * (states + (4 * HEAD_TOKENS * body.vocab_size if tokens else 0))


def _gram_flop(plan: Plan, tokens: int) -> float:
    """Return the operations of the products of all neurons in all layers that are solved for."""
    refits = sum(isinstance(edit, Refit) for edit in plan.recipe.experts.edits)
    shape = plan.shape
    return 2.0 * refits * tokens * shape.dense_size**2 * len(shape.moe_layers)


def _states_bytes(plan: Plan) -> int:
    """Return what the hidden states of the data take, in fp32.

    One stream and what goes into its FFNs; a split keeps two, and what should come out.
    """
    data, body = plan.recipe.data, plan.layout.body
    if data.train is None:
        return 0
    return (20 if plan.recipe.carves else 8) * body.hidden_size * data.max_tokens


def _gradients_bytes(plan: Plan) -> int:
    """Return what the gradients of every layer's output take on the disk, in bf16."""
    method, body = plan.recipe.experts, plan.layout.body
    if not isinstance(method, Split) or method.needs != "gradients":
        return 0
    return 2 * body.num_layers * body.hidden_size * plan.recipe.data.max_tokens


def _fitting_bytes(plan: Plan) -> int:
    """Return what fitting a layer takes: some tokens' neurons, matrices over all, experts' inputs.

    The matrices are the Gram matrix in fp32, and itself and its factor in fp64.
    """
    body, shape = plan.layout.body, plan.shape
    if not plan.recipe.carves:
        return 0
    neurons = 20 * PORTION["cpu"] * body.ffn_size + 24 * body.ffn_size**2
    return neurons + 12 * FFN_TOKENS["cpu"] * shape.top_k * body.hidden_size


def offload_folder(plan: Plan) -> Path | None:
    """Return on whose disk the hidden states of a split live; None if they stay in memory."""
    wanted = plan.recipe.runtime.offload_dir
    if wanted:
        return Path(wanted).expanduser()
    large = _states_bytes(plan) > LARGEST_SHARE * available_ram_bytes()
    return _existing(plan.output.absolute().parent) if plan.recipe.carves and large else None


def states_device(plan: Plan, device: str) -> str:
    """Return where a split's hidden states stay in memory: on its device, or on the host.

    A GPU gives them at most a share of what it has free, for everything else needs it too.
    """
    if device != "cuda":
        return device
    return device if _states_bytes(plan) <= GPU_SHARE * free_gpu_bytes() else "cpu"


def _check_room(folder: Path, num_bytes: int) -> None:
    """Refuse a disk of its own for hidden states that is too small.

    Raises:
        DoesNotFitError: with both sizes.
    """
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise DoesNotFitError(
            f"{folder} has {free / 1e9:.3g} GB free, and hidden states take {num_bytes / 1e9:.3g}.",
            "Give another folder as --offload-dir, or fewer tokens.",
        )


def check_offload(recipe: Recipe) -> None:
    """Refuse a folder for hidden states that cannot take any.

    Raises:
        UsageError: nothing would be put there, or nothing can be.
    """
    wanted = recipe.runtime.offload_dir
    if wanted is None:
        return
    if not recipe.carves:
        raise UsageError(
            "--offload-dir has no effect: only a split that is made of data keeps hidden states.",
            "Leave it out.",
        )
    folder = Path(wanted).expanduser()
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UsageError(
            f"--offload-dir {wanted} is no folder that can be written to.",
            "Create it, or give another.",
        )


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder


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
