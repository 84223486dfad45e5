"""What is refused says why, and what is listed says under which condition."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console
from typer.testing import CliRunner

from moe_convert.cli import app
from moe_convert.console import plan_table
from moe_convert.errors import UnsupportedError
from moe_convert.families import FAMILIES, find_family
from moe_convert.families.body import Body
from moe_convert.families.custom import CUSTOM_FAMILIES
from moe_convert.families.refused import ALONE, GROUPS, KNOWN_UNTIL, REFUSED, TARGET_TYPES
from moe_convert.ffn import Weight
from moe_convert.targets import TARGETS
from moe_convert.targets.gemma import scaled_queries, with_open_gate
from moe_convert.targets.granite import with_sinks
from moe_convert.workflow import upcycle
from moe_convert.wrappers import WRAPPERS
from tests.conftest import Dense
from tests.tiny import BASE
from tests.tools import planned, tensors


def shown(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["archs", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("model_type", list(REFUSED))
def test_a_refused_type_has_its_reason_everywhere(model_type: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        find_family({"model_type": model_type})
    assert REFUSED[model_type] in caught.value.message
    assert REFUSED[model_type] in " ".join(shown("show", model_type, "--json").split())


def test_the_tables_do_not_overlap_and_are_listed() -> None:
    wrapped = {row.model_type for row in WRAPPERS}
    assert not REFUSED.keys() & {*FAMILIES, *CUSTOM_FAMILIES, *wrapped}
    listed = json.loads(shown("ls", "--json"))
    assert listed["refused"] == REFUSED
    assert listed["exact"]["llama"] is True
    assert listed["exact"]["ministral3"] == FAMILIES["ministral3"].limit
    assert "refused: " in shown("ls", "--format", "human")


def test_every_causal_model_of_transformers_has_a_row_or_a_reason() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if tuple(map(int, transformers.__version__.split(".")[:2])) > KNOWN_UNTIL:
        pytest.skip(
            f"transformers {transformers.__version__} is newer: NEW TYPES ARE NOT LOOKED AT"
        )
    wrapped = {row.model_type for row in WRAPPERS}
    known = {*FAMILIES, *CUSTOM_FAMILIES, *wrapped, *REFUSED, *TARGET_TYPES}
    assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - known == set()


def test_no_reason_is_stale() -> None:
    from transformers import CONFIG_MAPPING

    assert [name for name in REFUSED if name not in CONFIG_MAPPING] == []
    assert set(TARGET_TYPES) == set(TARGETS) - set(FAMILIES)
    names = [name for _, group in GROUPS for name in group.split()]
    assert len({*names, *ALONE}) == len(names) + len(ALONE) == len(REFUSED)


@pytest.mark.parametrize("model_type", sorted(TARGET_TYPES))
def test_a_target_is_no_source(model_type: str) -> None:
    with pytest.raises(UnsupportedError, match="it is a mixture of experts already"):
        find_family({"model_type": model_type})


@pytest.mark.parametrize("model_type", GROUPS[0][1].split())
def test_a_mixture_has_experts(model_type: str) -> None:
    """What is refused as a mixture says so itself: its config counts experts."""
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[model_type]().get_text_config()
    counts = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    assert max(getattr(config, name, None) or 0 for name in counts) > 1


def test_a_trap_is_shown_with_its_condition() -> None:
    text = shown("show", "qwen2_moe", "--json")
    assert "which are not written (if the body has none, and output.compat" in " ".join(
        text.split()
    )
    assert "heads (if the head size differs from that)" in text


@pytest.mark.parametrize("compat", [True, False])
def test_biases_that_an_engine_expects_are_written_as_zeros(
    dense: Dense, tmp_path: Path, compat: bool
) -> None:
    changes: dict[str, Any] = {"target__architecture": "qwen2_moe", "output__compat": compat}
    plan = planned(dense(), tmp_path / "out", **changes)
    assert any("expects biases" in trap for trap in plan.engines["vLLM"]) != compat
    assert upcycle(plan).state == "verified"
    written = tensors(tmp_path / "out")
    biases = {name: data for name, data in written.items() if name.endswith("_proj.bias")}
    assert len(biases) == (3 * 3 if compat else 0)
    assert not any(any(data) for data in biases.values())
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["qkv_bias"] is compat


def llama(**values: Any) -> dict[str, Any]:
    return {**BASE, "model_type": "llama", **values}


def test_what_smollm2_and_transformers_js_write_is_understood(dense: Dense) -> None:
    extra = {"is_llama_config": True, "rope_interleaved": False}
    written = llama(**extra, **{"transformers.js_config": {"dtype": "q4"}})
    assert find_family(written)[1] == find_family(llama())[1]
    assert planned(dense("llama", "plain", **extra)).target.model_type == "mixtral"
    with pytest.raises(UnsupportedError, match="rope_interleaved=True"):
        find_family(llama(rope_interleaved=True))


def test_the_plan_shows_groups(dense: Dense) -> None:
    plan = planned(
        dense(), target__architecture="glm4_moe", target__num_groups=2, target__top_groups=1
    )
    console = Console(width=200)
    with console.capture() as caught:
        console.print(plan_table(plan))
    assert "in 2 groups of which 1 are used" in caught.get()


def body(**values: Any) -> Body:
    base = find_family(llama())[1]
    return Body(**{**vars(base), **values})


def test_neutral_tensors_beside_a_projection() -> None:
    weight = Weight.of(torch.randn(64, 64), "F32")
    gated = with_open_gate(weight, body())
    assert gated["self_attn.q_proj.weight"] is weight
    assert not gated["self_attn.gate_proj.weight"].load().any()
    assert (torch.sigmoid(gated["self_attn.gate_bias"].load()) == 1).all()
    sinks = with_sinks(weight, body())["self_attn.sinks"].load()
    assert sinks.shape == (4,)
    assert (sinks.exp() == 0).all()


def test_scaled_queries_fold_the_attention_scale() -> None:
    tensor = torch.randn(16)
    scaled = scaled_queries(Weight.of(tensor, "F32"), body(attention_multiplier=0.125))
    assert torch.equal(scaled["self_attn.q_norm.weight"].load(), tensor * 0.5)
