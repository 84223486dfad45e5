"""Cloning in every published form: exact where the mathematics allows it, refused where not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moe_convert.edits import Drop, Noise, Place
from moe_convert.errors import UsageError
from moe_convert.ffn import Ffn, Weight
from moe_convert.targets import TARGETS
from tests.tiny import make_dense, pairs
from tests.tools import converted, difference, logits, planned

TOLERANCE = 1e-4


def without_ties() -> list[tuple[str, str, str]]:
    """Return the pairs whose router can tell equal rows apart."""
    return [pair for pair in pairs() if TARGETS[pair[2]].fixed_top_k is None]


def with_shared() -> list[tuple[str, str, str]]:
    """Return the pairs whose target has a place for a shared expert of any width in units."""
    return [pair for pair in pairs() if TARGETS[pair[2]].shared in {"free", "units", "one"}]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dense("llama", "plain", tmp_path_factory.mktemp("dense"))


@pytest.mark.parametrize("target", ["mixtral", "glm4_moe", "qwen2_moe"])
@pytest.mark.parametrize(("granularity", "top_k"), [(1, 2), (2, 2), (2, 4), (4, 4), (8, 8), (3, 3)])
def test_virtual_groups_keep_the_function(
    dense: Path, tmp_path: Path, target: str, granularity: int, top_k: int
) -> None:
    changes = {
        "target.architecture": target,
        "target.num_experts": 3 * granularity if granularity > 1 else 4,
        "target.top_k": top_k,
        "experts.granularity": granularity,
        "router.logit_std": 2.0,
    }
    converted(dense, tmp_path / "moe", **changes)
    assert difference(logits(dense), logits(tmp_path / "moe")) <= TOLERANCE


@pytest.mark.parametrize("target", ["glm4_moe", "qwen2_moe"])
def test_shuffled_copies_with_a_shared_one_keep_the_function(
    dense: Path, tmp_path: Path, target: str
) -> None:
    changes = {
        "target.architecture": target,
        "target.num_experts": 8,
        "target.top_k": 4,
        "target.shared_experts": 2,
        "experts.granularity": 2,
        "experts.shuffle": True,
    }
    converted(dense, tmp_path / "moe", **changes)
    assert difference(logits(dense), logits(tmp_path / "moe")) <= TOLERANCE


def test_virtual_groups_stay_exact_in_bf16(tmp_path: Path) -> None:
    dense = make_dense(
        "llama", "plain", tmp_path / "dense", dtype="bfloat16", intermediate_size=128
    )
    changes = {"target.num_experts": 16, "target.top_k": 8, "experts.granularity": 8}
    converted(dense, tmp_path / "moe", **changes)
    assert difference(logits(dense), logits(tmp_path / "moe")) <= TOLERANCE


def test_groups_of_whole_copies_keep_the_function(dense: Path, tmp_path: Path) -> None:
    changes = {
        "target.architecture": "glm4_moe",
        "target.num_experts": 16,
        "target.top_k": 4,
        "target.num_groups": 4,
        "target.top_groups": 2,
        "experts.granularity": 4,
        "router.logit_std": 2.0,
    }
    converted(dense, tmp_path / "moe", **changes)
    assert difference(logits(dense), logits(tmp_path / "moe")) <= TOLERANCE


@pytest.mark.parametrize("granularity", [1, 2])
@pytest.mark.parametrize("target", ["glm4_moe", "qwen2_moe"])
def test_shared_residual_is_exact_for_any_top_k(
    dense: Path, tmp_path: Path, target: str, granularity: int
) -> None:
    changes = {
        "target.architecture": target,
        "target.num_experts": 5,
        "target.top_k": 3,
        "experts.method": "shared-residual",
        "experts.granularity": granularity,
    }
    converted(dense, tmp_path / "moe", **changes)
    assert difference(logits(dense), logits(tmp_path / "moe")) <= TOLERANCE


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"experts.granularity": 4, "target.top_k": 2}, "granularity 4"),
        ({"experts.granularity": 5}, "5 equal parts"),
        ({"experts.granularity": 4, "target.num_experts": 6, "target.top_k": 4}, "--experts 6"),
        ({"target.num_groups": 2, "target.architecture": "mixtral"}, "no expert groups"),
        (
            {
                "target.architecture": "glm4_moe",
                "target.num_experts": 8,
                "target.num_groups": 4,
                "target.top_groups": 4,
                "target.top_k": 4,
                "experts.granularity": 4,
            },
            "cut a copy",
        ),
        (
            {
                "target.architecture": "glm4_moe",
                "target.num_experts": 8,
                "target.num_groups": 4,
                "target.top_k": 4,
            },
            "top_groups",
        ),
        ({"experts.method": "shared-residual", "target.architecture": "mixtral"}, "no shared"),
        ({"experts.method": "split", "target.num_experts": 7}, "7 equal experts"),
    ],
)
def test_impossible_counts_are_refused(dense: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        planned(dense, **changes)


def test_noise_has_the_asked_size_and_is_not_called_exact(dense: Path, tmp_path: Path) -> None:
    plan = planned(dense, experts__edits=[{"edit": "noise", "std": 0.01}])
    assert not plan.exact
    weight_NF = torch.randn(400, 300)
    weight = Weight.of(weight_NF, "F32")
    ffn = Ffn(weight, weight, weight)
    noisy = Noise(std=0.1).apply(ffn, Place(0, 1, 2))
    added = [part.load() - weight_NF for part in (noisy.gate_FD, noisy.up_FD, noisy.down_DF)]
    for noise in added:
        assert float(noise.std()) == pytest.approx(0.1 * float(weight_NF.std()), rel=0.02)
    assert not torch.equal(added[0], added[1])
    other = Noise(std=0.1).apply(ffn, Place(0, 1, 3))
    assert not torch.equal(other.gate_FD.load(), noisy.gate_FD.load())


@pytest.mark.parametrize("indices", ["coupled", "independent"])
def test_drop_replaces_its_share_with_the_statistics_of_what_it_replaces(indices: str) -> None:
    rows_ND = torch.randn(200, 500) * 0.3 + 2.0
    ffn = Ffn(Weight.of(rows_ND, "F32"), Weight.of(rows_ND, "F32"), Weight.of(rows_ND.T, "F32"))
    edit = Drop.model_validate({"ratio": 0.25, "indices": indices})
    made = edit.apply(ffn, Place(0, 0, 0))
    changed = [
        (made.gate_FD.load() != rows_ND).any(dim=1),
        (made.up_FD.load() != rows_ND).any(dim=1),
        (rows_ND != made.down_DF.load().T).any(dim=1),
    ]
    assert [int(c.sum()) for c in changed] == [50, 50, 50]
    same = torch.equal(changed[0], changed[1]) and torch.equal(changed[0], changed[2])
    assert same == (indices == "coupled")
    fresh = made.gate_FD.load()[changed[0]]
    assert float(fresh.mean()) == pytest.approx(2.0, abs=0.02)
    assert float(fresh.std()) == pytest.approx(0.3, rel=0.03)


def test_warnings_say_where_training_routers_is_pointless(dense: Path) -> None:
    codes = {note.code for note in planned(dense).warnings}
    assert "equal_experts" in codes
    noisy = planned(dense, experts__edits=[{"edit": "noise", "std": 0.01}])
    assert "equal_experts" not in {note.code for note in noisy.warnings}
    assert "top1_renormalized" in {n.code for n in planned(dense, target__top_k=1).warnings}
    half = planned(dense, experts__edits=[{"edit": "drop", "ratio": 0.5}])
    assert "large_drop" in {note.code for note in half.warnings}


@pytest.mark.parametrize(("model_type", "variant", "target"), without_ties())
def test_virtual_groups_are_exact_on_every_pair(
    tmp_path: Path, model_type: str, variant: str, target: str
) -> None:
    dense = make_dense(model_type, variant, tmp_path / "dense")
    changes = {"target.architecture": target, "experts.granularity": 2, "router.measure": False}
    converted(dense, tmp_path / "moe", **changes)
    assert difference(logits(dense), logits(tmp_path / "moe")) <= TOLERANCE


@pytest.mark.parametrize(("model_type", "variant", "target"), with_shared())
def test_shared_residual_is_exact_on_every_pair(
    tmp_path: Path, model_type: str, variant: str, target: str
) -> None:
    dense = make_dense(model_type, variant, tmp_path / "dense")
    changes = {"target.architecture": target, "experts.method": "shared-residual"}
    converted(dense, tmp_path / "moe", **changes)
    assert difference(logits(dense), logits(tmp_path / "moe")) <= TOLERANCE


def test_a_router_that_ties_refuses_parts_of_a_copy(tmp_path: Path) -> None:
    dense = make_dense("nemotron", "plain", tmp_path / "dense")
    with pytest.raises(UsageError, match="tie"):
        planned(dense, experts__granularity=2)
