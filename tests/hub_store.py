"""What a loopback Hub holds: accounts, repositories and commits, objects, faults to order."""

from __future__ import annotations

import hashlib
import re
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TOKEN = "hf_" + "LoopbackSecret" * 2 + "abc123"
READ_TOKEN = "hf_" + "ReadOnlySecret" * 2 + "abc123"
STRANGER_TOKEN = "hf_" + "StrangerSecret" * 2 + "abc123"
LARGE = (".safetensors", ".bin", ".gguf", ".png")
"""Suffixes that are not kept in git itself."""


@dataclass(frozen=True)
class Account:
    """Who a token belongs to, and whether it may write."""

    name: str
    organisations: tuple[str, ...] = ()
    role: str = "write"

    @property
    def namespaces(self) -> set[str]:
        """Where its repositories may lie."""
        return {self.name, *self.organisations}


@dataclass(frozen=True)
class Blob:
    """A file; the bytes of one that came by xet lie in the xet folder alone."""

    size: int
    sha256: str
    data: bytes | None
    large: bool

    @classmethod
    def of(cls, data: bytes, large: bool) -> Blob:
        """Wrap bytes."""
        return cls(len(data), hashlib.sha256(data).hexdigest(), data, large)

    @property
    def oid(self) -> str:
        """What git calls it; for a large file, that of something which stands for it."""
        data = self.sha256.encode() if self.data is None or self.large else self.data
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    @property
    def known_as(self) -> str:
        """The hash by which an upload tells that nothing changed."""
        return self.sha256 if self.large else self.oid


@dataclass(frozen=True)
class Commit:
    """Every file of a state of a repository."""

    oid: str
    files: dict[str, Blob]
    title: str


@dataclass
class Repo:
    """A model repository."""

    name: str
    private: bool
    gated: bool = False
    license: str | None = None
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    pulls: list[str] = field(default_factory=list)

    def at(self, revision: str) -> Commit:
        """Return the state that a branch, tag or commit names."""
        oid = self.refs.get(revision, revision)
        if oid not in self.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]

    def commit(self, ref: str, files: dict[str, Blob], title: str, oid: str = "") -> Commit:
        """Add a state and let a branch name it."""
        text = repr((len(self.commits), ref, title, sorted((p, b.oid) for p, b in files.items())))
        made = Commit(oid or hashlib.sha1(text.encode()).hexdigest(), files, title)
        self.commits[made.oid] = made
        self.refs[ref] = made.oid
        return made

    def open_pull(self, title: str) -> int:
        """Open a pull request at the head of main and return its number."""
        self.pulls.append(title)
        self.refs[f"refs/pr/{len(self.pulls)}"] = self.refs["main"]
        return len(self.pulls)

    def titles(self) -> list[str]:
        """What was committed, in order."""
        return [commit.title for commit in self.commits.values()]


@dataclass
class Fault:
    """What happens instead of an answer: a status, or 0 for a connection that is dropped.

    With `after_bytes` the answer itself is cut off there.
    """

    method: str
    path: str
    status: int = 500
    times: int = 1
    message: str = "injected"
    after_bytes: int | None = None

    def hits(self, method: str, path: str) -> bool:
        """Whether this request is struck; each time counts."""
        struck = self.times > 0 and self.method == method and re.search(self.path, path) is not None
        self.times -= struck
        return struck


class Refusal(Exception):
    """An answer that says no."""

    def __init__(self, status: int, message: str, code: str = "", shown: str = "") -> None:
        super().__init__(message)
        self.status, self.message = status, message
        names = {"X-Error-Code": code, "X-Error-Message": shown}
        self.headers = {name: value for name, value in names.items() if value}


@dataclass
class Hub:
    """All repositories, and what was asked of them."""

    folder: Path
    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    quota_bytes: int | None = None
    accounts: dict[str, Account] = field(
        default_factory=lambda: {
            TOKEN: Account("tester", ("org",)),
            READ_TOKEN: Account("tester", ("org",), "read"),
            STRANGER_TOKEN: Account("stranger"),
        }
    )
    calls: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    sent_bytes: int = 0
    largest_answer_bytes: int = 0
    lock: threading.RLock = field(default_factory=threading.RLock)

    def add(self, name: str, folder: Path, sha: str = "", **settings: Any) -> Repo:
        """Serve the files of a folder as a repository."""
        files = {
            str(path.relative_to(folder)): Blob.of(path.read_bytes(), path.suffix in LARGE)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        repo = self.repos[name] = Repo(name, **{"private": False, **settings})
        self.objects |= {b.sha256: b.data for b in files.values() if b.data and b.large}
        repo.commit("main", files, "initial commit", sha)
        return repo

    def asked(self, pattern: str) -> list[str]:
        """Return the requests that match."""
        return [call for call in self.calls if re.search(pattern, call)]

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """Return the settings of a process that uses this Hub and no other place."""
        places = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
        return places | ({"HF_TOKEN": token} if token else {})

    def xet_hashes(self) -> dict[str, str]:
        """Return xet hash by SHA-256, from the shards that the client wrote."""
        found: dict[str, str] = {}
        for path in self.folder.rglob("*.mdb"):
            found.update(_xet_shard(path.read_bytes()))
        return found


def _xet_shard(data: bytes) -> Iterator[tuple[str, str]]:
    """Yield SHA-256 and xet hash of every file that a shard describes."""
    at = 48
    while data[at : at + 32] != b"\xff" * 32:
        name, (flags, entries) = data[at : at + 32], struct.unpack_from("<II", data, at + 32)
        at += 48 * (1 + entries * (2 if flags >> 31 & 1 else 1))
        if flags >> 30 & 1:
            yield _xet_text(data[at : at + 32]), _xet_text(name)
            at += 48


def _xet_text(raw: bytes) -> str:
    return "".join(f"{part:016x}" for part in struct.unpack("<4Q", raw))
