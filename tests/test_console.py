"""What is printed: one JSON object for programs, one line for scripts, results only on stdout."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from jsonschema import Draft202012Validator, FormatChecker
from rich.console import Console

from moe_convert.console import _LineReport
from tests.conftest import Dense
from tests.test_cli import invoke
from tests.tools import edit_tensors

INTEGER, NUMBER, STRING, BOOLEAN = ({"type": t} for t in ("integer", "number", "string", "boolean"))
MAYBE_STRING = {"type": ["string", "null"]}
FILE = {"type": "object", "properties": {"path": STRING, "size": INTEGER, "sha256": STRING}}
WARNING = {
    "type": "object",
    "required": ["code", "message"],
    "properties": {"code": STRING, "message": STRING, "hint": STRING},
}
RESULT_SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "$id": "moe-convert/result/1",
    "type": "object",
    "required": [
        "schema", "command", "status", "exit_code", "version", "started_at", "duration_s",
        "warnings",
    ],
    "properties": {
        "schema": {"const": "moe-convert/result/1"},
        "command": STRING,
        "status": {"enum": ["ok", "planned", "failed", "gate_failed", "interrupted"]},
        "exit_code": INTEGER,
        "version": {"type": "object", "additionalProperties": STRING},
        "started_at": {"type": "string", "format": "date-time"},
        "duration_s": NUMBER,
        "source": {
            "type": "object",
            "properties": {
                "id": STRING, "revision": MAYBE_STRING, "sha": MAYBE_STRING, "architecture": STRING,
                "params": INTEGER, "dtype": STRING, "license": MAYBE_STRING,
            },
        },
        "target": {
            "type": "object",
            "properties": {
                "architecture": STRING, "path": MAYBE_STRING, "num_experts": INTEGER,
                "top_k": INTEGER, "shared_experts": INTEGER,
                "moe_layers": {"type": "array", "items": INTEGER}, "expert_size": INTEGER,
                "params_total": INTEGER, "params_active": INTEGER,
                "files": {"type": "array", "items": FILE},
            },
        },
        "estimate": {
            "type": "object",
            "properties": {
                "download_bytes": INTEGER, "ram_bytes": INTEGER, "vram_bytes": INTEGER,
                "disk_bytes": INTEGER, "fits": BOOLEAN,
                "time_s": {"type": "array", "items": NUMBER, "minItems": 2, "maxItems": 2},
                "assumptions": {"type": "array", "items": STRING},
            },
        },
        "verify": {
            "type": "object",
            "properties": {
                "passed": BOOLEAN, "missing_keys": {"type": "array"},
                "unexpected_keys": {"type": "array"}, "max_abs_diff": NUMBER, "kl": NUMBER,
                "top1_agreement": NUMBER,
            },
        },
        "hub": {
            "type": ["object", "null"],
            "required": ["repo_id", "url", "commit", "pr_url", "private", "uploaded_bytes"],
            "properties": {
                "repo_id": STRING, "url": STRING, "commit": STRING, "pr_url": MAYBE_STRING,
                "private": BOOLEAN, "uploaded_bytes": INTEGER,
            },
        },
        "artifacts": {"type": "object", "additionalProperties": STRING},
        "warnings": {"type": "array", "items": WARNING},
        "error": {
            "type": ["object", "null"],
            "properties": {"code": STRING, "message": STRING, "hint": STRING},
        },
    },
}  # fmt: skip
"""The contract that programs rely on, written out a second time on purpose."""
PROMISED = {
    "source": RESULT_SCHEMA["properties"]["source"]["properties"],
    "target": RESULT_SCHEMA["properties"]["target"]["properties"],
    "estimate": RESULT_SCHEMA["properties"]["estimate"]["properties"],
    "verify": RESULT_SCHEMA["properties"]["verify"]["properties"],
}
SECRET = "hf_" + "s" * 34


def as_json(*arguments: object) -> dict[str, Any]:
    """Run with --json; stdout must be one valid object that agrees with the exit code."""
    result = invoke(*arguments, "--json")
    found: dict[str, Any] = json.loads(result.stdout)
    assert result.stdout.count("\n") == 1
    Draft202012Validator(RESULT_SCHEMA, format_checker=FormatChecker()).validate(found)
    assert found["exit_code"] == result.exit_code
    assert found["command"] == arguments[0]
    return found


def assert_complete(found: dict[str, Any], *sections: str) -> None:
    for section in sections:
        assert set(PROMISED[section]) <= set(found[section]), section


def test_json_of_a_conversion(dense: Dense, tmp_path: Path) -> None:
    output = tmp_path / "out"
    found = as_json("upcycle", dense(), "-o", output, "-e", "4")
    assert (found["status"], found["error"]) == ("ok", None)
    assert_complete(found, "source", "target", "verify")
    assert found["verify"]["passed"]
    assert found["verify"]["max_abs_diff"] <= 1e-4
    assert found["target"]["path"] == str(output)
    for file in found["target"]["files"]:
        assert (output / file["path"]).stat().st_size == file["size"]


@pytest.mark.parametrize("command", [["plan"], ["upcycle", "--dry-run"]])
def test_json_of_a_plan(dense: Dense, tmp_path: Path, command: list[str]) -> None:
    found = as_json(*command, dense(), "-o", tmp_path / "out", "-k", "1")
    assert found["status"] == "planned"
    assert_complete(found, "source", "target", "estimate")
    assert found["target"]["path"] == str(tmp_path / "out")
    assert "top1_renormalized" in {note["code"] for note in found["warnings"]}
    assert not (tmp_path / "out").exists()


def test_json_of_failures(dense: Dense, tmp_path: Path) -> None:
    for arguments, code, name in (
        (["upcycle", dense(), "-e", "1"], 2, "usage"),
        (["upcycle", tmp_path], 3, "source"),
        (["plan", "org/name"], 6, "hub"),
        (["upcycle", dense(), "-o", tmp_path], 7, "output_exists"),
    ):
        found = as_json(*arguments)
        assert (found["status"], found["exit_code"]) == ("failed", code)
        assert found["error"]["code"] == name
        assert found["error"]["message"]


def test_json_of_a_verification(dense: Dense, finished: Path, tmp_path: Path) -> None:
    good = as_json("verify", finished, "--source", dense())
    assert_complete(good, "verify")
    assert good["status"] == "ok"
    broken = Path(shutil.copytree(finished, tmp_path / "broken"))
    edit_tensors(broken, lambda d: d["model.norm.weight"].mul_(2))
    bad = as_json("verify", broken, "--source", dense())
    assert (bad["status"], bad["exit_code"], bad["error"]["code"]) == (
        "gate_failed", 5, "verification",
    )  # fmt: skip
    assert not bad["verify"]["passed"]


def test_quiet_is_one_line(dense: Dense, finished: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = invoke("upcycle", dense(), "-o", output, "-e", "4", "-q")
    assert result.stdout == f"{output}\n"
    assert all(line.startswith("warning: ") for line in result.stderr.splitlines())
    assert invoke("verify", finished, "--source", dense(), "-q").stdout == "ok\n"
    assert invoke("plan", dense(), "-o", output, "-q").stdout == f"{output}\n"


def test_the_format_may_come_from_the_environment(
    dense: Dense, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOE_CONVERT_FORMAT", "json")
    assert json.loads(invoke("plan", dense()).stdout)["status"] == "planned"
    assert invoke("plan", dense(), "-q").stdout.count("\n") == 1


def test_people_get_results_on_stdout_and_the_rest_on_stderr(dense: Dense, tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = invoke("upcycle", dense(), "-o", output, "-e", "4", "-k", "1")
    assert result.exit_code == 0
    assert result.stdout.rstrip().endswith(f"verified  {output}")
    for word in ("parity", "float32", "0 missing, 0 unexpected", "tokenizer identical"):
        assert word in result.stdout
    for word in ("mixtral", "vLLM", "active per token", "warning:", "convert: 100%"):
        assert word in result.stderr
        assert word not in result.stdout
    assert "\x1b" not in result.output
    quiet = invoke("upcycle", dense(), "-o", tmp_path / "two", "-e", "4", "--no-progress")
    assert "convert:" not in quiet.stderr


def test_the_plan_is_a_result(dense: Dense) -> None:
    result = invoke("plan", dense(), "-v")
    for word in (
        "mixtral",
        "llama.cpp",
        "SGLang",
        "memory",
        "model.layers.0.self_attn.q_proj.weight",
    ):
        assert word in result.stdout


def test_every_target_that_does_not_fit_is_explained(dense: Dense) -> None:
    result = invoke("plan", dense("mistral", "window"))
    assert "not glm4_moe" in result.stdout
    assert "sliding_window=8" in result.stdout


def test_a_log_file_takes_messages(dense: Dense, tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    assert invoke("plan", dense(), "--log-file", log).exit_code == 0
    assert log.exists()


def test_nothing_private_is_written(dense: Dense, tmp_path: Path) -> None:
    """No path of this machine and no token in anything that may be published."""
    output = tmp_path / "out"
    result = invoke("upcycle", dense(), "-o", output, "-e", "4", "--token", SECRET)
    assert result.exit_code == 0
    for name in ("moe_convert.json", "recipe.yaml", "config.json"):
        text = (output / name).read_text(encoding="utf-8")
        for private in (SECRET, str(tmp_path), str(dense().parent), str(Path.home()), "/tmp/"):
            assert private not in text, (name, private)
    assert SECRET not in result.output


def test_plain_progress_says_how_long_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([100.0, 110.0, 120.0])
    clock = SimpleNamespace(monotonic=lambda: next(times))
    monkeypatch.setattr("moe_convert.console.time", clock)
    out = io.StringIO()
    report = _LineReport(Console(file=out))
    for done in range(3):
        report("split", done, 4)
    assert out.getvalue().splitlines() == [
        "split: 0%",
        "split: 25%, 30 s left",
        "split: 50%, 20 s left",
    ]
