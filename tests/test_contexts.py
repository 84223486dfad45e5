"""Ropes, windows and epsilons that a config hides keep the function, or are refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moe_convert.errors import UnsupportedError, UsageError
from tests.conftest import Dense
from tests.tiny import TINY
from tests.tiny_granite import longrope
from tests.tools import converted, difference, logits, planned

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": None,
    "original_max_position_embeddings": 256,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
UNKNOWN = {"rope_type": "default", "rope_theta": 10000.0, "finetuned": True}
NOT_PARTIAL = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "seed_oss",
    "ministral3",
    "internlm3",
    "ernie4_5",
    "helium",
]


def _first(model_type: str) -> str:
    return next(iter(TINY[model_type]))


@pytest.mark.parametrize("rope", [YARN, longrope(16)])
def test_a_scale_that_follows_the_context_survives_a_cut(
    dense: Dense, tmp_path: Path, rope: dict[str, Any]
) -> None:
    source = dense("llama", "plain", rope_parameters=rope)
    converted(source, tmp_path / "out", target__max_positions=64)
    assert difference(logits(tmp_path / "out"), logits(source)) <= 1e-4


@pytest.mark.parametrize("model_type", ["llama", "youtu"])
def test_a_dynamic_rope_refuses_a_cut(dense: Dense, model_type: str) -> None:
    source = dense(
        model_type, _first(model_type), max_position_embeddings=64, rope_parameters=DYNAMIC
    )
    planned(source, target__max_positions=64)
    with pytest.raises(UsageError, match="rope_type='dynamic'"):
        planned(source, target__max_positions=32)


@pytest.mark.parametrize("model_type", NOT_PARTIAL)
def test_a_partial_rotation_that_the_family_ignores_is_refused(
    dense: Dense, model_type: str
) -> None:
    rope = {**TINY["ministral3"]["short"].config["rope_parameters"], "partial_rotary_factor": 0.5}
    source = dense(
        model_type,
        _first(model_type),
        rope_parameters=PARTIAL if model_type != "ministral3" else {**rope, **PARTIAL},
    )
    with pytest.raises(UnsupportedError, match=r"partial_rotary_factor=0\.5"):
        planned(source)


def test_an_unknown_key_of_a_rope_is_refused(dense: Dense) -> None:
    with pytest.raises(UnsupportedError, match="finetuned=True"):
        planned(dense("llama", "plain", rope_parameters=UNKNOWN))


@pytest.mark.parametrize(
    ("model_type", "changes"), [("cohere", {}), ("phi3", {"sliding_window": 40})]
)
def test_sequences_beyond_the_context_keep_the_function(
    dense: Dense, tmp_path: Path, model_type: str, changes: dict[str, Any]
) -> None:
    source = dense(model_type, "plain", max_position_embeddings=32, **changes)
    converted(source, tmp_path / "out")
    assert difference(logits(tmp_path / "out"), logits(source)) <= 1e-4


def test_a_large_epsilon_does_not_fit_beam(dense: Dense) -> None:
    planned(dense("gemma3_text", "plain", rms_norm_eps=1e-5))
    with pytest.raises(UnsupportedError, match=r"rms_norm_eps=0\.001"):
        planned(dense("gemma3_text", "plain", rms_norm_eps=1e-3))


def test_an_untruncated_yarn_is_refused_where_ropes_go_by_layer_type(dense: Dense) -> None:
    yarn = {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 4.0,
        "original_max_position_embeddings": 256,
        "truncate": False,
    }
    source = dense("qwen3", "mixed_windows", rope_parameters=yarn)
    with pytest.raises(UnsupportedError, match="truncate"):
        planned(source, target__architecture="mellum")
