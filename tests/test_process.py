"""The installed program in processes of its own: start-up, interruption, `python -m`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moe_convert.checkpoint import sha256_of
from tests.conftest import Dense
from tests.test_cli import invoke
from tests.tools import converted

SCRIPT = Path(sys.executable).with_name("moe-convert")
NO_TORCH = """
import sys
from typer.testing import CliRunner
from typer.main import get_command
from moe_convert.cli import app

def commands(group, path):
    for name, command in getattr(group, "commands", {}).items():
        yield [*path, name]
        yield from commands(command, [*path, name])

everything = list(commands(get_command(app), []))
assert ["upcycle"] in everything and ["recipes", "ls"] in everything, everything
light = [["recipes", "ls"], ["recipes", "show", "quickstart"], ["recipes", "schema"],
         ["recipes", "validate", "quickstart"], ["archs", "ls"], ["methods", "ls"], ["version"]]
for arguments in [[], *everything]:
    result = CliRunner().invoke(app, [*arguments, "--help"])
    assert result.exit_code == 0 and "Usage" in result.stdout, (arguments, result.output)
for arguments in light:
    assert CliRunner().invoke(app, arguments).exit_code == 0, arguments
heavy = {"torch", "transformers", "numpy", "huggingface_hub"} & set(sys.modules)
assert not heavy, heavy
"""
DEEP = 80


@pytest.mark.parametrize("form", [[], ["-q"], ["--json"]])
def test_a_reader_that_stops_is_no_bug(form: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    argv = [str(SCRIPT), "recipes", "schema", *form]
    done = subprocess.run(argv, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_help_and_the_gallery_need_no_torch() -> None:
    result = subprocess.run(
        [sys.executable, "-c", NO_TORCH], check=False, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_the_script_and_the_module_are_the_same_program() -> None:
    for program in ([str(SCRIPT)], [sys.executable, "-m", "moe_convert"]):
        result = subprocess.run(
            [*program, "version", "--json"], check=False, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        assert result.stderr == ""
        assert json.loads(result.stdout)["command"] == "version"


def test_help_names_what_people_need_first() -> None:
    text = invoke("upcycle", "--help").stdout
    first = text[: text.index("─ Recipe ")]
    for option in ("--recipe", "--output", "--target", "--experts", "--top-k", "--dry-run"):
        assert option in first
    assert "Dangerous options" in text


def test_ctrl_c_keeps_what_is_done_and_tells_how_to_go_on(dense: Dense, tmp_path: Path) -> None:
    source = dense(num_hidden_layers=DEEP)
    output, partial = tmp_path / "out", tmp_path / "out.partial"
    arguments = ["upcycle", str(source), "-o", str(output), "-e", "4", "--no-verify"]
    with subprocess.Popen(
        [str(SCRIPT), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        journal = partial / ".progress"
        while process.poll() is None and not (
            journal.exists() and journal.read_text().count("\n") > 3
        ):
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stdout == ""
    assert "Traceback" not in stderr
    assert f"Resume with: moe-convert {' '.join(arguments)}" in stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.partial"]
    done = journal.read_text().splitlines()
    assert 3 < len(done) < DEEP
    assert invoke(*arguments).exit_code == 0
    assert not partial.exists()
    converted(source, tmp_path / "whole")
    weights = "model.safetensors"
    assert sha256_of(output / weights) == sha256_of(tmp_path / "whole" / weights)
