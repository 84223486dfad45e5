"""Router initialisers: what they are, and that their logits have the wanted spread."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from moe_convert.checkpoint import open_source, read_folder
from moe_convert.families import find_family
from moe_convert.routers import Router
from moe_convert.streams import DenseStream, sample_ids
from moe_convert.targets import TARGETS
from tests.conftest import Dense
from tests.tiny import NUM_LAYERS, VOCAB_SIZE, pairs
from tests.tools import converted, edit_tensors, load


def rows(folder: Path, target: str = "mixtral") -> list[Any]:
    """Return the router matrices of a folder, layer by layer."""
    refs, name = read_folder(folder), TARGETS[target].router
    return [refs[f"model.layers.{layer}.{name}"].read().float() for layer in range(NUM_LAYERS)]


def logit_stds(folder: Path, source: Path, target: str) -> list[float]:
    """Return the std of each router's logits on the sample text, as the loaded model has them."""
    import torch

    model, seen = load(folder), list[float]()

    def watch(module: Any, args: Any) -> None:
        x_TD = args[0].flatten(0, -2).float()
        seen.append(float((x_TD @ module.weight.float().T).std()))

    for name, router in model.named_modules():
        if name.endswith("." + TARGETS[target].router_module):
            parts = (m for m in router.modules() if getattr(m, "weight", None) is not None)
            if matrix := next((m for m in parts if m.weight.dim() == 2), None):
                matrix.register_forward_pre_hook(watch)
    with torch.no_grad():
        model(sample_ids(source, VOCAB_SIZE))
    return seen


@pytest.mark.parametrize(("model_type", "variant", "target"), pairs())
def test_the_measured_spread_is_the_wanted_one(
    dense: Dense, tmp_path: Path, model_type: str, variant: str, target: str
) -> None:
    source = dense(model_type, variant)
    manifest = converted(
        source, tmp_path / "out", target__architecture=target, router__logit_std=0.7
    )
    stds = logit_stds(tmp_path / "out", source, target)
    assert len(stds) == len(manifest.target.moe_layers)
    assert stds == pytest.approx([0.7] * len(stds), rel=0.1)


@pytest.mark.parametrize("init", ["normal", "orthogonal"])
@pytest.mark.parametrize("std", [0.1, 3.0])
def test_both_random_kinds_can_be_scaled(
    dense: Dense, tmp_path: Path, init: str, std: float
) -> None:
    converted(dense(), tmp_path / "out", router__init=init, router__logit_std=std)
    assert logit_stds(tmp_path / "out", dense(), "mixtral") == pytest.approx([std] * 3, rel=0.1)


def test_zeros_are_zero(dense: Dense, tmp_path: Path) -> None:
    converted(dense(), tmp_path / "out", router__init="zeros")
    assert all(not router_ED.any() for router_ED in rows(tmp_path / "out"))


def test_orthogonal_rows_are_orthogonal(dense: Dense, tmp_path: Path) -> None:
    import torch

    converted(dense(), tmp_path / "out", router__init="orthogonal")
    for router_ED in rows(tmp_path / "out"):
        gram_EE = router_ED @ router_ED.T
        scale = float(gram_EE.diagonal().mean())
        assert scale > 0
        assert torch.allclose(gram_EE / scale, torch.eye(4), atol=1e-5)


def test_auto_is_normal(dense: Dense, tmp_path: Path) -> None:
    import torch

    converted(dense(), tmp_path / "auto", router__init="auto")
    converted(dense(), tmp_path / "normal", router__init="normal")
    for one, two in zip(rows(tmp_path / "auto"), rows(tmp_path / "normal"), strict=True):
        assert torch.equal(one, two)


def test_unmeasured_routers_follow_the_norm(dense: Dense, tmp_path: Path) -> None:
    """Without running anything the spread is right for inputs as strong as the norm makes them."""
    import torch

    source = Path(shutil.copytree(dense(), tmp_path / "source"))
    norms = [f"model.layers.{layer}.post_attention_layernorm.weight" for layer in range(NUM_LAYERS)]
    edit_tensors(source, lambda d: [d[name].mul_(3.0**n) for n, name in enumerate(norms)])
    converted(source, tmp_path / "out", router__measure=False, router__logit_std=0.5)
    refs = read_folder(source)
    for norm, router_ED in zip(norms, rows(tmp_path / "out"), strict=True):
        x_TD = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
        x_TD = x_TD / x_TD.square().mean(-1, keepdim=True).sqrt() * refs[norm].read()
        assert float((x_TD @ router_ED.T).std()) == pytest.approx(0.5, rel=0.1)


def test_measuring_changes_the_scale_and_not_the_direction(dense: Dense, tmp_path: Path) -> None:
    import torch

    converted(dense(), tmp_path / "one", router__measure=True, router__center=False)
    converted(dense(), tmp_path / "two", router__measure=False)
    for one, two in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        assert not torch.equal(one, two)
        assert torch.allclose(one / one.norm(), two / two.norm(), atol=1e-6)


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_rows_depend_on_seed_and_layer_alone(seed: int) -> None:
    import torch

    router = Router(seed=seed)
    torch.manual_seed(99)
    first = router.rows(4, 64, 2)
    torch.manual_seed(98)
    assert torch.equal(first, router.rows(4, 64, 2))
    assert not torch.equal(first, router.rows(4, 64, 1))
    assert not torch.equal(first, Router(seed=seed + 1).rows(4, 64, 2))


@pytest.mark.parametrize(("model_type", "variant", "target"), pairs())
def test_the_stream_sees_what_the_dense_ffn_receives(
    dense: Dense, model_type: str, variant: str, target: str
) -> None:
    """One layer at a time gives the hidden states of the whole model."""
    import torch

    folder = dense(model_type, variant)
    source = open_source(str(folder))
    family, body = find_family(source.config)
    ids_BT = sample_ids(folder, VOCAB_SIZE)
    weights = {name: ref.weight() for name, ref in source.tensors.items()}
    stream = DenseStream(source.config, family, weights, ids_BT)
    whole, received = load(folder), list[Any]()
    for layer in range(body.num_layers):
        ffn = whole.model.layers[layer].get_submodule(family.ffn_module)
        ffn.register_forward_pre_hook(lambda _, args: received.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        whole(ids_BT)
    for layer in range(body.num_layers):
        x_TD = stream.reach(layer)
        assert x_TD.dtype == torch.float32
        assert torch.allclose(x_TD, received[layer], atol=1e-4), layer
