"""Invariants 2 and 7: names and shapes are transformers' own, and no attribute is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moe_convert.checkpoint import open_source, read_folder, stored_shapes
from moe_convert.errors import MoeConvertError, UnsupportedError
from moe_convert.families import FAMILIES, find_family
from moe_convert.targets import TARGETS
from tests.conftest import Dense
from tests.tiny import TINY, cases, pairs
from tests.tools import converted, difference, edit_json, logits, planned

WITH_SHARED = [
    (*case, shared)
    for case in pairs()
    for shared in ((0,) if TARGETS[case[2]].shared == "none" else (0, 1))
]


def moe_config(values: dict[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[values["model_type"]].from_dict(dict(values))


def copy_of(folder: Path, tmp_path: Path) -> Path:
    """Return a folder with the same files by link, but a config.json of its own."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in folder.iterdir():
        if file.name != "config.json":
            (copy / file.name).symlink_to(file)
    (copy / "config.json").write_bytes((folder / "config.json").read_bytes())
    return copy


@pytest.mark.parametrize(("model_type", "variant", "target"), cases())
@pytest.mark.parametrize("compat", [True, False])
def test_the_plan_names_what_transformers_stores(
    dense: Dense, model_type: str, variant: str, target: str, compat: bool
) -> None:
    source = dense(model_type, variant)
    plan = planned(source, target__architecture=target, output__compat=compat)
    expected = stored_shapes(moe_config(dict(plan.config)))
    assert {spec.name: spec.shape for spec in plan.specs} == expected


@pytest.mark.parametrize(("model_type", "variant", "target", "shared"), WITH_SHARED)
def test_the_plan_names_what_save_pretrained_writes(
    dense: Dense, tmp_path: Path, model_type: str, variant: str, target: str, shared: int
) -> None:
    """Shapes and, for a model in fp32, dtypes, read back from the header of a real save."""
    from transformers import AutoModelForCausalLM

    plan = planned(
        dense(model_type, variant), target__architecture=target, target__shared_experts=shared
    )
    AutoModelForCausalLM.from_config(moe_config(dict(plan.config))).save_pretrained(tmp_path)
    saved = read_folder(tmp_path)
    assert {s.name: (s.shape, s.dtype) for s in plan.specs} == {
        name: (ref.shape, ref.dtype) for name, ref in saved.items()
    }


@pytest.mark.parametrize("model_type", list(FAMILIES))
def test_the_family_knows_what_transformers_stores(dense: Dense, model_type: str) -> None:
    """The dense side: FFN names exist in every layer, and the class name is the model type's."""
    source = open_source(str(dense(model_type, next(iter(TINY[model_type])))))
    family, body = find_family(source.config)
    assert source.config["architectures"] == [family.architecture]
    for layer in range(body.num_layers):
        weights = {name: ref.weight() for name, ref in source.tensors.items()}
        ffn = family.ffn(layer, weights, body)
        assert ffn.up_FD.shape == ffn.gate_FD.shape == (body.ffn_size, body.hidden_size)
        assert ffn.down_DF.shape == (body.hidden_size, body.ffn_size)


@pytest.mark.parametrize("target", list(TARGETS))
def test_the_target_row_names_its_class(target: str) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    assert MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[target] == TARGETS[target].architecture


@pytest.mark.parametrize("model_type", list(FAMILIES))
def test_an_unknown_attribute_is_refused_by_name(
    dense: Dense, tmp_path: Path, model_type: str
) -> None:
    folder = copy_of(dense(model_type, next(iter(TINY[model_type]))), tmp_path)
    edit_json(folder / "config.json", lambda c: c.update(embedding_shift=0.5))
    with pytest.raises(UnsupportedError, match="embedding_shift"):
        planned(folder)


@pytest.mark.parametrize("model_type", list(FAMILIES))
def test_every_attribute_of_the_config_class_is_accounted_for(
    dense: Dense, tmp_path: Path, model_type: str
) -> None:
    """Writing every default out into config.json changes nothing."""
    from transformers import AutoConfig

    folder = copy_of(dense(model_type, next(iter(TINY[model_type]))), tmp_path)
    before = planned(folder)
    full = AutoConfig.from_pretrained(folder).to_dict()
    (folder / "config.json").write_text(json.dumps(full), encoding="utf-8")
    assert planned(folder).config == before.config


@pytest.mark.parametrize("attribute", ["mlp_bias", "attention_bias"])
def test_a_bias_is_held_or_refused_with_each_target_and_its_reason(
    dense: Dense, attribute: str
) -> None:
    folder = dense("llama", "plain", **{attribute: True})
    body = find_family(open_source(str(folder)).config)[1]
    unfit = [name for name in FAMILIES["llama"].targets if TARGETS[name].misfits(body)]
    assert {"mixtral", "glm4_moe", "qwen2_moe"} <= set(unfit)
    if len(unfit) < len(FAMILIES["llama"].targets):
        assert list(planned(folder).refused) == unfit
        return
    with pytest.raises(UnsupportedError) as caught:
        planned(folder)
    for target in unfit:
        assert f"{target}: it " in caught.value.message
    assert "bias" in caught.value.message


def test_an_unsupported_family_is_refused_with_the_supported_ones(
    dense: Dense, tmp_path: Path
) -> None:
    folder = copy_of(dense(), tmp_path)
    edit_json(folder / "config.json", lambda c: c.update(model_type="gpt2"))
    with pytest.raises(UnsupportedError, match=r"gpt2.*llama"):
        planned(folder)


def test_an_invalid_value_is_refused(dense: Dense, tmp_path: Path) -> None:
    folder = copy_of(dense(), tmp_path)
    edit_json(folder / "config.json", lambda c: c.update(hidden_size="wide"))
    with pytest.raises(MoeConvertError, match=r"config\.json"):
        planned(folder)


@pytest.mark.parametrize(("model_type", "variant", "target"), pairs())
def test_legacy_keys_mean_the_same(
    dense: Dense, tmp_path: Path, model_type: str, variant: str, target: str
) -> None:
    """The keys of transformers 4 and those of 5 load to the same model, each without the other."""
    output = tmp_path / "out"
    converted(dense(model_type, variant), output, target__architecture=target)
    both = logits(output)
    written = json.loads((output / "config.json").read_text(encoding="utf-8"))
    rope = written["rope_parameters"]
    if "full_attention" in rope:
        pytest.skip("older releases have no rope of its own for every kind of layer")
    assert written["rope_theta"] == rope["rope_theta"]
    assert (written["rope_scaling"] is None) == (rope.get("rope_type", "default") == "default")
    assert written["torch_dtype"] == written["dtype"] == "float32"
    assert written.get("num_local_experts", 4) == written.get("num_experts", 4) == 4
    for dropped in (("rope_theta", "rope_scaling", "torch_dtype"), ("rope_parameters", "dtype")):
        kept = {key: value for key, value in written.items() if key not in dropped}
        (output / "config.json").write_text(json.dumps(kept), encoding="utf-8")
        assert difference(logits(output), both) == 0.0


@pytest.mark.parametrize("variant", ["llama3_rope", "yarn", "linear"])
def test_a_scaled_rope_survives_in_the_old_spelling(
    dense: Dense, tmp_path: Path, variant: str
) -> None:
    output = tmp_path / "out"
    converted(dense("llama", variant), output)
    edit_json(output / "config.json", lambda c: c.pop("rope_parameters"))
    assert difference(logits(output), logits(dense("llama", variant))) <= 1e-4


def test_no_compat_writes_only_the_new_keys(dense: Dense, tmp_path: Path) -> None:
    source, output = dense("llama", "tied"), tmp_path / "out"
    converted(source, output, output__compat=False)
    written = json.loads((output / "config.json").read_text(encoding="utf-8"))
    assert not {"rope_theta", "rope_scaling", "torch_dtype", "num_experts"} & written.keys()
    assert written["tie_word_embeddings"] is True
    assert "lm_head.weight" not in read_folder(output)
    assert difference(logits(output), logits(source)) <= 1e-4
