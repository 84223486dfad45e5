"""The model card: what it says is in the manifest, and what changes it is noticed."""

from __future__ import annotations

import json
import logging
import re
import shutil
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, ModelCardData

from moe_convert.card import CARD_NAME, PICTURE_NAME, check_card, metadata, render, write_card
from moe_convert.card.facts import is_multimodal
from moe_convert.checkpoint import sha256_of
from moe_convert.console import manifest_sections
from moe_convert.experts import METHODS
from moe_convert.manifest import (
    CalibrationReport,
    Manifest,
    Measured,
    SourceInfo,
    load_manifest,
)
from moe_convert.provenance import license_conflict, license_of
from moe_convert.targets import TARGETS
from moe_convert.workflow import upcycle, verify_folder
from moe_convert.wrappers import WRAPPERS
from tests.conftest import Dense
from tests.test_cli import invoke
from tests.tiny_gguf import dense_of, write_gguf
from tests.tools import converted, digest, edit_tensors, planned

SOURCE_CARD = """---
license: other
license_name: river
license_link: LICENSE
language:
- en
- de
---
# The card of the dense model
"""
HUB = {"id": "org/dense", "revision": "main", "sha": "0" * 40}


@pytest.fixture
def carded(finished: Path, tmp_path: Path) -> Path:
    """Return a copy of a finished folder that a test may change."""
    return Path(shutil.copytree(finished, tmp_path / "my-moe"))


def data_of(folder: Path) -> ModelCardData:
    data = ModelCard.load(folder / CARD_NAME).data
    assert isinstance(data, ModelCardData)
    return data


def changed(manifest: Manifest, **source: Any) -> Manifest:
    """Return the manifest with another source."""
    return manifest.model_copy(update={"source": manifest.source.model_copy(update=source)})


def another(manifest: Manifest, **changes: Any) -> SourceInfo:
    return manifest.source.model_copy(update={"id": "org/other", "sha": "1" * 40, **changes})


def recipe_with(manifest: Manifest, section: str, **values: Any) -> dict[str, Any]:
    return {**manifest.recipe, section: {**manifest.recipe[section], **values}}


def test_upcycle_writes_a_card_that_passes_its_check(finished: Path) -> None:
    found = check_card(finished)
    assert found.problems == []
    sections = manifest_sections(load_manifest(finished), finished)
    assert sections["artifacts"]["card"] == str(finished / CARD_NAME)
    text = (finished / CARD_NAME).read_text(encoding="utf-8")
    assert "**Nothing was trained" in text
    assert "needed" not in text.lower()
    assert "arxiv.org/abs/2212.05055" in text
    assert not re.search(r"\n\n\n|None|\{\{|\{%| $", text)


def test_the_card_is_in_no_list_that_it_would_make_stale(finished: Path) -> None:
    files = {file.path for file in load_manifest(finished).target.files}
    assert files.isdisjoint({CARD_NAME, PICTURE_NAME})
    report, _ = verify_folder(finished, None)
    assert report.passed
    assert check_card(finished).problems == []


def test_no_card_where_none_is_wanted(dense: Dense, tmp_path: Path) -> None:
    upcycle(planned(dense(), tmp_path / "out", output__card=False, verify__enabled=False))
    assert not (tmp_path / "out" / CARD_NAME).exists()
    assert "there is no README.md" in check_card(tmp_path / "out").problems[0]


def test_a_failed_check_is_told(finished: Path) -> None:
    manifest = load_manifest(finished)
    assert manifest.verify is not None
    manifest.verify.passed, manifest.verify.failures = False, ["logits differ by 3.1"]
    text = render(manifest, "x", picture=False)
    assert "should compute the function of the dense model, and its check failed" in text
    assert "**The check of the written files failed: logits differ by 3.1.**" in text
    assert "as good as the source" not in text


def test_the_metadata_holds_measured_values_only(finished: Path) -> None:
    manifest, data = load_manifest(finished), data_of(finished)
    assert manifest.verify is not None
    (parity,) = manifest.verify.parity
    values = {one.metric_type: one.metric_value for one in data.eval_results or ()}
    assert values == {
        "kl_divergence": parity.kl,
        "top1_agreement": parity.top1_agreement,
        "perplexity_ratio": parity.ppl_ratio,
    }
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert {"moe", "mixture-of-experts", "moe-convert", "sparse-upcycling"} <= set(data.tags or ())
    unmeasured = metadata(manifest.model_copy(update={"verify": None}), "x")
    assert unmeasured.eval_results is None
    text = render(manifest.model_copy(update={"verify": None}), "x", picture=False)
    assert "model-index" not in text
    assert "KL" not in text
    assert "not loaded and compared" in text


def test_the_licence_and_the_languages_are_the_sources(dense: Dense, tmp_path: Path) -> None:
    source = Path(shutil.copytree(dense(), tmp_path / "source"))
    (source / CARD_NAME).write_text(SOURCE_CARD, encoding="utf-8")
    output = tmp_path / "out"
    manifest = upcycle(planned(source, output))
    data = data_of(output)
    assert (data.license, data.license_name, data.license_link) == ("other", "river", "LICENSE")
    assert data.language == ["en", "de"]
    assert (output / "LICENSE").read_bytes() == (source / "LICENSE").read_bytes()
    assert "The card of the dense model" not in (output / CARD_NAME).read_text(encoding="utf-8")
    assert (source / CARD_NAME).read_text(encoding="utf-8") == SOURCE_CARD
    assert license_conflict(manifest) == ""


def test_the_licence_of_a_gguf_file_is_in_its_header(tmp_path: Path) -> None:
    dense = dense_of("llama", tmp_path / "dense")
    file = write_gguf("llama", dense, tmp_path / "tiny.gguf", license="mit")
    output = tmp_path / "out"
    manifest = upcycle(planned(file, output, verify__enabled=False))
    assert data_of(output).license == "mit"
    assert (manifest.source.sha, manifest.source.files) == (sha256_of(file), {})
    assert f"`tiny.gguf` (SHA-256 `{sha256_of(file)}`)" in (output / CARD_NAME).read_text("utf-8")


def test_a_source_card_that_is_not_yaml_is_no_error(dense: Dense, tmp_path: Path) -> None:
    source = Path(shutil.copytree(dense(), tmp_path / "source"))
    (source / CARD_NAME).write_text("---\nlicense: [mit\n---\n", encoding="utf-8")
    assert converted(source, tmp_path / "out").source.license is None


def test_licences_that_differ_are_left_out(finished: Path) -> None:
    manifest = changed(load_manifest(finished), license="mit")
    assert license_of(manifest) is not None
    both = manifest.model_copy(update={"expert_sources": [another(manifest, license="gpl-3.0")]})
    assert license_of(both) is None
    assert "mit and gpl-3.0" in license_conflict(both)
    assert metadata(both, "x").license is None
    given = both.model_copy(update={"recipe": recipe_with(both, "output", license="apache-2.0")})
    assert license_conflict(given) == ""
    assert metadata(given, "x").license == "apache-2.0"


def test_composing_under_two_licences_is_warned_of(dense: Dense, tmp_path: Path) -> None:
    folders = []
    for licence in ("mit", "gpl-3.0"):
        folders.append(Path(shutil.copytree(dense(), tmp_path / licence)))
        card = f"---\nlicense: {licence}\n---\n"
        (folders[-1] / CARD_NAME).write_text(card, encoding="utf-8")
    sources = [{"model": str(folder)} for folder in folders]
    changes: dict[str, Any] = {"experts__method": "compose", "experts__sources": sources}
    changes["target__num_experts"] = 2
    told = [note.message for note in planned(folders[0], **changes).warnings]
    assert any("different licences, gpl-3.0 and mit" in message for message in told)
    given = planned(folders[0], **changes, output__license="apache-2.0").warnings
    assert "licences" not in {note.code for note in given}
    upcycle(planned(folders[0], tmp_path / "out", verify__enabled=False, **changes))
    assert data_of(tmp_path / "out").license is None


def test_base_models_are_those_of_the_hub(finished: Path) -> None:
    local = load_manifest(finished)
    assert metadata(local, "x").base_model is None
    hub = changed(local, **HUB)
    assert metadata(hub, "x").base_model == "org/dense"
    assert metadata(hub, "x").get("base_model_relation") == "finetune"
    same = hub.model_copy(update={"expert_sources": [hub.source, hub.source]})
    assert metadata(same, "x").get("base_model_relation") == "finetune"
    two = hub.model_copy(update={"expert_sources": [hub.source, another(hub)]})
    assert metadata(two, "x").base_model == ["org/dense", "org/other"]
    assert metadata(two, "x").get("base_model_relation") == "merge"
    text = render(hub, "me/mine", picture=False)
    assert f"[org/dense](https://huggingface.co/org/dense) at commit `{'0' * 40}`" in text
    assert 'from_pretrained("me/mine")' in text
    get = "hf download me/mine moe_convert.json recipe.yaml --local-dir mine\n"
    assert f"```bash\n{get}moe-convert reproduce mine\n```" in text
    assert "hf download" not in render(hub, "mine", picture=False)


def test_data_sets_of_the_hub_are_named(finished: Path) -> None:
    manifest = load_manifest(finished)
    assert metadata(manifest, "x").datasets is None
    for train, expected in (("org/text", ["org/text"]), ("corpus.txt", None)):
        recipe = recipe_with(manifest, "data", train=train)
        assert metadata(manifest.model_copy(update={"recipe": recipe}), "x").datasets == expected


@pytest.mark.parametrize("name", [*TARGETS, *(row.moe_type for row in WRAPPERS)])
def test_the_task_follows_from_the_target(finished: Path, name: str) -> None:
    manifest = load_manifest(finished)
    target = manifest.target.model_copy(update={"architecture": name})
    manifest = manifest.model_copy(update={"target": target})
    assert is_multimodal(manifest) == (name not in TARGETS)
    text = render(manifest, "x", picture=False)
    assert ("AutoModelForImageTextToText" in text) == (name not in TARGETS)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "compose"])
def test_every_method_has_a_card(dense: Dense, tmp_path: Path, method: str) -> None:
    target = "qwen2_moe" if method == "shared-residual" else "mixtral"
    changes: dict[str, Any] = {"experts__method": method, "target__architecture": target}
    if method == "split":
        changes |= {"target__top_k": 4, "experts__strategy": "contiguous"}
    upcycle(planned(dense(), tmp_path / "out", verify__enabled=False, **changes))
    assert check_card(tmp_path / "out").problems == []
    assert f"`{method}`" in (tmp_path / "out" / CARD_NAME).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("router", "edits", "told"),
    [
        ("distill", [], "**The routers were fitted layer by layer"),
        ("mean-gate", [{"edit": "refit"}], "**The experts were fitted layer by layer"),
        ("mean-gate", [], "**Nothing was trained: neither experts, nor routers"),
    ],
)
def test_what_a_split_fits_to_text_is_told(
    finished: Path, router: str, edits: list[dict[str, Any]], told: str
) -> None:
    manifest = load_manifest(finished)
    experts = {"method": "split", "strategy": "contribution", "edits": edits}
    recipe = manifest.recipe | {"experts": experts, "router": {"init": router}}
    manifest = manifest.model_copy(update={"recipe": recipe})
    assert told in render(manifest, "x", picture=False)


def test_edits_and_what_was_composed_are_told(dense: Dense, tmp_path: Path) -> None:
    other = Path(shutil.copytree(dense(), tmp_path / "tuned"))
    edit_tensors(other, lambda data: data["model.layers.0.mlp.up_proj.weight"].mul_(1.5))
    sources, output = [{"model": str(dense())}, {"model": str(other)}], tmp_path / "out"
    edits = [{"edit": "drop", "ratio": 0.25}]
    changes = {"experts.method": "compose", "experts.sources": sources, "experts.edits": edits}
    upcycle(planned(dense(), output, verify__enabled=False, target__num_experts=2, **changes))
    text = (output / CARD_NAME).read_text(encoding="utf-8")
    assert "`drop ratio=0.25`" in text
    assert "arxiv.org/abs/2502.19261" in text
    assert "made from `dense-model` and `tuned`" in text
    assert "--source PATH --source-expert PATH --source-expert PATH" in text
    assert {"drop-upcycling", "merge"} <= set(data_of(output).tags or ())


def test_engines_are_told_with_their_traps(dense: Dense, tmp_path: Path) -> None:
    plain = planned(dense(), tmp_path / "mixtral", verify__enabled=False)
    upcycle(plain)
    text = (tmp_path / "mixtral" / CARD_NAME).read_text(encoding="utf-8")
    assert "vllm serve mixtral`; no known trap" in text
    assert "convert_hf_to_gguf.py mixtral" in text
    manifest = load_manifest(tmp_path / "mixtral")
    target = planned(dense(), tmp_path / "q", target__architecture="qwen2_moe")
    manifest.engines = {name: list(notes) for name, notes in target.engines.items()}
    text = render(manifest, "q", picture=False)
    for note in manifest.engines["llama.cpp"]:
        assert note in text
    manifest.engines = {"vLLM": ["does not register this architecture"]}
    text = render(manifest, "q", picture=False)
    assert "vLLM does not register this architecture" in text
    assert "vllm serve" not in text


def calibrated(manifest: Manifest) -> None:
    """Add what a calibration reports."""
    before = Measured(
        tokens=512,
        dense_perplexity=20.0,
        perplexity=80.0,
        kl=1.5,
        top1_agreement=0.5,
        max_violation=1.25,
        dead_experts=2,
        num_experts=12,
        routing_value=0.5,
        load=[[0.7, 0.1, 0.1, 0.1]] * 3,
    )
    after = before.model_copy(update={"perplexity": 25.0, "kl": 0.25, "dead_experts": 0})
    manifest.exact = False
    manifest.calibration = CalibrationReport(
        steps=8,
        tokens=4096,
        loss_first=2.0,
        loss_last=1.0,
        trained=["router", "experts"],
        trained_params=1_500_000,
        objective={"distill": 1.0, "aux": 0.01},
        data="corpus.txt",
        num_processes=1,
        before=before,
        after=after,
    )


def test_what_was_trained_is_told_with_what_it_gave(finished: Path, dense: Dense) -> None:
    manifest = load_manifest(finished)
    calibrated(manifest)
    text = render(manifest, "x", picture=False)
    assert "**Trained: routers and experts (1.5 M parameters), 8 steps of 4096 tokens" in text
    assert "loss 1 distill + 0.01 aux. Not trained: everything else" in text
    assert "from 80 to 25; that of the dense model is 20" in text
    assert "| perplexity, held-out text (corpus.txt) | 20 | 25 |" in text
    assert "2.25 times its fair share and 0 of 12" in text
    assert "(float32, before training)" in text
    values = {
        (one.dataset_type, one.metric_type): one.metric_value
        for one in metadata(manifest, "x").eval_results or ()
    }
    assert values["held-out", "perplexity"] == 25.0
    assert values["held-out", "kl_divergence"] == 0.25
    assert manifest.verify is not None
    manifest.verify.calibrated = True
    assert "before training" not in render(manifest, "x", picture=False)
    assert manifest.calibration is not None
    manifest.calibration.trained = ["all"]
    manifest.calibration.failures = ["perplexity is too high"]
    text = render(manifest, "x", picture=False)
    assert "**Trained: everything (1.5 M" in text
    assert "Not trained" not in text
    assert "**A quality gate was missed: perplexity is too high.**" in text


def test_an_edited_card_is_kept(carded: Path) -> None:
    path = carded / CARD_NAME
    path.write_text(path.read_text(encoding="utf-8") + "\nMine.\n", encoding="utf-8")
    before = digest(carded)
    result = invoke("card", carded)
    assert result.exit_code == 7
    assert "--overwrite" in result.stderr
    assert digest(carded) == before
    verify_folder(carded, None)
    assert "Mine." in path.read_text(encoding="utf-8")
    assert check_card(carded).problems == []
    assert "edited by hand" in " ".join(check_card(carded).notes)
    assert invoke("card", carded, "--overwrite", "-q").stdout.strip() == str(path)
    assert "Mine." not in path.read_text(encoding="utf-8")


def test_a_readme_of_somebody_else_is_never_taken_for_ours(carded: Path) -> None:
    manifest = load_manifest(carded)
    manifest.card_sha256 = None
    manifest.save(carded)
    assert invoke("card", carded).exit_code == 7


def test_the_card_follows_a_new_verification(carded: Path, dense: Dense) -> None:
    verify_folder(carded, str(dense()))
    first = (carded / CARD_NAME).read_text(encoding="utf-8")
    assert check_card(carded).problems == []
    manifest = load_manifest(carded)
    assert manifest.verify is not None
    manifest.verify.parity[0].kl = 0.125
    manifest.save(carded)
    problems = " ".join(check_card(carded).problems)
    assert "0.125 measured" in problems
    assert "older than the manifest" in problems
    write_card(carded, manifest)
    assert (carded / CARD_NAME).read_text(encoding="utf-8") != first
    assert check_card(carded).problems == []


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("## Limits", "## Limits\n\n[More Information Needed]", "More Information Needed"),
        ("## Limits", "## Limits\n\n[paper](paper.pdf)", "links to paper.pdf"),
        ("## Limits", "hf_" + "abcDEF0123456789abcDEF", "Hub token"),
        ("library_name: transformers\n", "", "no library_name"),
        ("library_name:", "base_model: org/x\nlibrary_name:", "base_model is 'org/x'"),
        ("value: 1.0", "value: 0.5", "measured"),
        ("tags:\n", "tags: [\n", "cannot be read"),
        ("model-index:", "model-index: 3\nother:", "cannot be read"),
    ],
)
def test_the_check_finds_what_is_wrong(carded: Path, old: str, new: str, problem: str) -> None:
    path = carded / CARD_NAME
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    result = invoke("card", carded, "--check", "--json")
    assert result.exit_code == 5
    found = json.loads(result.stdout)
    assert problem in " ".join(found["card"]["problems"])
    assert found["status"] == "gate_failed"


def test_the_check_on_the_command_line(carded: Path) -> None:
    assert invoke("card", carded, "--check", "-q").stdout == "ok\n"
    assert "declares no licence" in invoke("card", carded, "--check").stdout
    assert invoke("card", carded, "--name", "me/mine", "-q").exit_code == 0
    assert 'from_pretrained("me/mine")' in (carded / CARD_NAME).read_text(encoding="utf-8")
    assert invoke("card", carded, "--check", "-q").stdout == "ok\n"


def test_a_name_on_the_hub_stays(carded: Path, dense: Dense) -> None:
    write_card(carded, load_manifest(carded), name="me/mine")
    verify_folder(carded, str(dense()))
    text = (carded / CARD_NAME).read_text(encoding="utf-8")
    assert 'from_pretrained("me/mine")' in text
    assert "# mine\n" in text
    write_card(carded, load_manifest(carded), name="me/other")
    assert 'from_pretrained("me/other")' in (carded / CARD_NAME).read_text(encoding="utf-8")


def test_without_matplotlib_there_is_a_line_and_no_picture(
    carded: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with caplog.at_level(logging.INFO, "moe_convert"):
        write_card(carded, load_manifest(carded))
    assert "pip install 'moe-convert[report]'" in caplog.text
    assert not (carded / PICTURE_NAME).exists()
    assert PICTURE_NAME not in (carded / CARD_NAME).read_text(encoding="utf-8")
    assert check_card(carded).problems == []


def test_the_picture_shows_the_load(carded: Path) -> None:
    pytest.importorskip("matplotlib")
    manifest = load_manifest(carded)
    write_card(carded, manifest)
    first = (carded / PICTURE_NAME).read_bytes()
    assert first[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", first[16:24])
    assert min(width, height) > 200
    assert f"({PICTURE_NAME})" in (carded / CARD_NAME).read_text(encoding="utf-8")
    write_card(carded, manifest)
    assert (carded / PICTURE_NAME).read_bytes() == first
    assert manifest.routing is not None
    manifest.routing.load[0] = [1.0, 0.0, 0.0, 0.0]
    write_card(carded, manifest)
    assert (carded / PICTURE_NAME).read_bytes() != first
    calibrated(manifest)
    write_card(carded, manifest)
    calibrated_picture = (carded / PICTURE_NAME).read_bytes()
    assert calibrated_picture != first
    manifest.routing = manifest.calibration = None
    write_card(carded, manifest)
    assert "## Routing" not in (carded / CARD_NAME).read_text(encoding="utf-8")
