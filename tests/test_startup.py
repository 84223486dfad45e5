"""What a plan and a copy of weights do without: torch, and what transformers runs models with."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moe_convert.checkpoint import stored_shapes
from moe_convert.checkpoint.configs import Filled, apart, filled
from moe_convert.checkpoint.names import full_config
from moe_convert.checkpoint.source import read_config
from moe_convert.errors import SourceError
from moe_convert.families import FAMILIES, find_family
from moe_convert.families.shapes import stored
from moe_convert.plan import plan_source
from tests.conftest import Dense
from tests.tiny import TINY, pairs
from tests.tools import planned, tensors

VARIANTS = [(family, variant) for family, variants in TINY.items() for variant in variants]
ASKED = {"gemma4_text", "granite_swa", "hunyuan_v1_dense", "lfm2", "phi3", "qwen3_5_text", "youtu"}
"""Families whose names and shapes only their own class knows."""


@pytest.fixture(scope="module")
def fill() -> Iterator[Filled]:
    """Return what the process without torch answers."""
    with apart() as answers:
        yield answers


@pytest.mark.parametrize(("family", "variant"), VARIANTS)
def test_the_process_without_torch_reads_a_config_alike(
    dense: Dense, fill: Filled, family: str, variant: str
) -> None:
    config = read_config(dense(family, variant) / "config.json")
    assert find_family(config, fill) == find_family(config)


@pytest.mark.parametrize(("family", "variant", "target"), pairs())
def test_a_plan_is_the_same_from_there(
    dense: Dense, fill: Filled, family: str, variant: str, target: str
) -> None:
    changes: dict[str, Any] = {"target__architecture": target, "target__shared_experts": 0}
    here = planned(dense(family, variant), router__measure=False, **changes)
    there = plan_source(here.recipe, here.source, fill=fill)
    assert (there.config, there.steps) == (here.config, here.steps)


@pytest.mark.parametrize(
    "wrong", [{"hidden_size": "wide"}, {"num_attention_heads": 5}, {"rope_parameters": 3}]
)
def test_a_refusal_is_the_same_from_there(
    dense: Dense, fill: Filled, wrong: dict[str, object]
) -> None:
    config = {**read_config(dense() / "config.json"), **wrong}
    with pytest.raises(SourceError) as here:
        filled(config)
    with pytest.raises(SourceError) as there:
        fill(config)
    assert str(there.value) == str(here.value)
    assert str(here.value).startswith("transformers rejects this config.json: ")


def test_a_process_that_does_not_start_is_done_without(
    dense: Dense, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = read_config(dense() / "config.json")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with apart() as answers:
        assert answers(config) == filled(config)
        assert answers(config) == filled(config)


@pytest.mark.parametrize(("family", "variant"), VARIANTS)
def test_names_and_shapes_are_those_of_the_class(dense: Dense, family: str, variant: str) -> None:
    config = read_config(dense(family, variant) / "config.json")
    known = stored(*find_family(config))
    assert known is None or known == stored_shapes(full_config(config))


def test_only_these_families_need_the_class(dense: Dense) -> None:
    bodies = {
        name: stored(*find_family(read_config(dense(name, next(iter(TINY[name]))) / "config.json")))
        for name in FAMILIES
    }
    assert {name for name, known in bodies.items() if known is None} == ASKED


PROGRAM = """
import sys
from moe_convert.cli import app
try:
    app()
except SystemExit as end:
    assert not end.code, end.code
finally:
    print("imported", *sorted({"torch", "transformers"} & sys.modules.keys()))
"""


def imported(*words: str) -> list[str]:
    """Run the command line and return which of the large packages it has imported."""
    argv = [sys.executable, "-c", PROGRAM, *words, "-q"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()[1:]


WEIGHTS_ONLY = ("--no-measure", "--no-verify")


@pytest.mark.parametrize("more", [(), WEIGHTS_ONLY])
def test_a_plan_imports_neither(dense: Dense, more: tuple[str, ...]) -> None:
    assert imported("plan", str(dense()), *more) == []
    assert imported("upcycle", str(dense()), "--dry-run", *more) == []


def test_clones_are_written_without_transformers(dense: Dense, tmp_path: Path) -> None:
    words = (str(dense()), "--target", "mixtral", "-e", "4", "-k", "2", *WEIGHTS_ONLY)
    assert imported("upcycle", *words, "-o", str(tmp_path / "out")) == ["torch"]
    down = "model.layers.0.mlp.down_proj.weight"
    copies = "model.layers.0.block_sparse_moe.experts.{}.w2.weight"
    written = tensors(tmp_path / "out")
    assert {written[copies.format(expert)] for expert in range(4)} == {tensors(dense())[down]}
