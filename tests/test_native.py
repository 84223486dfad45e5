"""Families whose token mixer only their own sibling has: what the tables cannot show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moe_convert.errors import UnsupportedError
from moe_convert.families.gemma4 import ROWS as GEMMA_ROWS
from moe_convert.ffn import Weight
from moe_convert.streams import DenseStream, sample_ids
from tests.conftest import Dense
from tests.tiny_native import NATIVE
from tests.tools import converted, difference, edit_tensors, load, logits, planned

VARIANTS = [(family, variant) for family, variants in NATIVE.items() for variant in variants]


@pytest.mark.parametrize(("model_type", "variant"), VARIANTS)
def test_the_stream_sees_what_the_model_sends_into_its_ffns(
    dense: Dense, model_type: str, variant: str
) -> None:
    import torch

    folder = dense(model_type, variant)
    plan, model = planned(folder), load(folder)
    family = plan.layout.family
    received: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.get_submodule(family.ffn_module).register_forward_pre_hook(
            lambda _, args: received.append(args[0].flatten(0, -2))
        )
    ids = torch.randint(2, 260, (1, 48), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        model(ids)
    weights = {name: ref.weight() for name, ref in plan.source.tensors.items()}
    stream = DenseStream(plan.source.config, family, weights, ids)
    for layer, expected in enumerate(received):
        assert difference(stream.reach(layer), expected) <= 1e-5


@pytest.mark.parametrize("factor", [1.0, 1e-2, 1e-4])
def test_gemma4_keeps_eps_however_small_the_ffns_output(
    dense: Dense, tmp_path: Path, factor: float
) -> None:
    """With two norms in a row and no more, the smallest of these would differ by more than 1."""
    import shutil

    source, output = tmp_path / "dense", tmp_path / "out"
    shutil.copytree(dense("gemma4_text", "plain"), source)
    edit_tensors(source, lambda tensors: _shrink(tensors, factor))
    converted(source, output)
    assert difference(logits(output), logits(source)) <= 1e-5


def _shrink(tensors: dict[str, Any], factor: float) -> None:
    for name in tensors:
        if name.endswith("mlp.down_proj.weight"):
            tensors[name] *= factor


def test_gemma4s_routers_have_the_spread_that_was_asked_for(dense: Dense, tmp_path: Path) -> None:
    """Their own norm and scale give them what the experts receive."""
    import torch

    output = tmp_path / "out"
    converted(dense("gemma4_text", "plain"), output, router__logit_std=0.25)
    model = load(output)
    spread: list[float] = []
    for layer in model.model.layers:
        layer.router.proj.register_forward_hook(lambda _, __, out: spread.append(float(out.std())))
    with torch.no_grad():
        model(sample_ids(output, model.config.vocab_size))
    assert spread == pytest.approx([0.25] * 3, rel=1e-3)


def test_gemma4s_rows_for_every_token_are_known(dense: Dense) -> None:
    (family,) = GEMMA_ROWS
    tables = planned(dense("gemma4_text", "per_layer_inputs")).source.tensors
    assert set(family.token_tables) <= set(tables)


@pytest.mark.parametrize(
    ("model_type", "variant", "attribute", "value"),
    [
        ("gemma4_text", "per_layer_inputs", "use_double_wide_mlp", True),
        ("qwen3_5_text", "plain", "attn_output_gate", False),
        ("qwen3_5_text", "plain", "output_gate_type", "relu"),
    ],
)
def test_a_value_without_a_place_is_refused_by_name(
    dense: Dense, model_type: str, variant: str, attribute: str, value: object
) -> None:
    with pytest.raises(UnsupportedError, match=attribute):
        planned(dense(model_type, variant, **{attribute: value}))


def test_a_gemma4_that_is_sparse_already_is_refused(dense: Dense) -> None:
    sparse = {"enable_moe_block": True, "num_experts": 2, "top_k_experts": 1}
    with pytest.raises(UnsupportedError, match="enable_moe_block"):
        planned(dense("gemma4_text", "plain", **sparse, moe_intermediate_size=32))


def test_lfm2s_width_is_the_model_classs(dense: Dense) -> None:
    plan = planned(dense("lfm2", "adjusted_width"))
    assert (
        plan.shape.expert_size
        == plan.source.tensors["model.layers.0.feed_forward.w1.weight"].shape[0]
    )
    assert plan.layout.body.ffn_size != plan.source.config["intermediate_size"]


@pytest.mark.parametrize("top_k", [1, 4])
def test_a_split_over_groups_of_latent_attentions_sibling(
    dense: Dense, tmp_path: Path, top_k: int
) -> None:
    source, output = dense("youtu", "plain"), tmp_path / "out"
    groups = {"target__num_groups": 2, "target__top_groups": 2, "target__top_k": top_k}
    converted(source, output, **groups)
    assert difference(logits(output), logits(source)) <= 1e-4


def test_weights_know_whether_arithmetic_rounded_them() -> None:
    """Gemma 4's router scale may round, so bf16 checkpoints stay in bf16."""
    plain = Weight.filled((4,), 1.5, "BF16")
    assert not plain.map(lambda tensor: tensor * 8.0, rounds=False).rounds
