"""Families without a stock home: the modelling file beside the weights keeps the dense function."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moe_convert.checkpoint import read_folder, stored_shapes
from moe_convert.checkpoint.names import full_config
from moe_convert.convert import convert
from moe_convert.errors import SourceError, UnsupportedError, UsageError
from moe_convert.families import FAMILIES
from moe_convert.families.custom import CUSTOM_FAMILIES
from moe_convert.plan import make_plan
from moe_convert.recipe import load_recipe
from moe_convert.targets.custom import CODE, code_file
from moe_convert.verify import verify
from moe_convert.workflow import upcycle, verify_folder
from tests.tiny_custom import CUSTOM_TINY, make_custom
from tests.tools import converted, difference, digest, edit_json, edit_tensors, logits, planned, raw

FP32_TOLERANCE = 1e-4
CASES = [(name, variant) for name, variants in CUSTOM_TINY.items() for variant in variants]
FIRST = [(name, next(iter(variants))) for name, variants in CUSTOM_TINY.items()]
HOMELESS = [name for name in CUSTOM_TINY if name not in FAMILIES]
CUSTOM: dict[str, Any] = {"target__architecture": "custom"}
SPLIT = {
    **CUSTOM,
    "experts__method": "split",
    "experts__strategy": "contiguous",
    "target__top_k": 4,
    "router__init": "zeros",
}

Made = Callable[..., Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Make tiny checkpoints, each once; nobody may write into them."""
    done: dict[tuple[str, ...], Path] = {}

    def make(model_type: str, variant: str | None = None, dtype: str = "float32") -> Path:
        key = (model_type, variant or next(iter(CUSTOM_TINY[model_type])), dtype)
        if key not in done:
            folder = tmp_path_factory.mktemp("-".join(key)) / "dense-model"
            done[key] = make_custom(key[0], key[1], folder, dtype)
        return done[key]

    return make


@pytest.fixture(autouse=True, scope="module")
def _modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the copies that transformers makes of modelling files out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        cache = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", cache)
        patch.syspath_prepend(cache)
        yield


def load(folder: Path, dtype: str = "float32") -> Any:
    """Load a result as its user does; no key may be missing, left over or of another shape."""
    import torch
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), trust_remote_code=True, output_loading_info=True
    )
    wrong = {key: info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    assert not any(wrong.values()), wrong
    return model.eval()


def moe_logits(folder: Path) -> Any:
    """Return what `tools.logits` does, for a result that needs its own code."""
    import torch

    model = load(folder)
    ids = torch.randint(
        model.config.vocab_size, (2, 48), generator=torch.Generator().manual_seed(5)
    )
    with torch.no_grad():
        return model(ids).logits.float()


def test_every_row_has_a_tiny_checkpoint() -> None:
    assert set(CUSTOM_TINY) == set(CUSTOM_FAMILIES)


@pytest.mark.parametrize(("model_type", "variant"), CASES)
def test_clones_compute_the_dense_function(
    made: Made, tmp_path: Path, model_type: str, variant: str
) -> None:
    source = made(model_type, variant)
    manifest = converted(source, tmp_path / "out", **CUSTOM)
    assert manifest.exact
    assert "custom_code" in {note.code for note in manifest.warnings}
    assert difference(moe_logits(tmp_path / "out"), logits(source)) <= FP32_TOLERANCE


@pytest.mark.parametrize(("model_type", "variant"), CASES)
def test_all_parts_of_a_split_sum_to_the_dense_function(
    made: Made, tmp_path: Path, model_type: str, variant: str
) -> None:
    source = made(model_type, variant)
    for name, strategy in (("one", "contiguous"), ("two", "random")):
        converted(source, tmp_path / name, **{**SPLIT, "experts__strategy": strategy})
        assert difference(moe_logits(tmp_path / name), logits(source)) <= FP32_TOLERANCE


@pytest.mark.parametrize(("model_type", "variant"), FIRST)
def test_copies_cut_into_parts_keep_the_function(
    made: Made, tmp_path: Path, model_type: str, variant: str
) -> None:
    source = made(model_type, variant)
    converted(source, tmp_path / "out", **CUSTOM, experts__granularity=2)
    assert difference(moe_logits(tmp_path / "out"), logits(source)) <= FP32_TOLERANCE


@pytest.mark.parametrize(("model_type", "variant"), FIRST)
def test_some_layers_may_stay_dense(
    made: Made, tmp_path: Path, model_type: str, variant: str
) -> None:
    source = made(model_type, variant)
    manifest = converted(source, tmp_path / "out", **SPLIT, target__layers="1")
    assert manifest.target.moe_layers == [1]
    assert difference(moe_logits(tmp_path / "out"), logits(source)) <= FP32_TOLERANCE


@pytest.mark.parametrize(("model_type", "variant"), FIRST)
def test_the_result_is_verified_in_both_dtypes(
    made: Made, tmp_path: Path, model_type: str, variant: str
) -> None:
    source = made(model_type, variant, "bfloat16")
    manifest = upcycle(planned(source, tmp_path / "out", **CUSTOM))
    assert manifest.verify is not None
    assert manifest.state == "verified", manifest.verify.failures
    assert manifest.recipe["target"]["architecture"] == "custom"
    assert manifest.verify.experts_exercised == 1.0
    assert all(0.25 < std < 1.0 for std in manifest.verify.router_logit_std)
    assert manifest.verify.tokenizer_identical
    assert [parity.dtype for parity in manifest.verify.parity] == ["float32", "bfloat16"]
    assert manifest.verify.parity[1].top1_agreement > 0.9


def test_a_written_recipe_makes_the_same_files_and_verifies_again(
    made: Made, tmp_path: Path
) -> None:
    source = made("gpt2")
    upcycle(planned(source, tmp_path / "out", **CUSTOM))
    report, _ = verify_folder(tmp_path / "out", str(source))
    assert report.passed
    changes = {"source.model": str(source), "output.dir": str(tmp_path / "again")}
    convert(make_plan(load_recipe(str(tmp_path / "out" / "recipe.yaml"), changes)))
    assert (
        digest(tmp_path / "again")["model.safetensors"]
        == (digest(tmp_path / "out")["model.safetensors"])
    )


@pytest.mark.parametrize(("model_type", "variant"), FIRST)
def test_without_trust_nothing_is_loaded(
    made: Made, tmp_path: Path, model_type: str, variant: str
) -> None:
    """Neither the dense class with FFNs that no file holds, nor anything else."""
    from transformers import AutoModelForCausalLM

    output = tmp_path / "out"
    converted(made(model_type, variant), output, **CUSTOM)
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModelForCausalLM.from_pretrained(output, trust_remote_code=False)
    edit_json(output / "config.json", lambda c: c.pop("auto_map"))
    with pytest.raises(ValueError, match=f"moe_convert_{model_type}"):
        AutoModelForCausalLM.from_pretrained(output, trust_remote_code=False)


@pytest.mark.parametrize(("model_type", "variant"), FIRST)
def test_clones_are_copied_byte_for_byte(
    made: Made, tmp_path: Path, model_type: str, variant: str
) -> None:
    source = made(model_type, variant, "bfloat16")
    plan = planned(source, tmp_path / "out", **CUSTOM)
    converted(source, tmp_path / "out", **CUSTOM)
    dense = {raw(ref) for ref in read_folder(source).values()}
    written = read_folder(tmp_path / "out")
    computed = {name for name, ref in written.items() if raw(ref) not in dense}
    assert len(computed) == 3
    assert all(name.endswith(".router.weight") for name in computed)
    assert {s.name: s.shape for s in plan.specs} == stored_shapes(full_config(plan.config))


@pytest.mark.parametrize("model_type", HOMELESS)
def test_auto_refuses_with_the_reason_and_the_way_out(made: Made, model_type: str) -> None:
    reason = CUSTOM_FAMILIES[model_type].reason
    with pytest.raises(UnsupportedError, match=f"{reason}.*--target custom"):
        planned(made(model_type))


def test_auto_never_chooses_it_for_a_body_that_fits_nowhere(made: Made) -> None:
    with pytest.raises(UnsupportedError, match=r"olmo3 exactly.*--target custom"):
        planned(made("olmo3"))


def test_a_family_without_a_row_is_refused(made: Made, tmp_path: Path) -> None:
    (tmp_path / "bloom").mkdir()
    for file in made("gpt2").iterdir():
        (tmp_path / "bloom" / file.name).write_bytes(file.read_bytes())
    edit_json(tmp_path / "bloom" / "config.json", lambda c: c.update(model_type="bloom"))
    with pytest.raises(UnsupportedError, match=r"bloom.*gemma2"):
        planned(tmp_path / "bloom", None, **CUSTOM)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target__shared_experts": 1}, "no shared experts"),
        ({"target__num_groups": 2}, "no expert groups"),
        ({"target__max_positions": 64}, "max_positions"),
        ({"experts__method": "shared-residual"}, "not proved"),
        ({"experts__edits": [{"edit": "noise", "std": 0.1}]}, "noise"),
    ],
)
def test_what_cannot_take_effect_is_refused(
    made: Made, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        planned(made("gpt2"), None, **CUSTOM, **changes)


def test_code_that_is_not_ours_is_never_run(made: Made, tmp_path: Path) -> None:
    output, mark = tmp_path / "out", tmp_path / "ran"
    converted(made("phi"), output, **CUSTOM)
    code = (output / CODE).read_text(encoding="utf-8")
    assert code.encode() == code_file().read_bytes()
    with (output / CODE).open("a", encoding="utf-8") as file:
        file.write(f"\nopen({str(mark)!r}, 'w').close()\n")
    with pytest.raises(SourceError, match="no known MoE target"):
        verify(output, None)
    (output / CODE).write_text(code, encoding="utf-8")
    (output / "other.py").write_text(f"open({str(mark)!r}, 'w').close()\n", encoding="utf-8")
    edit_json(
        output / "config.json", lambda c: c["auto_map"].update(AutoModelForCausalLM="other.Model")
    )
    with pytest.raises(SourceError, match="no known MoE target"):
        verify(output, None)
    assert not mark.exists()


def test_older_names_and_buffers_are_understood(made: Made, tmp_path: Path) -> None:
    """The files of GPT-2 have no prefix and hold causal masks; those of Pythia do too."""
    import torch

    for model_type, rename, mask in (
        ("gpt2", lambda name: name.removeprefix("transformer."), "h.0.attn.bias"),
        ("gpt_neox", lambda name: name, "gpt_neox.layers.0.attention.masked_bias"),
    ):
        source, output = tmp_path / model_type, tmp_path / f"{model_type}-out"
        source.mkdir()
        for file in made(model_type).iterdir():
            (source / file.name).write_bytes(file.read_bytes())

        def older(data: dict[str, Any], rename: Any = rename, mask: str = mask) -> None:
            named = {rename(name): tensor for name, tensor in data.items()}
            data.clear()
            data.update(named)
            data[mask] = torch.ones(1)

        edit_tensors(source, older)
        converted(source, output, **CUSTOM)
        assert difference(moe_logits(output), logits(made(model_type))) <= FP32_TOLERANCE


def test_saving_again_keeps_the_code(made: Made, tmp_path: Path) -> None:
    output, again = tmp_path / "out", tmp_path / "again"
    converted(made("gemma2"), output, **CUSTOM)
    load(output).save_pretrained(again)
    assert (again / CODE).read_bytes() == code_file().read_bytes()
    assert json.loads((again / "config.json").read_text())["model_type"] == "moe_convert_gemma2"
    assert difference(moe_logits(again), moe_logits(output)) == 0.0


@pytest.mark.parametrize(("model_type", "rate"), [("gpt2", 0.1), ("starcoder2", 0.0), ("opt", 0)])
def test_every_expert_and_router_learns_and_dropout_comes_once(
    made: Made, tmp_path: Path, model_type: str, rate: float
) -> None:
    import torch

    converted(made(model_type), tmp_path / "out", **CUSTOM)
    model = load(tmp_path / "out")
    moe = [m for m in model.modules() if type(m).__name__ == "Moe"]
    assert [m.dropout.p for m in moe] == [rate] * 3
    inside = [d for m in moe for d in m.experts.modules() if isinstance(d, torch.nn.Dropout)]
    assert not inside
    for parameter in model.parameters():
        parameter.data += 0.01 * torch.randn_like(parameter)
    ids = torch.randint(272, (2, 48), generator=torch.Generator().manual_seed(5))
    model.train()(ids, labels=ids).loss.backward()
    for m in moe:
        for parameter in m.parameters():
            assert parameter.grad is not None
            assert float(parameter.grad.abs().sum()) > 0
