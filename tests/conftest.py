"""One thread, no network, and checkpoints that the tests of one worker share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.hub_server import serving
from tests.hub_store import Hub
from tests.tiny import make_dense

Dense = Callable[..., Path]
"""`dense(model_type, variant, dtype=…, **config)` returns the folder of a tiny checkpoint."""


def pytest_configure() -> None:
    """Set what the libraries read when they are imported."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["TQDM_DISABLE"] = "1"
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Dense:
    """Make tiny dense checkpoints, each once; nobody may write into them."""
    made: dict[str, Path] = {}

    def make(model_type: str = "llama", variant: str = "plain", **changes: Any) -> Path:
        key = repr((model_type, variant, sorted(changes.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp(f"{model_type}-{variant}") / "dense-model"
            made[key] = make_dense(model_type, variant, folder, **changes)
        return made[key]

    return make


@pytest.fixture(scope="session")
def finished(dense: Dense, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a verified Mixtral made from the plain Llama; nobody may write into it."""
    from moe_convert.workflow import upcycle
    from tests.tools import planned

    output = tmp_path_factory.mktemp("finished") / "out"
    manifest = upcycle(planned(dense(), output))
    assert manifest.state == "verified"
    return output


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep unpacked checkpoints out of the user's cache, and debug tracebacks off."""
    monkeypatch.setenv("MOE_CONVERT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MOE_CONVERT_DEBUG", raising=False)
    monkeypatch.delenv("MOE_CONVERT_FORMAT", raising=False)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Serve an empty Hub and point this process's Hub library at it, without a token."""
    with serving(tmp_path / "xet") as served:
        for name, value in {
            "ENDPOINT": served.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": served.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_CACHE": str(tmp_path / "hub"),
            "HF_HUB_DISABLE_XET": True,
            "HF_TOKEN_PATH": str(tmp_path / "token"),
        }.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH"):
            monkeypatch.delenv(name, raising=False)
        yield served
