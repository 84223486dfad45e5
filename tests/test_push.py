"""Publishing with the real client on a loopback Hub: uploads, faults, refusals, and no token."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from moe_convert.errors import HubError, MoeConvertError, SourceError, UsageError, VerificationError
from moe_convert.hub import check_target, push, push_section, resume_command
from moe_convert.manifest import SourceInfo, load_manifest
from moe_convert.publishable import check_licence, publishable
from tests.conftest import Dense
from tests.hub_server import serving
from tests.hub_store import READ_TOKEN, STRANGER_TOKEN, TOKEN, Fault, Hub, Repo
from tests.test_cli import invoke
from tests.test_console import as_json
from tests.tools import converted, digest, edit_json

if TYPE_CHECKING:
    from typer.testing import Result

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
"""The client library's own, about how it hands files to its HTTP library."""

NAME = "org/result"
WEIGHTS = "model.safetensors"
SCRIPT = Path(sys.executable).with_name("moe-convert")


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try again at once, in this program and in the client."""
    monkeypatch.setattr("moe_convert.hub_errors.WAIT_S", 0.01)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """Return a copy of a verified folder."""
    return Path(shutil.copytree(finished, tmp_path / "out"))


def pushed(folder: Path, **values: Any) -> Any:
    """Push with the good token; settings of the section by name."""
    keys = {"license", "force", "dry_run", "token"}
    options = {"token": TOKEN, **{key: values[key] for key in keys & values.keys()}}
    section = {key: value for key, value in values.items() if key not in keys}
    return push(folder, push_section(repo_id=NAME, **section), **options)


def num_large(folder: Path) -> int:
    """Return how many files of a folder go to the large-file store."""
    return sum(path.suffix in {".safetensors", ".png"} for path in folder.iterdir())


def holds(repo: Repo, folder: Path, ref: str = "main") -> bool:
    """Whether a repository holds exactly what is published of a folder, byte for byte."""
    files = {path: blob.sha256 for path, blob in repo.at(ref).files.items()}
    files.pop(".gitattributes")
    return files == {name: digest(folder)[name] for name in publishable(folder)}


def test_a_new_repository_is_private_and_holds_every_file(hub: Hub, folder: Path) -> None:
    done = pushed(folder)
    repo = hub.repos[NAME]
    assert holds(repo, folder)
    assert {"README.md", "moe_convert.json", "recipe.yaml", WEIGHTS} <= done.files.keys()
    assert repo.private
    assert (done.private, done.new, done.commit) == (True, True, repo.refs["main"])
    assert done.uploaded_bytes == sum((folder / name).stat().st_size for name in done.files)
    assert done.url == f"{hub.url}/{NAME}"
    assert "Mixtral" not in hub.tokens
    assert hub.tokens <= {f"Bearer {TOKEN}", ""}


def test_what_is_there_already_makes_no_commit(hub: Hub, folder: Path) -> None:
    first = pushed(folder, private=False, license="mit")
    assert not hub.repos[NAME].private
    second = pushed(folder)
    assert (second.uploaded_bytes, second.commit) == (0, first.commit)
    assert len(hub.repos[NAME].commits) == 2
    assert len(hub.asked("POST .*/commit/")) == 1


def test_only_what_changed_is_uploaded(hub: Hub, folder: Path) -> None:
    pushed(folder)
    (folder / "README.md").write_text((folder / "README.md").read_text() + "\nMore.\n")
    done = pushed(folder, commit_message="A longer card")
    assert list(done.uploaded) == ["README.md"]
    assert hub.repos[NAME].titles()[-1] == "A longer card"
    assert holds(hub.repos[NAME], folder)
    assert len(hub.asked("PUT /lfs/")) == num_large(folder)


def test_hidden_and_unfinished_files_stay_here(hub: Hub, folder: Path) -> None:
    for name in (".env", "optimizer.pt", "moe_convert.json.partial", ".calibration/step/a.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("private")
    done = pushed(folder)
    assert not [name for name in done.files if name.startswith(".") or "partial" in name]
    assert "optimizer.pt" not in hub.repos[NAME].at("main").files


def test_a_branch_is_made_and_main_left_alone(hub: Hub, folder: Path) -> None:
    done = pushed(folder, branch="v2")
    assert holds(hub.repos[NAME], folder, "v2")
    assert list(hub.repos[NAME].at("main").files) == [".gitattributes"]
    assert done.revision == "v2"
    assert pushed(folder, branch="v2").uploaded_bytes == 0


def test_a_pull_request_is_opened_and_gone_on_with(hub: Hub, folder: Path) -> None:
    with pytest.raises(HubError, match="a pull request needs one"):
        pushed(folder, create_pr=True)
    hub.repos[NAME] = Repo(NAME, private=False)
    hub.repos[NAME].commit("main", {}, "begun")
    hub.faults = [Fault("POST", "/commit/", 500, times=99)]
    with pytest.raises(HubError, match=r"--branch refs/pr/1$") as failed:
        pushed(folder, create_pr=True, token=STRANGER_TOKEN)
    assert "--create-pr" not in failed.value.hint
    hub.faults = []
    done = pushed(folder, branch="refs/pr/1", token=STRANGER_TOKEN)
    assert hub.repos[NAME].at("main").files == {}
    assert done.uploaded_bytes > 0
    assert len(hub.repos[NAME].pulls) == 1
    again = pushed(folder, create_pr=True, token=STRANGER_TOKEN)
    assert again.pr_url == f"{hub.url}/{NAME}/discussions/2"
    assert again.revision == "refs/pr/2"


def sharded(dense: Dense, folder: Path, size: str) -> Path:
    """Convert into shards of a size; return the folder."""
    converted(dense(), folder, output__max_shard_size=size)
    return folder


@pytest.mark.parametrize("prune", [True, False])
def test_stale_shards_go_and_what_others_put_there_stays(
    hub: Hub, dense: Dense, tmp_path: Path, prune: bool
) -> None:
    many = sharded(dense, tmp_path / "many", "400KB")
    shards = [path.name for path in many.glob("model-*.safetensors")]
    assert len(shards) > 2
    pushed(many)
    repo = hub.repos[NAME]
    files = dict(repo.at("main").files)
    files["notes.txt"] = files["other.safetensors"] = files["config.json"]
    files[shards[0]] = files[shards[1]]
    repo.commit("main", files, "somebody else's")
    done = pushed(sharded(dense, tmp_path / "one", "5GB"), prune=prune)
    left = set(repo.at("main").files)
    assert {"notes.txt", "other.safetensors", WEIGHTS, shards[0], ".gitattributes"} <= left
    gone = {*shards[1:], "model.safetensors.index.json"}
    assert set(done.deleted) == (gone if prune else set())
    assert gone.isdisjoint(left) == prune


def test_a_dry_run_lists_and_changes_nothing(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = pushed(folder, dry_run=True)
    assert wanted.uploaded == wanted.files
    assert not hub.repos
    pushed(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    before = len(hub.calls)
    assert list(pushed(folder, dry_run=True).uploaded) == ["README.md"]
    assert not [call for call in hub.calls[before:] if not call.startswith(("GET", "HEAD"))]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    offline = pushed(folder, dry_run=True)
    assert (offline.uploaded, offline.compared) == (offline.files, False)


FAULTS = {
    "create fails": [Fault("POST", "/repos/create")],
    "create is lost": [Fault("POST", "/repos/create", after_bytes=0)],
    "card check fails": [Fault("POST", "/validate-yaml", 503)],
    "preupload fails": [Fault("POST", "/preupload/")],
    "batch is dropped": [Fault("POST", "objects/batch", 0)],
    "upload fails": [Fault("PUT", "/lfs/", 500, times=2)],
    "upload is dropped": [Fault("PUT", "/lfs/", 0, times=2)],
    "commit fails": [Fault("POST", "/commit/", 502, times=2)],
    "commit is dropped": [Fault("POST", "/commit/", 0)],
    "commit is lost": [Fault("POST", "/commit/", after_bytes=0)],
    "everything": [
        Fault(method, "", status) for method in ("GET", "POST", "PUT") for status in (0, 500)
    ],
}


@pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS)
def test_faults_that_pass_are_waited_out(hub: Hub, folder: Path, faults: list[Fault]) -> None:
    hub.faults = [Fault(**vars(fault)) for fault in faults]
    done = pushed(folder)
    assert not [fault for fault in hub.faults if fault.times]
    assert holds(hub.repos[NAME], folder)
    assert len(hub.repos[NAME].commits) == 2
    assert done.commit == hub.repos[NAME].refs["main"]


def test_a_push_that_failed_goes_on_where_it_stopped(hub: Hub, folder: Path) -> None:
    hub.faults = [Fault("POST", "/commit/", 500, times=99)]
    with pytest.raises(HubError, match="status 500, several times") as failed:
        pushed(folder, private=True)
    assert failed.value.hint == f"Go on with: moe-convert push {folder} {NAME} --private"
    assert len(hub.asked("PUT /lfs/")) == num_large(folder)
    hub.faults = []
    pushed(folder)
    assert len(hub.asked("PUT /lfs/")) == num_large(folder)
    assert holds(hub.repos[NAME], folder)


def offline(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def gone(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    patch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")


def full(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    hub.quota_bytes = 1000


def too_large(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    hub.faults = [Fault("POST", "/commit/", 413, 99, "Payload too large")]


def busy(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    hub.faults = [Fault("GET", "/api/models", 429, 99)]


def public(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    hub.repos[NAME] = Repo(NAME, private=False)
    hub.repos[NAME].commit("main", {}, "begun")


def private(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    public(hub, patch)
    hub.repos[NAME].private = True


def nothing(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    pass


def newline(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    hub.faults = [Fault("GET", "/api/models", 400, 99, f"strange\n\nheader {TOKEN}\n")]


Setting = Callable[[Hub, pytest.MonkeyPatch], None]
REFUSED: dict[str, tuple[Setting, str, list[str], str]] = {
    "wrong token": (nothing, "hf_" + "w" * 34, [], "does not accept the token.*hf auth login"),
    "no token": (nothing, "", [], "no Hub token here.*hf auth login"),
    "no rights, new": (nothing, READ_TOKEN, [], "may not write to org/result.*access to org"),
    "no rights, there": (public, READ_TOKEN, [], "may not write to org/result.*access to org"),
    "stranger": (nothing, STRANGER_TOKEN, [], "may not write to org/result.*access to org"),
    "stranger, hidden": (private, STRANGER_TOKEN, [], "may not write to org/result"),
    "is public": (public, TOKEN, ["--private"], "is public, and --private was asked for"),
    "is private": (
        private,
        TOKEN,
        ["--public", "--license", "mit"],
        "is private, and --public was asked for",
    ),
    "offline": (offline, TOKEN, [], "HF_HUB_OFFLINE is set"),
    "unreachable": (gone, TOKEN, [], "cannot be reached.*nothing was lost"),
    "quota": (full, TOKEN, [], "takes no more.*storage limit.*Free some space"),
    "too large": (too_large, TOKEN, [], "takes no more.*413"),
    "rate limit": (busy, TOKEN, [], "too many requests"),
    "echo": (newline, TOKEN, [], r"refuses with status 400: strange header \*\*\*"),
}


def one_line(result: Result, code: int) -> str:
    """Return the one line of an error."""
    assert result.exit_code == code, result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr.strip()


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_hub_refuses_is_one_line_and_the_command_to_go_on(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    setting, token, options, pattern = REFUSED[case]
    setting(hub, monkeypatch)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    # The line of progress is for people who wait; nothing else may come before the error.
    line = one_line(invoke("push", folder, NAME, *options, "--no-progress"), 6)
    assert re.search(pattern, line), line
    assert line.endswith(" ".join(["moe-convert push", str(folder), NAME, *options])), line
    assert not token or token not in line
    envelope = json.loads(invoke("push", folder, NAME, *options, "--json").stdout)
    assert (envelope["exit_code"], envelope["error"]["code"]) == (6, "hub")
    assert not token or token not in json.dumps(envelope)


def test_a_token_of_any_form_is_left_out(hub: Hub, folder: Path) -> None:
    secret = "open-sesame/1234"
    hub.faults = [Fault("GET", "/api/models", 400, 99, f"bad header {secret}")]
    with pytest.raises(HubError, match=r"bad header \*\*\*") as failed:
        pushed(folder, token=secret)
    assert secret not in str(failed.value)
    for text in (f"found {TOKEN}.", "sent Bearer abc", "hf_oauth_" + "a1" * 12):
        assert "***" in str(MoeConvertError("It broke.", text))
        assert not re.search("Secret|abc|a1a1", str(MoeConvertError(text)))
    assert str(MoeConvertError("org/hf_model is fine.")) == "org/hf_model is fine."


def failed_check(folder: Path) -> None:
    edit_json(folder / "moe_convert.json", lambda data: data.update(state="failed"))


def changed_weights(folder: Path) -> None:
    with (folder / WEIGHTS).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")


def changed_config(folder: Path) -> None:
    edit_json(folder / "config.json", lambda data: data.update(num_experts_per_tok=1))


def lost_file(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def unknown_weights(folder: Path) -> None:
    shutil.copyfile(folder / WEIGHTS, folder / "extra.safetensors")


def no_manifest(folder: Path) -> None:
    (folder / "moe_convert.json").unlink()


def token_in_card(folder: Path) -> None:
    with (folder / "README.md").open("a") as file:
        file.write(f"\nlogin with {TOKEN}\n")


def other_licence(folder: Path) -> None:
    edit_json(folder / "moe_convert.json", lambda data: data["source"].update(license="mit"))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")


UNFIT: dict[str, tuple[Callable[[Path], None], type[MoeConvertError], str]] = {
    "failed its check": (failed_check, VerificationError, "failed its verification"),
    "weights changed": (changed_weights, VerificationError, f"{WEIGHTS} .* not the file"),
    "config changed": (changed_config, VerificationError, "config.json .* not the file"),
    "file lost": (lost_file, VerificationError, "tokenizer.json .* is missing"),
    "unknown weights": (unknown_weights, VerificationError, "extra.safetensors .* not in its"),
    "no manifest": (no_manifest, SourceError, "has no moe_convert.json"),
    "token in a file": (token_in_card, UsageError, "README.md .* holds your Hub token"),
    "licence": (other_licence, UsageError, "is under mit, and README.md says apache-2.0"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_a_folder_that_is_not_what_it_says_is_not_published(
    hub: Hub, folder: Path, case: str
) -> None:
    spoil, kind, pattern = UNFIT[case]
    spoil(folder)
    with pytest.raises(kind, match=pattern) as refused:
        pushed(folder)
    assert TOKEN not in str(refused.value)
    assert not hub.repos
    if case != "failed its check":
        with pytest.raises(kind, match=pattern):
            pushed(folder, force=True)
        return
    assert "--force" in resume_command(folder, push_section(repo_id=NAME), force=True)
    pushed(folder, force=True)
    assert holds(hub.repos[NAME], folder)


def info(name: str, license: str | None, license_name: str | None = None) -> SourceInfo:  # noqa: A002
    """Describe a source."""
    return SourceInfo(
        id=name, revision=None, sha=None, architecture="Llama", params=1, dtype="F32",
        license=license, license_name=license_name,
    )  # fmt: skip


MIT, APACHE, NONE = info("a", "mit"), info("b", "apache-2.0"), info("c", None)
LLAMA, QWEN = info("l", "other", "llama"), info("q", "other", "qwen")
LICENCES: dict[str, tuple[list[SourceInfo], str | None, str | None, bool, str]] = {
    "one": ([MIT], None, None, True, "mit"),
    "one, asked": ([MIT], "MIT", None, True, "mit"),
    "one, other asked": ([MIT], "apache-2.0", None, False, "!a is under mit, and --license asks"),
    "one, other stated": ([MIT], None, "gpl", False, "!README.md says gpl"),
    "two alike": ([MIT, MIT, NONE], None, None, True, "mit"),
    "two": ([MIT, APACHE], None, None, False, "!a is under mit, b is under apache-2.0"),
    "two, asked": ([MIT, APACHE], "apache-2.0", None, True, "apache-2.0"),
    "two, stated": ([MIT, APACHE], None, "mit", True, "mit"),
    "two, contradicted": ([MIT, APACHE], "mit", "gpl", True, "!README.md says gpl"),
    "two of their own": ([LLAMA, QWEN], None, None, False, r"!l is under other \(llama\)"),
    "none, private": ([NONE], None, None, False, "None"),
    "none, public": ([NONE], None, None, True, "!No licence of c is known"),
    "none, public, asked": ([NONE], "mit", None, True, "mit"),
}


@pytest.mark.parametrize("case", LICENCES)
def test_licences_that_conflict_are_refused(case: str) -> None:
    sources, asked, stated, is_public, expected = LICENCES[case]
    if not expected.startswith("!"):
        assert str(check_licence(sources, asked, stated, public=is_public)) == expected
        return
    with pytest.raises(UsageError, match=expected[1:]):
        check_licence(sources, asked, stated, public=is_public)


@pytest.mark.parametrize(
    ("values", "pattern"),
    [
        ({"repo_id": "result"}, "push.repo_id: a repository is named org/name"),
        ({"repo_id": NAME, "create_pr": True, "branch": "v2"}, "opened against main"),
    ],
)
def test_settings_that_cannot_work_are_usage_errors(values: dict[str, Any], pattern: str) -> None:
    with pytest.raises(UsageError, match=pattern):
        push_section(**values)


@pytest.mark.parametrize("case", ["wrong token", "no token", "no rights, new", "stranger"])
def test_rights_are_checked_before_a_conversion(
    hub: Hub, dense: Dense, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    _, token, _, pattern = REFUSED[case]
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    options = ["-e", "4", "-o", tmp_path / "out", "--push", NAME, "--json"]
    result = invoke("upcycle", dense(), *options)
    assert result.exit_code == 6
    error = json.loads(result.stdout)["error"]
    assert re.search(pattern.split(".*")[0], error["message"])
    assert error["hint"].endswith("run the same command again")
    assert not (tmp_path / "out").exists()
    assert not hub.repos


def test_other_visibility_is_refused_before_a_conversion(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    public(hub, monkeypatch)
    with pytest.raises(HubError, match="is public, and --private"):
        check_target(push_section(repo_id=NAME, private=True), TOKEN)
    check_target(push_section(repo_id=NAME), TOKEN)
    check_target(push_section(repo_id=NAME, create_pr=True), STRANGER_TOKEN)


def test_a_recipe_converts_and_publishes_in_one_command(
    hub: Hub, dense: Dense, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(
        f"schema: moe-convert/recipe/1\nsource: {{model: {dense()}}}\n"
        f"target: {{num_experts: 4}}\noutput: {{dir: {out}}}\n"
        f"push: {{repo_id: {NAME}, branch: v1}}\n"
    )
    plan = as_json("plan", "-r", recipe)
    assert (plan["push"]["repo_id"], plan["push"]["branch"]) == (NAME, "v1")
    assert NAME in invoke("plan", "-r", recipe).stdout
    assert not hub.repos
    told = as_json("upcycle", "-r", recipe)["hub"]
    assert holds(hub.repos[NAME], out, "v1")
    assert (told["repo_id"], told["private"]) == (NAME, True)
    assert told["commit"] == hub.repos[NAME].refs["v1"]
    assert told["uploaded_bytes"] > 0
    assert load_manifest(out).recipe["push"]["repo_id"] is None
    again = as_json("push", out, NAME, "--branch", "v1", "--dry-run")
    assert (again["status"], again["hub"]["uploaded_bytes"]) == ("planned", 0)
    assert {file["action"] for file in again["hub"]["files"]} == {"keep"}
    assert invoke("push", out, NAME, "--branch", "v1", "-q").stdout.strip() == told["url"]


def test_a_push_that_fails_after_the_conversion_keeps_the_folder(
    hub: Hub, dense: Dense, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.quota_bytes = 1000
    out = tmp_path / "out"
    result = invoke("upcycle", dense(), "-e", "4", "-o", out, "--push", NAME, "--json")
    told = json.loads(result.stdout)
    assert (result.exit_code, told["status"], told["target"]["path"]) == (6, "failed", str(out))
    assert told["error"]["hint"].endswith(f"moe-convert push {out} {NAME}")
    assert load_manifest(out).state == "verified"
    hub.quota_bytes = None
    assert invoke("push", out, NAME).exit_code == 0
    assert holds(hub.repos[NAME], out)


LOAD = """
import sys, torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM
print(snapshot_download(sys.argv[1]))
far, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
near = AutoModelForCausalLM.from_pretrained(sys.argv[2])
ids = torch.arange(24).view(2, 12)
assert torch.equal(far(ids).logits, near(ids).logits)
"""


@pytest.fixture(params=["xet", "lfs"])
def own_process(
    request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[tuple[Hub, Callable[..., subprocess.CompletedProcess[str]]]]:
    """Serve a Hub and return what runs a program that knows it by its environment alone."""
    with serving(tmp_path / "cas") as hub:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        environment |= hub.environment(tmp_path / "home")
        if request.param == "lfs":
            environment["HF_HUB_DISABLE_XET"] = "1"

        def run(*words: object, **changes: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [str(word) for word in words], check=False, capture_output=True, text=True,
                env={**environment, **changes},
            )  # fmt: skip

        yield hub, run


def test_both_storages_take_and_give_back_every_byte(
    own_process: tuple[Hub, Callable[..., subprocess.CompletedProcess[str]]],
    folder: Path,
    request: pytest.FixtureRequest,
) -> None:
    hub, run = own_process
    hub.faults = [Fault("POST", "/commit/", 500), Fault("POST", "/preupload/", 0)]
    first = run(SCRIPT, "push", folder, NAME, "--json")
    assert first.returncode == 0, first.stderr
    repo = hub.repos[NAME]
    assert holds(repo, folder)
    by_xet = "xet" in request.node.callspec.id
    assert bool(hub.asked("xet-write-token")) == by_xet
    assert bool(hub.asked("PUT /lfs/")) != by_xet
    again = json.loads(run(SCRIPT, "push", folder, NAME, "--json").stdout)["hub"]
    assert (again["uploaded_bytes"], len(repo.commits)) == (0, 2)
    (folder / "NOTES.md").write_text("more")
    pull = json.loads(run(SCRIPT, "push", folder, NAME, "--create-pr", "--json").stdout)["hub"]
    assert pull["pr_url"] == f"{hub.url}/{NAME}/discussions/1"
    assert holds(repo, folder, "refs/pr/1")
    (folder / "NOTES.md").unlink()
    assert holds(repo, folder)
    loaded = run(sys.executable, "-c", LOAD, NAME, folder)
    assert loaded.returncode == 0, loaded.stderr
    back = Path(loaded.stdout.splitlines()[0])
    assert {name: digest(back)[name] for name in publishable(folder)} == {
        name: digest(folder)[name] for name in publishable(folder)
    }


def test_a_token_in_the_environment_is_written_nowhere(
    own_process: tuple[Hub, Callable[..., subprocess.CompletedProcess[str]]],
    dense: Dense,
    tmp_path: Path,
) -> None:
    hub, run = own_process
    out, log = tmp_path / "out", tmp_path / "log.txt"
    planted = "hf_" + "PlantedSecret" * 2 + "abc123"
    hub.accounts[planted] = hub.accounts[TOKEN]
    verbose = ["-v", "-v", "--log-file", log]
    said = []
    for words, token in (
        (["upcycle", dense(), "-e", "4", "-o", out, "--push", NAME, *verbose], planted),
        (["push", out, NAME, "--private", *verbose], planted),
        (["push", out, "org/new", "--token", planted, "--public", "--license", "mit"], ""),
        (["push", out, "nobody/new", "--token", planted, *verbose], ""),
        (["push", out, "nobody/new", "--token", planted + "\n", *verbose], ""),
        (["push", out, NAME, *verbose], planted + "x"),
        (["push", out, NAME, "--token", planted + "\u00e9", *verbose], ""),
    ):
        done = run(SCRIPT, *words, HF_TOKEN=token)
        said.append(done.stdout + done.stderr)
    assert hub.tokens >= {f"Bearer {planted}", f"Bearer {planted}x"}
    assert all(planted not in text for text in said), said
    assert [text for text in said if "Traceback" in text] == []
    places = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert out / "moe_convert.json" in places
    assert log in places
    assert [path for path in places if planted.encode() in path.read_bytes()] == []
