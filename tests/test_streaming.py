"""Invariants 5 and 6: memory that does not grow with the model, and runs that may be killed."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moe_convert.checkpoint import read_folder
from moe_convert.convert import convert
from moe_convert.errors import OutputExistsError
from moe_convert.manifest import MANIFEST_NAME
from tests.conftest import Dense
from tests.tools import converted, difference, digest, hollow, logits, planned

LAYER_BYTES = 23_000_000
NOISE_LAYERS = 3
"""How many layers' worth the allocator may differ by between two runs of one process."""
MEASURE = """
import json, shutil, sys
from pathlib import Path
from tests.tools import converted

def peak_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

peaks = []
for source, dtype, size in json.loads(sys.argv[2]):
    output = Path(sys.argv[1]) / "out"
    converted(source, output, target__num_experts=2, target__dtype=dtype, router__measure=False,
              output__max_shard_size=size)
    peaks.append(peak_bytes())
    shutil.rmtree(output)
print(json.dumps(peaks))
"""
KILLED = """
import os, signal, sys
from tests.tools import planned
from moe_convert.convert import convert

def progress(what, done, total):
    if what == "convert" and 2 * done > total:
        os.kill(os.getpid(), signal.SIGKILL)

convert(planned(sys.argv[1], sys.argv[2], output__max_shard_size=sys.argv[3]), progress)
"""


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        check=False,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc to see the peak")
def test_memory_does_not_grow_with_layers_or_shards(tmp_path: Path) -> None:
    """Tensors that are kept would add 23 MB for each of the 24 additional layers: 552 MB."""
    sizes = {
        "hidden_size": 1024,
        "intermediate_size": 2560,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
    }
    few = str(hollow(tmp_path / "few", num_layers=2, **sizes))
    many = str(hollow(tmp_path / "many", num_layers=26, **sizes))
    runs = [
        (few, "auto", "5GB"),
        (many, "auto", "5GB"),
        (many, "auto", "20MB"),
        (few, "fp32", "5GB"),
        (many, "fp32", "5GB"),
    ]
    result = run_python(MEASURE, str(tmp_path), json.dumps(runs))
    assert result.returncode == 0, result.stderr
    copied_few, copied_many, sharded, cast_few, cast_many = json.loads(result.stdout)
    assert copied_many - copied_few < NOISE_LAYERS * LAYER_BYTES
    assert sharded - copied_many < NOISE_LAYERS * LAYER_BYTES
    assert cast_many - cast_few < NOISE_LAYERS * LAYER_BYTES


@pytest.fixture(scope="module")
def killed(dense: Dense, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where the output of a run that was killed half-way would have been."""
    output = tmp_path_factory.mktemp("killed") / "out"
    before = digest(dense())
    result = run_python(KILLED, str(dense()), str(output), "5GB")
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert digest(dense()) == before
    assert [path.name for path in output.parent.iterdir()] == ["out.partial"]
    return output


@pytest.fixture
def interrupted(killed: Path, tmp_path: Path) -> Path:
    """Return an output folder beside a fresh copy of what the killed run left."""
    shutil.copytree(killed.with_name("out.partial"), tmp_path / "out.partial")
    return tmp_path / "out"


def without_manifest(folder: Path) -> dict[str, str]:
    return {name: sha for name, sha in digest(folder).items() if name != MANIFEST_NAME}


def deface(partial: Path) -> bytes:
    """Overwrite the start of an expert of layer 0, which the killed run had finished."""
    ref = read_folder(partial)["model.layers.0.block_sparse_moe.experts.0.w1.weight"]
    with ref.path.open("r+b") as file:
        file.seek(ref.offset)
        file.write(b"defaced!")
    return b"defaced!"


def first_bytes(folder: Path) -> bytes:
    ref = read_folder(folder)["model.layers.0.block_sparse_moe.experts.0.w1.weight"]
    with ref.path.open("rb") as file:
        file.seek(ref.offset)
        return file.read(8)


def test_a_killed_run_resumes_to_the_same_bytes(
    dense: Dense, interrupted: Path, tmp_path: Path
) -> None:
    converted(dense(), interrupted)
    converted(dense(), tmp_path / "whole")
    assert without_manifest(interrupted) == without_manifest(tmp_path / "whole")
    assert not interrupted.with_name("out.partial").exists()
    assert difference(logits(interrupted), logits(dense())) <= 1e-4


def test_a_killed_run_of_several_files_resumes_to_the_same_bytes(
    dense: Dense, tmp_path: Path
) -> None:
    """Several files are written at once, so later steps are partly done and not recorded."""
    shards = {"output__max_shard_size": "200KB"}
    result = run_python(KILLED, str(dense()), str(tmp_path / "out"), "200KB")
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert len(list((tmp_path / "out.partial").glob("*.safetensors"))) > 2
    manifest = converted(dense(), tmp_path / "out", **shards)
    converted(dense(), tmp_path / "whole", **shards)
    assert without_manifest(tmp_path / "out") == without_manifest(tmp_path / "whole")
    hashes = digest(tmp_path / "out")
    assert {file.path: file.sha256 for file in manifest.target.files}.items() <= hashes.items()


def test_resuming_skips_what_is_finished(dense: Dense, interrupted: Path) -> None:
    mark = deface(interrupted.with_name("out.partial"))
    converted(dense(), interrupted)
    assert first_bytes(interrupted) == mark


def test_another_recipe_begins_anew(dense: Dense, interrupted: Path, tmp_path: Path) -> None:
    mark = deface(interrupted.with_name("out.partial"))
    converted(dense(), interrupted, router__seed=7)
    assert first_bytes(interrupted) != mark
    converted(dense(), tmp_path / "whole", router__seed=7)
    assert without_manifest(interrupted) == without_manifest(tmp_path / "whole")


def test_a_changed_source_begins_anew(dense: Dense, interrupted: Path, tmp_path: Path) -> None:
    mark = deface(interrupted.with_name("out.partial"))
    changed = tmp_path / "dense-model"
    shutil.copytree(dense(), changed)
    converted(changed, interrupted)
    assert first_bytes(interrupted) != mark


def test_an_error_keeps_the_partial_folder_and_no_output(dense: Dense, tmp_path: Path) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if what == "convert":
            raise KeyboardInterrupt

    output = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        convert(planned(dense(), output), stop)
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["out.partial"]
    converted(dense(), output)
    assert output.is_dir()


def test_a_folder_of_someone_else_is_never_removed(dense: Dense, tmp_path: Path) -> None:
    """Neither where the result goes nor where it is built."""
    for name in ("out", "out.partial"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "thesis.txt").write_text("years of work", encoding="utf-8")
        with pytest.raises(OutputExistsError):
            converted(dense(), tmp_path / "out", output__overwrite=True)
        assert (folder / "thesis.txt").read_text(encoding="utf-8") == "years of work"
        shutil.rmtree(folder)


def test_overwrite_replaces_an_earlier_result_whole(dense: Dense, tmp_path: Path) -> None:
    output = tmp_path / "out"
    converted(dense(), output)
    (output / "stale.txt").write_text("left over", encoding="utf-8")
    (tmp_path / "out.old").mkdir()
    (tmp_path / "out.old" / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(OutputExistsError, match="exists already"):
        converted(dense(), output, target__num_experts=8)
    converted(dense(), output, target__num_experts=8, output__overwrite=True)
    assert not (output / "stale.txt").exists()
    assert json.loads((output / "config.json").read_text())["num_local_experts"] == 8
