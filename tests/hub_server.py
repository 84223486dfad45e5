"""A Hub on the loopback interface, as far as the client library speaks with one.

Repositories with commits, branches and pull requests; storage by LFS, or by xet in a local folder;
accounts and rights; a quota; and faults to order: statuses, dropped connections, half answers.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

from tests.hub_store import LARGE, Account, Blob, Fault, Hub, Refusal, Repo

QUOTA = "Private repository storage limit reached, please upgrade your plan to increase your limit"


class Handler(BaseHTTPRequestHandler):
    """Answers for the hub that its server was started with."""

    protocol_version = "HTTP/1.1"
    hub: Hub
    cut: int | None = None
    ranges = True

    def log_message(self, *args: object) -> None:
        """Stay silent."""

    def do_HEAD(self) -> None:
        """Answer without a body."""
        self._dispatch()

    do_GET = do_POST = do_PUT = do_HEAD

    def _dispatch(self) -> None:
        self.body, self.cut = self._read_body(), None
        parts = urlsplit(self.path)
        with self.hub.lock:
            self.hub.calls.append(f"{self.command} {parts.path}")
            self.hub.tokens.add(self.headers.get("Authorization", ""))
            fault = next((f for f in self.hub.faults if f.hits(self.command, parts.path)), None)
            if fault and fault.after_bytes is None:
                self._strike(fault)
                return
            self.cut = fault.after_bytes if fault else None
            try:
                self._route("GET" if self.command == "HEAD" else self.command, parts.path)
            except Refusal as refusal:
                self._json({"error": refusal.message}, refusal.status, refusal.headers)

    def _route(self, method: str, path: str) -> None:
        for wanted, pattern, answer in self.ROUTES:
            match = re.fullmatch(pattern, path) if wanted == method else None
            if match:
                answer(self, *(unquote(group or "") for group in match.groups()))
                return
        raise Refusal(404, f"no such address {path}")

    def _strike(self, fault: Fault) -> None:
        if fault.status:
            self._json({"error": fault.message}, fault.status)
        else:
            self.close_connection = True

    def _read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _send(self, data: bytes, status: int, headers: dict[str, str], size: int) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(size))
        self.end_headers()
        if self.command != "HEAD":
            self.close_connection = self.close_connection or self.cut is not None
            data = data[: self.cut]
            self.wfile.write(data)
            self.hub.sent_bytes += len(data)
            self.hub.largest_answer_bytes = max(self.hub.largest_answer_bytes, len(data))

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        self._send(data, status, {"Content-Type": "application/json", **(headers or {})}, len(data))

    def _account(self) -> Account | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.accounts:
            shown = "Invalid credentials in Authorization header"
            raise Refusal(401, f"Invalid username or password for {token}.", shown=shown)
        return self.hub.accounts.get(token)

    def _repo(self, name: str) -> Repo:
        account, repo = self._account(), self.hub.repos.get(name)
        mine = account is not None and name.split("/")[0] in account.namespaces
        if repo is None or (repo.private and not mine):
            raise Refusal(404 if account else 401, "Repository not found", "RepoNotFound")
        if repo.gated:
            raise Refusal(403, "Access to this model is restricted", "GatedRepo")
        return repo

    def _check_rights(self, namespace: str) -> None:
        account = self._account()
        if account is None:
            raise Refusal(401, "Invalid username or password.")
        if account.role != "write" or namespace not in account.namespaces:
            raise Refusal(403, f"You don't have the rights to write under {namespace!r}")

    def _writable(self, name: str, pull: bool = False) -> Repo:
        repo = self._repo(name)
        if not pull:
            self._check_rights(name.split("/")[0])
        return repo

    def _whoami(self) -> None:
        account = self._account()
        if account is None:
            raise Refusal(401, "Invalid username or password.")
        self._json(
            {
                "type": "user",
                "name": account.name,
                "orgs": [{"name": name, "roleInOrg": "write"} for name in account.organisations],
                "auth": {"type": "access_token", "accessToken": {"role": account.role}},
            }
        )

    def _create(self) -> None:
        wanted = json.loads(self.body)
        namespace = wanted.get("organization") or "tester"
        name = f"{namespace}/{wanted['name']}"
        self._check_rights(namespace)
        if name in self.hub.repos:
            answer = {"error": "You already created this model repo", "url": self._address(name)}
            self._json(answer, 409)
            return
        repo = self.hub.repos[name] = Repo(name, wanted.get("visibility") == "private")
        attributes = {".gitattributes": Blob.of(b"*.safetensors filter=lfs\n", large=False)}
        repo.commit("main", attributes, "initial commit")
        self._json({"url": self._address(name)})

    def _address(self, name: str) -> str:
        return f"{self.hub.url}/{name}"

    def _validate(self) -> None:
        good = json.loads(self.body)["content"].startswith("---\n")
        errors = [] if good else [{"message": "empty or missing yaml metadata"}]
        self._json({"errors": errors, "warnings": []}, 200 if good else 400)

    def _info(self, name: str, revision: str = "main") -> None:
        repo = self._repo(name)
        commit = repo.at(revision)
        siblings = [{"rfilename": path, "size": b.size} for path, b in commit.files.items()]
        self._json(
            {
                "id": name, "modelId": name, "sha": commit.oid, "private": repo.private,
                "siblings": siblings, "tags": [],
                "cardData": {"license": repo.license} if repo.license else {},
            }
        )  # fmt: skip

    def _tree(self, name: str, revision: str) -> None:
        found = []
        for path, blob in self._repo(name).at(revision).files.items():
            lfs = {"oid": blob.sha256, "size": blob.size, "pointerSize": 130}
            entry = {"type": "file", "path": path, "size": blob.size, "oid": blob.oid}
            found.append(entry | ({"lfs": lfs} if blob.large else {}))
        self._json(found)

    def _auth_check(self, name: str, write: str) -> None:
        self._writable(name, pull=not write)
        self._json({})

    def _preupload(self, name: str, revision: str) -> None:
        repo = self._writable(name, revision.startswith("refs/pr/"))
        wanted = json.loads(self.body)["files"]
        if self.hub.quota_bytes is not None and sum(f["size"] for f in wanted) > (
            self.hub.quota_bytes
        ):
            raise Refusal(403, QUOTA)
        present = repo.at(revision).files
        self._json(
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                        "shouldIgnore": False,
                        "oid": present[file["path"]].known_as if file["path"] in present else None,
                    }
                    for file in wanted
                ]
            }
        )

    def _batch(self, name: str) -> None:
        wanted, found = json.loads(self.body), []
        self._writable(name, wanted.get("ref", {}).get("name", "").startswith("refs/pr/"))
        for one in wanted["objects"]:
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}", "header": {}}}
            found.append(one | ({} if one["oid"] in self.hub.objects else {"actions": upload}))
        self._json({"transfer": "basic", "objects": found})

    def _put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "the content is not what its hash says")
        self.hub.objects[oid] = self.body
        self._json({})

    def _xet_token(self, name: str, kind: str, revision: str) -> None:
        self._writable(name, kind == "read" or revision.startswith("refs/pr/"))
        expires = str(int(time.time()) + 3600)
        found = {"casUrl": f"local://{self.hub.folder}", "accessToken": "xet", "exp": int(expires)}
        names = ("X-Xet-Cas-Url", "X-Xet-Access-Token", "X-Xet-Token-Expiration")
        values = (f"local://{self.hub.folder}", "xet", expires)
        self._json(found, headers=dict(zip(names, values, strict=True)))

    def _commit(self, name: str, revision: str) -> None:
        repo = self._writable(name, revision.startswith("refs/pr/"))
        files, title = dict(repo.at(revision).files), ""
        for line in self.body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                title = value["summary"]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
            elif entry["key"] == "file":
                files[value["path"]] = Blob.of(base64.b64decode(value["content"]), large=False)
            else:
                files[value["path"]] = self._stored(value["oid"], value["size"])
        made = repo.commit(revision, files, title)
        self._json({"commitUrl": f"{self._address(name)}/commit/{made.oid}", "commitOid": made.oid})

    def _stored(self, oid: str, size: int) -> Blob:
        if oid not in self.hub.objects and oid not in self.hub.xet_hashes():
            raise Refusal(400, f"nothing was uploaded as {oid}")
        return Blob(size, oid, self.hub.objects.get(oid), large=True)

    def _branch(self, name: str, branch: str) -> None:
        repo = self._writable(name)
        if branch in repo.refs:
            raise Refusal(409, "Reference already exists")
        repo.refs[branch] = repo.refs["main"]
        self._json({})

    def _discuss(self, name: str) -> None:
        if self._account() is None:
            raise Refusal(401, "Invalid username or password.")
        self._json({"num": self._repo(name).open_pull(json.loads(self.body)["title"])})

    def _discussion(self, name: str, number: str) -> None:
        title = self._repo(name).pulls[int(number) - 1]
        self._json(
            {
                "title": title, "num": int(number), "status": "draft", "isPullRequest": True,
                "author": {"name": "tester"}, "createdAt": "2026-01-01T00:00:00.000Z",
                "events": [], "changes": {"base": "refs/heads/main"}, "filesWithConflicts": [],
                "repo": {"name": name, "type": "model"},
            }
        )  # fmt: skip

    def _resolve(self, name: str, revision: str, path: str) -> None:
        commit = self._repo(name).at(revision)
        blob, headers = commit.files.get(path), {"X-Repo-Commit": commit.oid}
        if blob is None:
            self._send(b"", 404, {**headers, "X-Error-Code": "EntryNotFound"}, 0)
            return
        headers["ETag"] = f'"{blob.known_as}"'
        if not blob.large:
            self._bytes(blob.data or b"", headers)
            return
        headers |= {
            "X-Linked-Etag": f'"{blob.sha256}"',
            "X-Linked-Size": str(blob.size),
            "Location": f"{self.hub.url.replace('127.0.0.1', 'localhost')}/cdn/{blob.sha256}",
        }
        if blob.data is None:
            route = f"{self.hub.url}/api/models/{name}/xet-read-token/{commit.oid}"
            headers["X-Xet-Hash"] = self.hub.xet_hashes()[blob.sha256]
            headers["Link"] = f'<{route}>; rel="xet-auth"'
        self._send(b"", 302, headers, 0)

    def _cdn(self, sha256: str) -> None:
        if "Authorization" in self.headers:
            raise Refusal(400, "a token was sent to another host")
        self._bytes(self.hub.objects[sha256], {"ETag": f'"{sha256}"'})

    def _bytes(self, data: bytes, headers: dict[str, str]) -> None:
        wanted = self.headers.get("Range", "") if self.ranges else ""
        low, _, high = wanted.removeprefix("bytes=").partition("-")
        start, stop = int(low or 0), min(int(high or len(data) - 1) + 1, len(data))
        headers |= {"Accept-Ranges": "bytes"}
        if wanted:
            headers |= {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
        status = 206 if wanted else 200
        self._send(data[start:stop], status, headers, stop - start)

    MODEL = "/api/models/([^/]+/[^/]+)"
    ROUTES: ClassVar[tuple[tuple[str, str, Callable[..., None]], ...]] = (
        ("GET", "/api/whoami-v2", _whoami),
        ("POST", "/api/repos/create", _create),
        ("POST", "/api/validate-yaml", _validate),
        ("GET", MODEL, _info),
        ("GET", f"{MODEL}/revision/([^/]+)", _info),
        ("GET", f"{MODEL}/tree/([^/]+)", _tree),
        ("GET", f"{MODEL}/auth-check(/write)?", _auth_check),
        ("POST", f"{MODEL}/preupload/([^/]+)", _preupload),
        ("POST", f"{MODEL}/commit/([^/]+)", _commit),
        ("POST", f"{MODEL}/branch/([^/]+)", _branch),
        ("POST", f"{MODEL}/discussions", _discuss),
        ("GET", rf"{MODEL}/discussions/(\d+)", _discussion),
        ("GET", f"{MODEL}/xet-(read|write)-token/([^/]+)", _xet_token),
        ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", _batch),
        ("PUT", "/lfs/([0-9a-f]{64})", _put),
        ("GET", "/cdn/([0-9a-f]{64})", _cdn),
        ("GET", "/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", _resolve),
    )


@contextmanager
def serving(folder: Path) -> Iterator[Hub]:
    """Serve an empty Hub that keeps xet data in a folder."""
    hub = Hub(folder)
    handler = type("BoundHandler", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
