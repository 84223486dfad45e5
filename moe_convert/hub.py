"""Publish a finished folder on the Hub: what would change there, and the upload of only that.

Nothing is uploaded that the manifest does not vouch for, a repository that is created is private
unless that is asked for, and a push of what is there already makes no commit.
"""

from __future__ import annotations

import glob
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from moe_convert import __version__
from moe_convert.errors import HubError, UsageError
from moe_convert.hub_errors import Attempt, explained, patiently
from moe_convert.hub_remote import (
    MAIN,
    PULL_PREFIX,
    Remote,
    changed_files,
    client,
    found_token,
    look,
    name_of,
    stale_files,
)
from moe_convert.manifest import Manifest
from moe_convert.publishable import (
    Progress,
    check_hashes,
    check_licence,
    check_secrets,
    licence_of,
    read_state,
)
from moe_convert.recipe import PushSection

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from moe_convert.plan import Plan


@dataclass(frozen=True)
class Pushed:
    """What a push did, or with `dry_run` would do; sizes in bytes."""

    repo_id: str
    url: str
    revision: str
    private: bool
    new: bool
    files: Mapping[str, int]
    uploaded: Mapping[str, int]
    deleted: tuple[str, ...]
    commit: str | None = None
    pr_url: str | None = None
    compared: bool = True
    dry_run: bool = False

    @property
    def uploaded_bytes(self) -> int:
        """Size of the files that changed."""
        return sum(self.uploaded.values())

    @property
    def section(self) -> dict[str, Any]:
        """The `hub` object of a result."""
        actions = {name: "upload" if name in self.uploaded else "keep" for name in self.files}
        return {
            "repo_id": self.repo_id,
            "url": self.url,
            "commit": self.commit or "",
            "pr_url": self.pr_url,
            "private": self.private,
            "uploaded_bytes": self.uploaded_bytes,
            "revision": self.revision,
            "new": self.new,
            "files": [
                {"path": name, "size": size, "action": actions[name]}
                for name, size in self.files.items()
            ]
            + [{"path": name, "size": 0, "action": "delete"} for name in self.deleted],
        }


def push_section(**values: Any) -> PushSection:
    """Return validated settings of a push.

    Raises:
        UsageError: one is invalid; the sentence names it.
    """
    try:
        return PushSection.model_validate({k: v for k, v in values.items() if v is not None})
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(str(part) for part in problem["loc"])
        text = problem["msg"].removeprefix("Value error, ")
        raise UsageError(f"push{'.' if place else ''}{place}: {text}.") from None


def push(
    folder: Path,
    target: PushSection,
    *,
    token: str | None = None,
    license: str | None = None,  # noqa: A002
    force: bool = False,
    dry_run: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Pushed:
    """Upload what changed of a folder; with `dry_run` only say what that is.

    Raises:
        SourceError: the folder has no manifest.
        VerificationError: it failed its check, or its files are not those of its manifest.
        UsageError: there is a conflict of licences, or a file holds the token.
        HubError: the Hub refuses or cannot be reached; the hint has the command that goes on.
    """
    manifest = read_state(folder, force=force)
    licence_of(manifest, folder, license, public=target.private is False)
    attempt = _attempt(target, resume_command(folder, target, license, force), token)
    remote = look(attempt, target, token, dry_run=dry_run)
    hashes = check_hashes(folder, manifest, progress)
    check_secrets(folder, list(hashes), [s for s in attempt.secrets if s])
    with explained(attempt):
        changed = changed_files(folder, hashes, remote)
        stale = stale_files(remote, hashes, target, token) if target.prune else ()
    pushed = Pushed(
        repo_id=name_of(target),
        url=_address(target),
        revision=target.branch or MAIN,
        private=remote.private,
        new=not remote.exists,
        files={name: (folder / name).stat().st_size for name in hashes},
        uploaded={name: (folder / name).stat().st_size for name in changed},
        deleted=stale,
        commit=remote.head,
        compared=remote.compared,
        dry_run=dry_run,
    )
    if dry_run or not (changed or stale):
        return pushed
    progress("upload", 0, 1)
    done = _Upload(folder, target, manifest, attempt, token, license, force).run(pushed, remote)
    progress("upload", 1, 1)
    return done


def check_target(target: PushSection, token: str | None, plan: Plan | None = None) -> None:
    """Check what can be checked before there is anything to push: login, rights, visibility.

    With a plan, also whether its sources' licences agree.

    Raises:
        HubError: the push would be refused.
        UsageError: there is a conflict of licences.
    """
    if plan is not None:
        _check_planned_licence(plan)
    attempt = _attempt(target, "run the same command again", token)
    look(attempt, target, token)
    with explained(attempt):
        me = patiently(client(token).whoami)
    roles = {org["name"]: org.get("roleInOrg") for org in me.get("orgs", ())}
    roles[me["name"]] = "admin"
    namespace = name_of(target).partition("/")[0]
    role = me.get("auth", {}).get("accessToken", {}).get("role")
    visitor = target.create_pr or (target.branch or "").startswith(PULL_PREFIX)
    if role == "read" or (not visitor and roles.get(namespace, "read") == "read"):
        raise HubError(
            f"The token may not write to {name_of(target)}: it is {me['name']}'s, for "
            f"{role or 'some repositories'}.",
            f"Use one with write access to {namespace}, then run the same command again",
        )


def _check_planned_licence(plan: Plan) -> None:
    from moe_convert.convert import expert_info, source_info

    asked = plan.recipe.output.license
    sources = [source_info(plan), *(expert_info(plan, expert) for expert in plan.experts)]
    public = plan.recipe.push.private is False
    check_licence(sources, None if asked == "inherit" else asked, None, public=public)


def _address(target: PushSection) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{name_of(target)}"


def resume_command(
    folder: Path,
    target: PushSection,
    license: str | None = None,  # noqa: A002
    force: bool = False,
) -> str:
    """Return the command that goes on with a push; it never holds a token."""
    visibility = {True: ["--private"], False: ["--public"], None: []}[target.private]
    options = {"--branch": target.branch, "--commit-message": target.commit_message}
    switches = {"--create-pr": target.create_pr, "--no-prune": not target.prune, "--force": force}
    words = ["moe-convert", "push", str(folder), name_of(target), *visibility]
    for flag, value in {**options, "--license": license}.items():
        words += [flag, value] if value else []
    return shlex.join([*words, *(flag for flag, on in switches.items() if on)])


def _attempt(target: PushSection, resume: str, token: str | None) -> Attempt:
    return Attempt(name_of(target), resume, (token, found_token()))


@dataclass
class _Upload:
    """One upload; `attempt` changes once there is a pull request to go on with."""

    folder: Path
    target: PushSection
    manifest: Manifest
    attempt: Attempt
    token: str | None
    license: str | None
    force: bool

    def run(self, pushed: Pushed, remote: Remote) -> Pushed:
        """Create what is missing and upload; return what came of it.

        Raises:
            HubError: the Hub refuses, or fails again and again.
        """
        api, name, pr_url = client(self.token), name_of(self.target), None
        revision = self.target.branch or MAIN
        with explained(self.attempt):
            if not remote.exists:
                self._create(api, remote)
            if revision != MAIN and not remote.has_branch:
                patiently(lambda: api.create_branch(name, branch=revision, exist_ok=True))
            if self.target.create_pr:
                opened = api.create_pull_request(name, self._message)
                revision, pr_url = f"{PULL_PREFIX}{opened.num}", opened.url
        rest = self.target.model_copy(update={"branch": revision, "create_pr": False})
        if self.target.create_pr:
            resume = resume_command(self.folder, rest, self.license, self.force)
            self.attempt = replace(self.attempt, resume=resume)
        with explained(self.attempt):
            commit = patiently(lambda: self._upload(api, revision, pushed))
        return replace(pushed, commit=commit, pr_url=pr_url, revision=revision)

    def _create(self, api: HfApi, remote: Remote) -> None:
        from huggingface_hub.errors import HfHubHTTPError

        name = name_of(self.target)
        try:
            patiently(lambda: api.create_repo(name, private=remote.private))
        except HfHubHTTPError as error:
            # The answer to a first attempt may have been lost on its way.
            if error.response.status_code != 409:
                raise
            if bool(api.model_info(name).private) != remote.private:
                raise

    def _upload(self, api: HfApi, revision: str, pushed: Pushed) -> str:
        done = api.upload_folder(
            repo_id=name_of(self.target),
            folder_path=self.folder,
            revision=revision,
            commit_message=self._message,
            allow_patterns=[glob.escape(name) for name in pushed.uploaded],
            delete_patterns=[glob.escape(name) for name in pushed.deleted] or None,
        )
        return str(done.oid)

    @property
    def _message(self) -> str:
        made = self.manifest.target
        return self.target.commit_message or (
            f"{made.architecture} with {made.num_experts} experts, made by moe-convert "
            f"{__version__} from {self.manifest.source.id}"
        )
