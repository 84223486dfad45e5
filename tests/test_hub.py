"""Hub models over a loopback server that speaks as much of the Hub's protocol as is needed."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from moe_convert.convert import convert
from moe_convert.errors import HubError, SourceError
from moe_convert.plan import make_plan
from tests.conftest import Dense
from tests.tools import converted, difference, hollow, logits, planned, recipe_of

SHA = "89abcdef0123456789abcdef0123456789abcdef"
PLAN_ALLOWANCE_BYTES = 300_000


@dataclass
class LoopbackHub:
    """One repository, org/tiny, and what was asked of it."""

    folder: Path
    gated: bool = False
    sent_bytes: int = 0
    tokens: set[str] = field(default_factory=set)
    url: str = ""

    def info(self) -> dict[str, Any]:
        """Describe the repository."""
        siblings = [
            {"rfilename": path.name, "size": path.stat().st_size}
            for path in sorted(self.folder.iterdir())
        ]
        return {
            "id": "org/tiny", "modelId": "org/tiny", "sha": SHA, "siblings": siblings,
            "cardData": {"license": "apache-2.0"}, "tags": [], "private": False,
        }  # fmt: skip

    def tree(self) -> list[dict[str, Any]]:
        """List every file as the Hub does, with something that stands for its git hash."""
        return [
            {
                "type": "file",
                "path": file["rfilename"],
                "size": file["size"],
                "oid": hashlib.sha1(file["rfilename"].encode()).hexdigest(),
            }
            for file in self.info()["siblings"]
        ]


class Handler(BaseHTTPRequestHandler):
    """Answers for the hub that its server was started with."""

    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, *args: object) -> None:
        """Stay silent."""

    def do_HEAD(self) -> None:
        """Answer without a body."""
        self._answer(body=False)

    def do_GET(self) -> None:
        """Answer in full."""
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        self.hub.tokens.add(self.headers.get("Authorization", ""))
        path = self.path.partition("?")[0]
        if self.hub.gated:
            self._send(403, {"X-Error-Code": "GatedRepo"}, b"gated", body=body)
        elif path.startswith("/api/models/org/tiny/tree/"):
            self._send(200, {}, json.dumps(self.hub.tree()).encode(), body=body)
        elif path.startswith("/api/models/org/tiny"):
            revision = path.removeprefix("/api/models/org/tiny").removeprefix("/revision/")
            self._describe(revision, body=body)
        elif path.startswith("/org/tiny/resolve/"):
            self._file(path.split("/")[5], body=body)
        else:
            self._send(404, {"X-Error-Code": "RepoNotFound"}, b"{}", body=body)

    def _describe(self, revision: str, *, body: bool) -> None:
        if revision in {"", "main", "v1", SHA}:
            self._send(200, {}, json.dumps(self.hub.info()).encode(), body=body)
        else:
            self._send(404, {"X-Error-Code": "RevisionNotFound"}, b"{}", body=body)

    def _file(self, name: str, *, body: bool) -> None:
        path = self.hub.folder / name
        if not path.is_file():
            self._send(404, {"X-Error-Code": "EntryNotFound"}, b"", body=body)
            return
        size = path.stat().st_size
        start, stop = self._range(size)
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(stop - start) if body else b""
        etag = hashlib.sha256(f"{name}{size}".encode()).hexdigest()
        headers = {
            "ETag": f'"{etag}"',
            "X-Repo-Commit": SHA,
            "Accept-Ranges": "bytes",
            "Content-Range": f"bytes {start}-{stop - 1}/{size}",
        }
        status = 206 if "Range" in self.headers else 200
        self._send(status, headers, data, body=body, length=stop - start)

    def _range(self, size: int) -> tuple[int, int]:
        low, _, high = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
        return int(low or 0), min(int(high or size - 1) + 1, size)

    def _send(
        self,
        status: int,
        headers: dict[str, str],
        data: bytes,
        *,
        body: bool,
        length: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        if body:
            self.wfile.write(data)
            self.hub.sent_bytes += len(data)


@pytest.fixture
def hub(dense: Dense, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """Serve the plain Llama as org/tiny and point the Hub library at it."""
    served = LoopbackHub(dense())
    handler = type("TinyHandler", (Handler,), {"hub": served})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    served.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    for name, value in {
        "ENDPOINT": served.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": served.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_DISABLE_XET": True,
    }.items():
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    yield served
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_plan_downloads_headers_only(hub: LoopbackHub, tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 2048}
    hub.folder = hollow(tmp_path / "large", num_layers=4, **sizes)
    large = (hub.folder / "model.safetensors").stat().st_size
    assert large > 20_000_000
    plan = planned("org/tiny")
    assert hub.sent_bytes < PLAN_ALLOWANCE_BYTES
    assert plan.estimate.download_bytes == large
    assert plan.estimate.disk_bytes > large
    assert (plan.source.name, plan.source.sha) == ("org/tiny", SHA)


@pytest.mark.parametrize("model", ["org/tiny", "hf://org/tiny", "org/tiny@v1", f"org/tiny@{SHA}"])
def test_a_hub_model_converts_and_its_commit_is_recorded(
    hub: LoopbackHub, tmp_path: Path, model: str
) -> None:
    manifest = converted(model, tmp_path / "out")
    assert (manifest.source.id, manifest.source.sha) == ("org/tiny", SHA)
    assert manifest.source.revision == (model.partition("@")[2] or "main")
    assert manifest.source.license == "apache-2.0"
    assert manifest.recipe["source"]["revision"] == SHA
    assert difference(logits(tmp_path / "out"), logits(hub.folder)) <= 1e-4
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (hub.folder / name).read_bytes()


def test_the_plan_of_a_hub_model_is_that_of_its_files(hub: LoopbackHub) -> None:
    far, near = planned("org/tiny"), planned(hub.folder)
    assert (far.specs, far.config, far.params_active) == (
        near.specs, near.config, near.params_active,
    )  # fmt: skip


def test_a_downloaded_model_needs_no_network(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted("org/tiny", tmp_path / "one")
    sent = hub.sent_bytes
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    manifest = converted("org/tiny", tmp_path / "two")
    assert manifest.source.sha == SHA
    assert hub.sent_bytes == sent


def test_errors_of_the_hub_are_told_apart(hub: LoopbackHub) -> None:
    with pytest.raises(SourceError, match="no revision v9"):
        planned("org/tiny@v9")
    with pytest.raises(SourceError, match="neither a folder here nor a repository"):
        planned("org/other")
    hub.gated = True
    with pytest.raises(HubError, match="gated"):
        planned("org/tiny")


def test_a_token_is_sent_to_the_hub_alone(hub: LoopbackHub, tmp_path: Path) -> None:
    secret = "hf_" + "t" * 34
    convert(make_plan(recipe_of("org/tiny", tmp_path / "out"), secret))
    assert f"Bearer {secret}" in hub.tokens
    for path in (tmp_path / "out").iterdir():
        assert secret.encode() not in path.read_bytes()


def test_a_hub_that_is_gone_is_a_hub_error(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = "http://127.0.0.1:9"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", nowhere)
    with pytest.raises(HubError, match="cannot be reached"):
        planned("org/tiny")
