"""Hub models over a loopback server that speaks as much of the Hub's protocol as is needed."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_convert.convert import convert
from moe_convert.errors import HubError, SourceError
from moe_convert.plan import make_plan
from tests.conftest import Dense
from tests.hub_store import TOKEN, Hub
from tests.tools import converted, difference, hollow, logits, planned, recipe_of

SHA = "89abcdef0123456789abcdef0123456789abcdef"
PLAN_ALLOWANCE_BYTES = 300_000


@pytest.fixture
def tiny(hub: Hub, dense: Dense) -> Hub:
    """Serve the plain Llama as org/tiny."""
    repo = hub.add("org/tiny", dense(), SHA, license="apache-2.0")
    repo.refs["v1"] = SHA
    return hub


def test_a_plan_downloads_headers_only(tiny: Hub, tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 2048}
    folder = hollow(tmp_path / "large", num_layers=4, **sizes)
    tiny.add("org/tiny", folder, SHA)
    large = (folder / "model.safetensors").stat().st_size
    assert large > 20_000_000
    plan = planned("org/tiny")
    assert tiny.sent_bytes < PLAN_ALLOWANCE_BYTES
    assert plan.estimate.download_bytes == large
    assert plan.estimate.disk_bytes > large
    assert (plan.source.name, plan.source.sha) == ("org/tiny", SHA)


@pytest.mark.parametrize("model", ["org/tiny", "hf://org/tiny", "org/tiny@v1", f"org/tiny@{SHA}"])
def test_a_hub_model_converts_and_its_commit_is_recorded(
    tiny: Hub, dense: Dense, tmp_path: Path, model: str
) -> None:
    manifest = converted(model, tmp_path / "out")
    assert (manifest.source.id, manifest.source.sha) == ("org/tiny", SHA)
    assert manifest.source.revision == (model.partition("@")[2] or "main")
    assert manifest.source.license == "apache-2.0"
    assert manifest.recipe["source"]["revision"] == SHA
    assert difference(logits(tmp_path / "out"), logits(dense())) <= 1e-4
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (dense() / name).read_bytes()


def test_the_plan_of_a_hub_model_is_that_of_its_files(tiny: Hub, dense: Dense) -> None:
    far, near = planned("org/tiny"), planned(dense())
    assert (far.specs, far.config, far.params_active) == (
        near.specs, near.config, near.params_active,
    )  # fmt: skip


def test_a_downloaded_model_needs_no_network(
    tiny: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted("org/tiny", tmp_path / "one")
    sent = tiny.sent_bytes
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    manifest = converted("org/tiny", tmp_path / "two")
    assert manifest.source.sha == SHA
    assert tiny.sent_bytes == sent


def test_errors_of_the_hub_are_told_apart(tiny: Hub) -> None:
    with pytest.raises(SourceError, match="no revision v9"):
        planned("org/tiny@v9")
    with pytest.raises(SourceError, match="neither a folder here nor a repository"):
        planned("org/other")
    tiny.repos["org/tiny"].gated = True
    with pytest.raises(HubError, match="gated"):
        planned("org/tiny")


def test_a_token_is_sent_to_the_hub_alone(tiny: Hub, tmp_path: Path) -> None:
    convert(make_plan(recipe_of("org/tiny", tmp_path / "out"), TOKEN))
    assert f"Bearer {TOKEN}" in tiny.tokens
    for path in (tmp_path / "out").iterdir():
        assert TOKEN.encode() not in path.read_bytes()


def test_a_hub_that_is_gone_is_a_hub_error(tiny: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = "http://127.0.0.1:9"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", nowhere)
    with pytest.raises(HubError, match="cannot be reached"):
        planned("org/tiny")
