"""Multimodal checkpoints: the text decoder becomes an MoE, the rest stays to the byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from moe_convert.checkpoint import open_source, read_folder, stored_shapes
from moe_convert.checkpoint.names import full_config
from moe_convert.errors import UnsupportedError, UsageError
from moe_convert.verify import verify
from moe_convert.workflow import upcycle
from moe_convert.wrappers import WRAPPERS, image_inputs
from tests.tiny import BASE, make_tokenizer
from tests.tiny_native import CONVOLUTION, GEMMA, LINEAR
from tests.tools import converted, difference, edit_json, edit_tensors, planned, raw

if TYPE_CHECKING:
    import torch

IMAGE, VIDEO = 270, 271
IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
    "initializer_range": 0.1,
}
QWEN_IDS = {**IDS, "vision_start_token_id": 268, "vision_end_token_id": 269}
MULTIMODAL_ROPE = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "mrope_section": [3, 3, 2],
    "mrope_interleaved": True,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.1,
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_5": (
        "qwen3_5",
        {
            **QWEN_IDS,
            "text_config": {
                **LINEAR,
                "rope_parameters": {**MULTIMODAL_ROPE, "partial_rotary_factor": 0.5},
            },
            "vision_config": QWEN_VISION,
        },
    ),
    "qwen3_5-tied": (
        "qwen3_5",
        {
            **QWEN_IDS,
            "tie_word_embeddings": True,
            "text_config": {**LINEAR, "tie_word_embeddings": True},
            "vision_config": QWEN_VISION,
        },
    ),
    "qwen3_vl": (
        "qwen3_vl",
        {
            **QWEN_IDS,
            "text_config": {"head_dim": 16, "rope_parameters": MULTIMODAL_ROPE},
            "vision_config": {**QWEN_VISION, "deepstack_visual_indexes": [0, 1]},
        },
    ),
    "gemma4": (
        "gemma4",
        {
            **IDS,
            "boi_token_id": 268,
            "eoi_token_id": 269,
            "audio_token_id": 267,
            "boa_token_id": 266,
            "eoa_token_index": 265,
            "text_config": {**GEMMA, "use_bidirectional_attention": "vision"},
            "vision_config": {
                **VISION,
                "head_dim": 16,
                "num_key_value_heads": 2,
                "patch_size": 4,
                "position_embedding_size": 32,
            },
        },
    ),
    "internvl-qwen3": (
        "internvl",
        {
            "image_token_id": IMAGE,
            "image_seq_length": 4,
            "text_config": {"model_type": "qwen3", "head_dim": 16},
            "vision_config": {**VISION, "image_size": [16, 16], "patch_size": [4, 4]},
        },
    ),
    "internvl-qwen2": (
        "internvl",
        {
            "image_token_id": IMAGE,
            "image_seq_length": 4,
            "text_config": {"model_type": "qwen2"},
            "vision_config": {**VISION, "image_size": [16, 16], "patch_size": [4, 4]},
        },
    ),
    "mistral3-mistral": (
        "mistral3",
        {
            "image_token_index": IMAGE,
            "spatial_merge_size": 2,
            "text_config": {"model_type": "mistral", "head_dim": 16, "sliding_window": None},
            "vision_config": {**VISION, "model_type": "pixtral", "image_size": 32, "patch_size": 4},
        },
    ),
    "mistral3-ministral3": (
        "mistral3",
        {
            "image_token_index": IMAGE,
            "spatial_merge_size": 2,
            "text_config": {
                "model_type": "ministral3",
                "head_dim": 16,
                "rope_parameters": {
                    "rope_type": "yarn",
                    "rope_theta": 10000.0,
                    "factor": 4.0,
                    "original_max_position_embeddings": 1024,
                    "llama_4_scaling_beta": 0.1,
                },
            },
            "vision_config": {**VISION, "model_type": "pixtral", "image_size": 32, "patch_size": 4},
        },
    ),
    "lfm2_vl": (
        "lfm2_vl",
        {
            "image_token_id": IMAGE,
            "projector_hidden_size": 48,
            "text_config": {**CONVOLUTION, "model_type": "lfm2"},
            "vision_config": {**VISION, "patch_size": 4, "num_patches": 64},
        },
    ),
}
SPLIT = {
    "experts__method": "split",
    "experts__strategy": "contiguous",
    "target__top_k": 4,
    "router__init": "zeros",
}


def make_multimodal(case: str, folder: Path, dtype: str = "float32") -> Path:
    """Save a random multimodal checkpoint with tokenizer and processor files."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

    model_type, changes = CASES[case]
    text = {**BASE, **changes["text_config"]}
    config = CONFIG_MAPPING[model_type](**{**changes, "text_config": text})
    torch.manual_seed(7)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                around = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                parameter.copy_(around + 0.1 * torch.randn_like(parameter))
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    make_tokenizer(folder)
    (folder / "preprocessor_config.json").write_text('{"do_resize": false}\n', encoding="utf-8")
    (folder / "processor_config.json").write_text('{"image_seq_length": 4}\n', encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Make tiny multimodal checkpoints, each once; nobody may write into them."""
    made: dict[str, Path] = {}

    def make(case: str, dtype: str = "float32") -> Path:
        key = f"{case}-{dtype}"
        if key not in made:
            made[key] = make_multimodal(case, tmp_path_factory.mktemp(key) / "dense", dtype)
        return made[key]

    return make


def load(folder: Path, dtype: str = "float32") -> Any:
    import torch
    from transformers import AutoModelForImageTextToText

    model, info = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=getattr(torch, dtype), output_loading_info=True
    )
    wrong = {key: info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    assert not any(wrong.values()), wrong
    return model.eval()


def logits(folder: Path) -> torch.Tensor:
    """Return the logits of a text and of a prompt with an image, one below the other."""
    import torch

    model = load(folder)
    ids = torch.randint(2, 260, (1, 48), generator=torch.Generator().manual_seed(5))
    image = image_inputs(model.config)
    assert image is not None
    with torch.no_grad():
        kinds = (model(input_ids=ids), model(**image))
    return torch.cat([kind.logits[0].float() for kind in kinds])


def test_every_text_decoder_of_the_table_has_a_case() -> None:
    cases = {(t, c["text_config"].get("model_type", f"{t}_text")) for t, c in CASES.values()}
    assert cases == {(row.model_type, inner) for row in WRAPPERS for inner in row.texts}


def test_the_rows_name_the_classes_of_transformers() -> None:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as NAMES,
    )

    assert {row.moe_type: row.architecture for row in WRAPPERS} == {
        row.moe_type: NAMES[row.moe_type] for row in WRAPPERS
    }


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("recipe", [{}, SPLIT], ids=["clone", "split"])
def test_text_and_image_logits_are_the_dense_models(
    multimodal: Any, tmp_path: Path, case: str, recipe: dict[str, Any]
) -> None:
    source = multimodal(case)
    converted(source, tmp_path / "out", **recipe)
    assert difference(logits(tmp_path / "out"), logits(source)) <= 1e-4


@pytest.mark.parametrize("case", list(CASES))
def test_the_image_matters(multimodal: Any, case: str) -> None:
    """Otherwise the comparison with an image would prove nothing about the tower."""
    import torch

    model = load(multimodal(case))
    image = image_inputs(model.config)
    assert image is not None
    with torch.no_grad():
        one = model(**image).logits
        other = model(**{**image, "pixel_values": 1 - image["pixel_values"]}).logits
    assert difference(one, other) > 1e-3


@pytest.mark.parametrize("case", list(CASES))
def test_what_is_around_goes_through_to_the_byte(
    multimodal: Any, tmp_path: Path, case: str
) -> None:
    source, output = multimodal(case, "bfloat16"), tmp_path / "out"
    converted(source, output, target__dtype="fp32")
    before, after = read_folder(source), read_folder(output)
    around = [n for n in before if "language_model" not in n and not n.endswith("lm_head.weight")]
    assert len(around) > 10
    for name in around:
        assert (after[name].dtype, raw(after[name])) == ("BF16", raw(before[name]))
    old, new = (json.loads((f / "config.json").read_text("utf-8")) for f in (source, output))
    old["vision_config"].pop("model_type")
    new["vision_config"].pop("model_type")
    assert new["vision_config"] == old["vision_config"]
    for file in ("preprocessor_config.json", "processor_config.json", "tokenizer.json"):
        assert (output / file).read_bytes() == (source / file).read_bytes()


@pytest.mark.parametrize("case", list(CASES))
def test_the_plan_names_what_transformers_stores(multimodal: Any, case: str) -> None:
    for compat in (True, False):
        plan = planned(multimodal(case), output__compat=compat)
        expected = stored_shapes(full_config(plan.config))
        assert {spec.name: spec.shape for spec in plan.specs} == expected
    (note,) = [note.message for note in plan.warnings if note.code == "multimodal"]
    row = next(row for row in WRAPPERS if row.model_type == CASES[case][0])
    assert f"becomes a {row.moe_type}" in note
    assert plan.config["model_type"] == row.moe_type
    assert plan.config["architectures"] == [row.architecture]


@pytest.mark.parametrize("case", list(CASES))
def test_verify_compares_the_whole(multimodal: Any, tmp_path: Path, case: str) -> None:
    source, output = multimodal(case), tmp_path / "out"
    converted(source, output)
    report = verify(output, open_source(str(source)), parity=True)
    assert report.failures == []
    edit_tensors(output, lambda tensors: _swap_first_of_the_tower(tensors))
    assert verify(output, open_source(str(source)), parity=True).failures


def _swap_first_of_the_tower(tensors: dict[str, torch.Tensor]) -> None:
    name = next(n for n in sorted(tensors) if "patch" in n and n.endswith("weight"))
    tensors[name] = tensors[name].flip(0).contiguous()


@pytest.mark.parametrize("case", ["qwen3_5", "gemma4"])
def test_bf16_is_verified_in_both_dtypes(multimodal: Any, tmp_path: Path, case: str) -> None:
    source, output = multimodal(case, "bfloat16"), tmp_path / "out"
    converted(source, output)
    report = verify(output, open_source(str(source)), parity=True)
    assert report.failures == []
    assert [parity.dtype for parity in report.parity] == ["float32", "bfloat16"]


def test_tensors_that_are_wider_than_the_rest_stay_so(multimodal: Any, tmp_path: Path) -> None:
    """Qwen3.5 keeps the decay of its linear attention in fp32."""
    import shutil

    source, output = tmp_path / "dense", tmp_path / "out"
    shutil.copytree(multimodal("qwen3_5", "bfloat16"), source)
    name = "model.language_model.layers.0.linear_attn.A_log"
    edit_tensors(source, lambda t: t.update({name: t[name].float() * 1.0001}))
    wide = converted(source, output).target.float32
    before, after = read_folder(source)[name], read_folder(output)[name]
    assert (after.dtype, raw(after)) == ("F32", raw(before))
    assert wide == [name]
    assert verify(output, open_source(str(source)), parity=True, wide=wide).failures == []


def test_a_draft_head_is_left_out(multimodal: Any, tmp_path: Path) -> None:
    import shutil

    import torch

    source, output = tmp_path / "dense", tmp_path / "out"
    shutil.copytree(multimodal("qwen3_5"), source)
    edit_tensors(source, lambda t: t.update({"mtp.fc.weight": torch.ones(4, 4)}))
    edit_json(source / "config.json", lambda c: c["text_config"].update(mtp_num_hidden_layers=1))
    plan = planned(source, output)
    assert "unused" in {note.code for note in plan.warnings}
    converted(source, output)
    assert not [name for name in read_folder(output) if name.startswith("mtp.")]
    assert difference(logits(output), logits(source)) <= 1e-4


def test_256_experts_with_a_shared_one(multimodal: Any, tmp_path: Path) -> None:
    """The shape of Qwen3.6-35B-A3B."""
    source, output = multimodal("qwen3_5"), tmp_path / "out"
    shape = {"target__num_experts": 256, "target__top_k": 8, "target__shared_experts": 1}
    converted(source, output, **shape)
    assert difference(logits(output), logits(source)) <= 1e-4


def test_the_text_targets_name_is_refused_with_the_right_one(multimodal: Any) -> None:
    with pytest.raises((UnsupportedError, UsageError), match="qwen3_5_moe"):
        planned(multimodal("qwen3_5"), target__architecture="qwen3_moe")
    assert (
        planned(multimodal("qwen3_5"), target__architecture="qwen3_5_moe").target.model_type
        == "qwen3_5_moe"
    )


def test_a_sibling_with_another_function_is_refused(tmp_path: Path) -> None:
    from transformers import Glm4vConfig

    Glm4vConfig(text_config=BASE).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(
        (2).to_bytes(8, "little") + b"{}",
    )
    with pytest.raises(UnsupportedError, match=r"glm4v.*normalises the output"):
        planned(tmp_path)


def test_upcycle_verifies_a_multimodal_checkpoint(multimodal: Any, tmp_path: Path) -> None:
    manifest = upcycle(planned(multimodal("qwen3_5"), tmp_path / "out"))
    assert manifest.state == "verified"
    assert manifest.target.architecture == "qwen3_5_moe"
    assert manifest.verify is not None
    assert manifest.verify.router_logit_std == pytest.approx([0.5] * 3, rel=0.3)


def test_old_keys_keep_the_multimodal_rope(multimodal: Any, tmp_path: Path) -> None:
    source, output = multimodal("qwen3_vl"), tmp_path / "out"
    converted(source, output)
    edit_json(output / "config.json", lambda c: c["text_config"].pop("rope_parameters"))
    text = json.loads((output / "config.json").read_text(encoding="utf-8"))["text_config"]
    assert text["rope_scaling"]["mrope_section"] == MULTIMODAL_ROPE["mrope_section"]
    assert difference(logits(output), logits(source)) <= 1e-4
