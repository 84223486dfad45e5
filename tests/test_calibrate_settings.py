"""Settings of a calibration: what each one does, and that those without effect are refused."""

# ruff: noqa: F401, F811 - fixtures of another file

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from rich.console import Console

from moe_convert.calibrate.alone import alone, share
from moe_convert.calibrate.job import JOB
from moe_convert.calibrate.launch import asked_for
from moe_convert.calibrate.layers import Layers, used_rows
from moe_convert.calibrate.panel import lines
from moe_convert.calibrating import Processes, calibrate_folder, calibration_request
from moe_convert.calibration import Calibration, check, exact_objective, resolved
from moe_convert.calibration import Made as Conversion
from moe_convert.card.measured import trained
from moe_convert.checkpoint import read_folder
from moe_convert.checkpoint.replace import WORK
from moe_convert.errors import UsageError
from moe_convert.experts import Clone, Contribution
from moe_convert.manifest import CalibrationReport, load_manifest
from moe_convert.targets import TARGETS
from moe_convert.training.batches import order
from tests.calibration import (
    NOISY,
    Made,
    Stop,
    calibrated,
    changed,
    copy,
    job_of,
    originals,
    text,
)
from tests.conftest import Dense
from tests.test_cli import invoke
from tests.tools import digest, tensors

BALANCE: dict[str, Any] = {"objective": "aux", "train": "router", "optimizer": {"lr": 1e-9}}


def test_biases_move_in_proportion_to_the_scores(
    copy: Made,
    calibrated: Callable[..., CalibrationReport],
) -> None:
    """A router a thousand times flatter gets steps as much smaller, and its load evens out too."""
    moved = {}
    for std in (0.5, 0.0005):
        folder = copy(f"out-{std}", target__architecture="glm4_moe", router__logit_std=std, **NOISY)
        report = calibrated(folder, bias_update=0.01, **BALANCE)
        assert report.after.max_violation < report.before.max_violation
        refs = read_folder(folder)
        found = [ref.read() for n, ref in refs.items() if n.endswith("e_score_correction_bias")]
        moved[std] = float(torch.stack(found).abs().max())
    assert 0 < moved[0.5] < 6 * 0.01
    assert moved[0.0005] / moved[0.5] == pytest.approx(1e-3, rel=0.5)


def command(folder: Path, dense: Dense, text: Path, *options: object) -> list[str]:
    rest = ["--seq-len", "32", "--batch-size", "2", "--save-every", "1000", *map(str, options)]
    source = ["--source", str(dense()), "--data", str(text)]
    return [sys.executable, "-m", "moe_convert", "calibrate", str(folder), *source, *rest]


TORCHRUN = ("--launcher", "torchrun", "--", "--standalone", "--nproc_per_node", "1")


def at_work(folder: Path, process: subprocess.Popen[str]) -> None:
    """Wait until some steps are done."""
    log = folder / "calibration.jsonl"
    while not (log.exists() and log.read_bytes().count(b"\n") > 2):
        assert process.poll() is None
        time.sleep(0.02)


def workers(folder: Path) -> list[int]:
    """Return the processes whose command names the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_launcher_is_stopped_with_the_command(
    number: signal.Signals,
    copy: Made,
    dense: Dense,
    text: Path,
) -> None:
    """Its processes are gone before the command is, and have written a checkpoint.

    Meanwhile nobody else may train the folder.
    """
    folder = copy(**NOISY)
    words = command(folder, dense, text, "--max-steps", 100_000, *TORCHRUN)
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    at_work(folder, process)
    second = invoke(*command(folder, dense, text)[3:])
    process.send_signal(number)
    _, said = process.communicate()
    assert not workers(folder)
    assert process.returncode == 130, said
    assert list((folder / WORK).glob("step-*"))
    assert second.exit_code == 2
    assert "is being calibrated by another process" in second.stderr


def test_workers_whose_command_was_killed_keep_others_out(
    copy: Made,
    dense: Dense,
    text: Path,
) -> None:
    folder = copy(**NOISY)
    path = folder / WORK / JOB
    path.parent.mkdir()
    path.write_text("{}", encoding="utf-8")
    words = ("calibrate", folder, "--source", dense(), "--data", text, "--seq-len", 32)
    with share(path):
        result = invoke(*words, "--max-steps", 1)
        assert result.exit_code == 2
        assert "is being calibrated by another process" in result.stderr
    assert invoke(*words, "--max-steps", 1).exit_code == 0


def test_two_callers_cannot_train_one_folder(copy: Made, dense: Dense, text: Path) -> None:
    """Not even in one process; the second one finds out before it has written anything."""
    folder, console = copy(**NOISY), Console(stderr=True)
    changes = {"calibration.max_steps": 1, "data.train": str(text), "data.seq_len": 32}
    said: list[str] = []

    def meanwhile(what: str, done: int, total: int) -> None:
        before = digest(folder)
        with pytest.raises(UsageError, match="is being calibrated by another process") as found:
            calibrate_folder(request, Processes(), console, show=False)
        said.append(found.value.message)
        assert digest(folder) == before

    request = calibration_request(folder, changes, source=str(dense()), progress=meanwhile)
    with alone(folder):
        meanwhile("", 0, 0)
    written = {**changes, "data.train": "self", "calibration.max_tokens": 256}
    writing = calibration_request(folder, written, source=str(dense()), progress=meanwhile)
    calibrate_folder(writing, Processes(), console, show=False)
    assert len(said) > 1


def conversion(
    target: str = "glm4_moe", *, split: bool = True, width: int = 24, null_experts: int = 0
) -> Conversion:
    return Conversion(
        Contribution() if split else Clone(),
        TARGETS[target],
        exact=False,
        top_k=2,
        num_experts=4,
        expert_size=width,
        selection_bias=True,
        null_experts=null_experts,
    )


LEARNED = {"train": "router+experts"}


@pytest.mark.parametrize(
    ("settings", "made", "hears"),
    [
        ({}, {}, False),
        (LEARNED, {}, True),
        ({"objective": "lm", "train": "all"}, {}, True),
        (LEARNED, {"split": False}, False),
        (LEARNED, {"width": 96}, False),
        (LEARNED, {"target": "phimoe"}, False),
        (LEARNED, {"null_experts": 1}, False),
        ({"objective": "aux", "train": "router"}, {}, False),
        ({"objective": "hidden"}, {}, False),
        ({**LEARNED, "parallel": "experts"}, {}, False),
        ({**LEARNED, "dense_router": False}, {}, False),
        ({**LEARNED, "dense_router": True}, {"width": 96}, True),
    ],
    ids=str,
)
def test_routers_hear_of_all_experts_where_that_costs_nothing(
    settings: dict[str, Any], made: dict[str, Any], hears: bool
) -> None:
    section = resolved(Calibration.model_validate(settings), conversion(**made), gpu=False)
    assert section.dense_router is hears
    if (settings, made) == (LEARNED, {"width": 96}):
        on_gpu = resolved(Calibration.model_validate(settings), conversion(**made), gpu=True)
        assert on_gpu.dense_router


WITHOUT_EFFECT: list[tuple[dict[str, Any], str]] = [
    ({"dense_router": True, "train": "experts"}, "--dense-router is a gradient"),
    ({"compile": True, "parallel": "fsdp"}, "--compile has no effect on layers that are cut"),
    ({"compile": True, "objective": "hidden"}, "calibration.compile cannot take effect"),
    ({"dense_router": True, "train": "router", "objective": "aux"}, "--dense-router is a gradient"),
    ({"early_stop": {"min_delta": 0.1}}, "no effect without a patience"),
    ({"optimizer": {"router_factor": 3.0}, "train": "experts"}, "where routers are not trained"),
    ({"teacher": "offload", "objective": "lm"}, "where nothing is distilled"),
    ({"train": []}, "names no part"),
    ({"objective": "none", "bias_update": 0.001, "train": "router"}, "Without a loss only"),
    ({"objective": "none"}, "no term that counts"),
]


@pytest.mark.parametrize(("settings", "reason"), WITHOUT_EFFECT, ids=lambda v: str(v)[:40])
def test_what_would_have_no_effect_is_refused(settings: dict[str, Any], reason: str) -> None:
    section = resolved(Calibration.model_validate(settings), conversion(), gpu=False)
    with pytest.raises(UsageError, match=reason):
        check(section, conversion())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"dense_router": True, "train": "router"},
        {"early_stop": {"min_delta": 0.1, "patience": 3}},
        {"optimizer": {"router_factor": 3.0}, "train": "router"},
        {"teacher": "offload"},
        {"objective": "none", "bias_update": 0.001},
        {"objective": {"hidden": 1.0}},
    ],
    ids=str,
)
def test_what_has_an_effect_is_not_refused(settings: dict[str, Any]) -> None:
    check(resolved(Calibration.model_validate(settings), conversion(), gpu=False), conversion())


def test_the_z_term_needs_logits() -> None:
    """Gemma 4's router gives shares, whose log-sum-exp is nought."""
    made = conversion("gemma4_text", split=False)
    preset = resolved(Calibration(), made, gpu=False)
    assert preset.objective
    assert preset.objective.terms == {"lm": 1.0, "aux": 0.01}
    given = resolved(Calibration.model_validate({"objective": "lm+z"}), made, gpu=False)
    with pytest.raises(UsageError, match="shares that add up to one"):
        check(given, made)


@pytest.mark.parametrize("text", ["distill+lm", "distill,lm"])
def test_terms_are_joined_by_either(text: str) -> None:
    assert {name for name, weight in exact_objective(text).items() if weight} == {"distill", "lm"}


@pytest.mark.parametrize("words", [("--nproc_per_node", "0"), ("--nnodes=0", "--nproc_per_node=2")])
def test_no_process_is_refused(words: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="ask for no process"):
        asked_for("torchrun", words)


def test_biases_alone_are_trained_and_said_to_be(copy: Made, dense: Dense, text: Path) -> None:
    """Nothing else changes, and the command says so."""
    folder = copy(target__architecture="glm4_moe", **NOISY)
    before = tensors(folder)
    words = command(folder, dense, text, "--max-steps", 2, "--launcher", "auto")[3:]
    result = invoke(*words, "--objective", "none", "--bias-update", 0.01, "--json")
    assert result.exit_code == 0, result.stderr
    names = changed(before, folder)
    assert {name.rpartition(".")[2] for name in names} == {"e_score_correction_bias"}
    report = load_manifest(folder).calibration
    assert report
    assert report.trained == ["biases"]
    assert report.trained_params == 4 * len(names)
    assert not [line for line in lines(report) if line.startswith("loss")]
    told = trained(load_manifest(folder))
    assert f"{report.tokens} tokens in all on text.txt, with no loss: an expert's bias" in told
    assert "loss ." not in told


HIDDEN: dict[str, Any] = {"objective": "hidden", "train": "router+experts", "max_steps": 3}


def test_finished_layers_are_logged_once_and_are_of_this_run(
    copy: Made, calibrated: Callable[..., CalibrationReport]
) -> None:
    folder = copy(**NOISY)
    with pytest.raises(RuntimeError, match="killed"):
        calibrated(folder, Stop(5), **HIDDEN)
    with pytest.raises(UsageError, match="layers of a calibration with other settings"):
        calibrated(folder, **{**HIDDEN, "optimizer": {"lr": 1e-5}})
    layer = next((folder / WORK).glob("layer-*"))
    whole = layer.read_bytes()
    layer.write_bytes(whole[:20])
    with pytest.raises(UsageError, match="The finished layer"):
        calibrated(folder, **HIDDEN)
    layer.write_bytes(whole)
    report = calibrated(folder, **HIDDEN)
    assert report.resumed_from == 4
    assert report.tokens == 3 * 4 * 32
    log = (folder / "calibration.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["step"] for line in log] == list(range(1, report.steps + 1))


def test_rows_that_no_step_gets_to_are_not_streamed(
    originals: Made, dense: Dense, text: Path
) -> None:
    job, ids_BT = job_of(originals(**NOISY), dense(), text, **HIDDEN)
    used = used_rows(job, len(ids_BT))
    assert used == sorted(order(len(ids_BT), 0, 12, 0))
    assert len(used) == 12 < len(ids_BT)
    received = Layers(job, ids_BT, Accelerator(cpu=True)).received(0)
    assert len(received) == 12
    every = job.model_copy(update={"steps": 10_000})
    assert used_rows(every, len(ids_BT)) == [*range(len(ids_BT))]
