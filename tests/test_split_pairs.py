"""Splits fitted to data, on every row of the tables: the converted stream is the written model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_convert.errors import UnsupportedError
from moe_convert.targets import TARGETS
from tests import test_wrappers
from tests.conftest import Dense
from tests.test_wrappers import CASES, make_multimodal
from tests.tiny import cases, pairs
from tests.tiny_custom import CUSTOM_TINY, make_custom
from tests.tools import converted, difference, logits, planned

TEXT = "the river and the lower fields were under the water by morning. " * 6
DATA = {"data__seq_len": 32, "data__max_tokens": 96, "runtime__precision": "full"}
SPLIT: dict[str, Any] = {"experts__method": "split", "runtime__device": "cpu", **DATA}
STREAM_TOLERANCE = 1e-8
LOGIT_TOLERANCE = 1e-4


LAYERS_DIFFER = ("mixed", "window", "per_layer", "shared_keys")
"""Parts of the names of variants whose layers are called each in its own way."""
CASES_RUN = pairs() + [
    case
    for case in cases()
    if any(word in case[1] for word in LAYERS_DIFFER) and case not in pairs()
]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


def whole(target: str) -> dict[str, Any]:
    """Return the counts with which every expert is chosen, and routers that are neutral then."""
    fixed = TARGETS[target].fixed_top_k
    counts = {"target__num_experts": fixed or 4, "target__top_k": fixed or 4}
    return counts | {"router__init": "normal" if fixed else "zeros"}


@pytest.mark.parametrize(("model_type", "variant", "target"), CASES_RUN)
def test_the_converted_stream_is_the_dense_one_where_every_expert_is_chosen(
    dense: Dense, tmp_path: Path, text: str, model_type: str, variant: str, target: str
) -> None:
    """Each layer ran through the target's own class, with the tensors that were written."""
    source, output = dense(model_type, variant), tmp_path / "out"
    changes = {"target__architecture": target, "data__train": text, **SPLIT, **whole(target)}
    manifest = converted(source, output, **changes)
    assert difference(logits(output), logits(source)) <= LOGIT_TOLERANCE
    assert manifest.split is not None
    assert manifest.split.layers == manifest.target.moe_layers
    assert max(manifest.split.stream_error) < STREAM_TOLERANCE
    errors = [error for error in manifest.split.layer_error if error is not None]
    assert len(errors) == len(manifest.split.layers)
    assert max(errors) < STREAM_TOLERANCE


@pytest.mark.parametrize("case", list(CASES))
def test_decoders_of_multimodal_models_are_split_alone(
    tmp_path: Path, text: str, case: str
) -> None:
    source, output = make_multimodal(case, tmp_path / "dense"), tmp_path / "out"
    manifest = converted(source, output, data__train=text, **SPLIT, **whole("mixtral"))
    with_image = test_wrappers.logits(output), test_wrappers.logits(source)
    assert difference(*with_image) <= LOGIT_TOLERANCE
    assert manifest.split is not None
    assert max(manifest.split.stream_error) < STREAM_TOLERANCE


@pytest.mark.parametrize("strategy", ["contribution", "weights"])
def test_custom_targets_refuse_what_looks_into_their_ffns(tmp_path: Path, strategy: str) -> None:
    source = make_custom("gpt2", next(iter(CUSTOM_TINY["gpt2"])), tmp_path / "dense")
    for top_k in (2, 4):
        with pytest.raises(UnsupportedError, match=r"gate, up and down.*--strategy contiguous"):
            planned(
                source,
                target__architecture="custom",
                target__top_k=top_k,
                experts__method="split",
                experts__strategy=strategy,
            )


WITH_DENSE: dict[str, tuple[str, Callable[[int], bool]]] = {
    "glm4_moe": ("1:", lambda layer: layer >= 1),
    "qwen2_moe": ("::2", lambda layer: layer % 2 == 0),
}


@pytest.mark.parametrize("target", list(WITH_DENSE))
def test_layers_that_stay_dense_are_run_too(
    dense: Dense, tmp_path: Path, text: str, target: str
) -> None:
    layers, is_moe = WITH_DENSE[target]
    changes = {"target__architecture": target, "target__layers": layers, **whole(target)}
    output = tmp_path / "out"
    manifest = converted(dense(), output, data__train=text, **SPLIT | changes)
    assert difference(logits(output), logits(dense())) <= LOGIT_TOLERANCE
    report = manifest.split
    assert report is not None
    assert report.layers == [0, 1, 2]
    assert max(report.stream_error) < STREAM_TOLERANCE
    fitted = [error is not None for error in report.layer_error]
    assert fitted == [is_moe(layer) for layer in report.layers]
