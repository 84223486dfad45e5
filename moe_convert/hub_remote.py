"""What a repository on the Hub holds, and in what a folder differs from it."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from moe_convert import __version__
from moe_convert.errors import HubError, SourceError, UsageError
from moe_convert.hub_errors import Attempt, explained, hub_failures, patiently
from moe_convert.manifest import MANIFEST_NAME, load_manifest
from moe_convert.recipe import PushSection

if TYPE_CHECKING:
    from huggingface_hub import HfApi

MAIN = "main"
PULL_PREFIX = "refs/pr/"


@dataclass(frozen=True)
class Remote:
    """What a repository holds at the revision that is pushed to.

    `files` are sizes and hashes by path: SHA-256 where a file is large, git's own otherwise.
    `compared` is off where nobody could ask.
    """

    private: bool
    exists: bool = False
    has_branch: bool = False
    head: str | None = None
    files: Mapping[str, tuple[int, str]] = field(default_factory=dict)
    compared: bool = True


def name_of(target: PushSection) -> str:
    """Return the name of the repository.

    Raises:
        UsageError: none was given.
    """
    if target.repo_id is None:
        raise UsageError("push.repo_id is not set.", "Name the repository as org/name.")
    return target.repo_id


def client(token: str | None) -> HfApi:
    """Return the client; without a token it asks as nobody, never with one found elsewhere."""
    from huggingface_hub import HfApi, constants

    found = token or found_token()
    return HfApi(
        endpoint=constants.ENDPOINT,
        token=found or False,
        library_name="moe-convert",
        library_version=__version__,
    )


def found_token() -> str | None:
    """Return the token of this environment or of an earlier login.

    Raises:
        HubError: one should be there and cannot be had.
    """
    from huggingface_hub import errors, get_token

    try:
        return get_token()
    except (*hub_failures(), getattr(errors, "OIDCError", RuntimeError)) as error:
        raise HubError(f"No Hub token can be had: {' '.join(str(error).split())}") from None


def look(
    attempt: Attempt, target: PushSection, token: str | None, *, dry_run: bool = False
) -> Remote:
    """Return what the repository holds now; a dry run goes on where nobody can be asked.

    Raises:
        HubError: it cannot be asked, or its visibility is not the one that is wanted.
    """
    from huggingface_hub.errors import LocalTokenNotFoundError

    with explained(attempt):
        unknown = Remote(private=target.private is not False, compared=False)
        if not (token or found_token()):
            if dry_run:
                return unknown
            raise LocalTokenNotFoundError
        try:
            remote = patiently(lambda: _remote(client(token), target))
        except hub_failures() as error:
            if not dry_run or attempt.answered(error):
                raise
            return unknown
    if remote.exists and target.private not in {None, remote.private}:
        names = {True: "private", False: "public"}
        raise HubError(
            f"{attempt.repo_id} is {names[remote.private]}, and --{names[not remote.private]} was "
            "asked for.",
            "Change it in the repository's settings, or leave the option out. "
            f"Then: {attempt.resume}",
        )
    if not remote.exists and (target.create_pr or (target.branch or "").startswith(PULL_PREFIX)):
        raise _no_repo_to_pull(target, attempt)
    return remote


def _no_repo_to_pull(target: PushSection, attempt: Attempt) -> HubError:
    return HubError(
        f"There is no repository {name_of(target)} that this token can see, and a pull request "
        "needs one.",
        f"Leave --create-pr out to create it, or correct the name. Then: {attempt.resume}",
    )


def _remote(api: HfApi, target: PushSection) -> Remote:
    """Ask for visibility, head and files; a branch that is missing will start at main."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
    from huggingface_hub.hf_api import RepoFile

    branch = target.branch or MAIN
    try:
        private = bool(api.model_info(name_of(target)).private)
    except RepositoryNotFoundError as error:
        if error.response.status_code == 401:
            raise
        return Remote(private=target.private is not False)
    try:
        head, has_branch = api.model_info(name_of(target), revision=branch).sha, True
    except RevisionNotFoundError:
        if branch.startswith(PULL_PREFIX):
            raise
        head, has_branch = api.model_info(name_of(target), revision=MAIN).sha, False
    files = {
        entry.path: (entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id)
        for entry in api.list_repo_tree(name_of(target), recursive=True, revision=head)
        if isinstance(entry, RepoFile)
    }
    return Remote(private, True, has_branch, head, files)


def changed_files(folder: Path, hashes: Mapping[str, str], remote: Remote) -> list[str]:
    """Return the files that the repository does not hold as they are here."""
    return [
        name
        for name, sha256 in hashes.items()
        if name not in remote.files or not _same(folder / name, sha256, *remote.files[name])
    ]


def _same(path: Path, sha256: str, size: int, known_as: str) -> bool:
    if path.stat().st_size != size:
        return False
    if len(known_as) == len(sha256):
        return known_as == sha256
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == known_as  # noqa: S324


def stale_files(
    remote: Remote, hashes: Mapping[str, str], target: PushSection, token: str | None
) -> tuple[str, ...]:
    """Return what an earlier push left, untouched since, and this one does not have."""
    if MANIFEST_NAME not in remote.files:
        return ()
    with tempfile.TemporaryDirectory(prefix="moe-convert-") as place:
        api, name = client(token), name_of(target)
        patiently(
            lambda: api.hf_hub_download(name, MANIFEST_NAME, revision=remote.head, local_dir=place)
        )
        try:
            before = load_manifest(Path(place)).target.files
        except SourceError:
            return ()
    return tuple(
        file.path
        for file in before
        if file.path not in hashes and _untouched(file.sha256, remote.files.get(file.path))
    )


def _untouched(sha256: str, found: tuple[int, str] | None) -> bool:
    """Whether a remote file is there, and is the recorded one as far as its hash can tell."""
    return found is not None and (len(found[1]) != len(sha256) or found[1] == sha256)
