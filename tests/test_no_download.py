"""Converting a Hub source that is never downloaded: the same bytes, and no copy of its weights."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_convert.checkpoint import open_source
from moe_convert.checkpoint.ranged import PAGE_BYTES, RangedRef
from moe_convert.convert import convert
from moe_convert.errors import HubError, MoeConvertError, SourceError, UsageError
from moe_convert.manifest import load_manifest
from moe_convert.plan import make_plan
from moe_convert.workflow import upcycle, verify_folder
from tests.conftest import Dense
from tests.hub_store import TOKEN, Fault, Hub
from tests.test_cli import invoke
from tests.tools import converted, digest, edit_tensors, planned, recipe_of, tensors

NAME = "org/tiny"
SIZES = {"vocab_size": 4096, "hidden_size": 64, "num_hidden_layers": 3}
"""An embedding of 1 MB beside layers that are smaller: one is read in pieces, the others held."""


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try again at once."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)


@pytest.fixture(params=["one file", "shards"])
def source(request: pytest.FixtureRequest, hub: Hub, dense: Dense, tmp_path: Path) -> Path:
    """Serve a tiny Llama as org/tiny, in one file or in several; return its folder."""
    folder = dense(**SIZES)
    if request.param == "shards":
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        model.save_pretrained(tmp_path / "shards", max_shard_size="300KB")
        for file in folder.glob("tokenizer*"):
            (tmp_path / "shards" / file.name).write_bytes(file.read_bytes())
        folder = tmp_path / "shards"
        assert len(list(folder.glob("*.safetensors"))) > 2
    hub.add(NAME, folder, license="apache-2.0")
    return folder


def far(output: Path | None = None, **changes: Any) -> Any:
    """Return the plan of a source that stays where it is."""
    return planned(NAME, output, source__download=False, **changes)


def cached(tmp_path: Path) -> list[Path]:
    """Return every file in the Hub cache and in this test's folder, but results and the Hub."""
    places = (path for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink())
    own = ("near", "far", "far.partial", "shards", "xet")
    return [path for path in places if path.relative_to(tmp_path).parts[0] not in own]


METHODS: dict[str, dict[str, Any]] = {
    "clone": {},
    "edits": {"experts__edits": [{"edit": "noise", "std": 0.1}]},
    "split": {"experts__method": "split", "experts__strategy": "contiguous"},
    "zeros": {"router__init": "zeros"},
}


@pytest.mark.parametrize("method", METHODS)
def test_the_result_is_that_of_a_download_and_the_source_lies_nowhere(
    hub: Hub, source: Path, tmp_path: Path, method: str
) -> None:
    peaks: list[int] = []

    def watch(what: str, done: int, total: int) -> None:
        peaks.append(sum(path.stat().st_size for path in cached(tmp_path)))

    plan = far(tmp_path / "far", **METHODS[method])
    convert(plan, watch)
    weights = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    small = sum(path.stat().st_size for path in source.iterdir() if path.suffix == ".json")
    assert len(peaks) > 3
    assert max(peaks) < 2 * small + 20_000 < weights / 4
    assert not [path for path in cached(tmp_path) if path.suffix == ".safetensors"]
    assert hub.largest_answer_bytes < weights / 2
    converted(source, tmp_path / "near", **METHODS[method])
    near, ranged = digest(tmp_path / "near"), digest(tmp_path / "far")
    for name in ("moe_convert.json", "recipe.yaml"):
        del near[name], ranged[name]
    assert near == ranged


def test_recipe_and_manifest_are_those_of_a_download(
    hub: Hub, source: Path, tmp_path: Path
) -> None:
    convert(far(tmp_path / "far"))
    converted(NAME, tmp_path / "near")
    assert digest(tmp_path / "far")["recipe.yaml"] == digest(tmp_path / "near")["recipe.yaml"]
    one, other = (load_manifest(tmp_path / name) for name in ("far", "near"))
    assert one.source == other.source
    assert one.source.sha == hub.repos[NAME].refs["main"]


def test_every_byte_of_the_layers_is_asked_for_once(hub: Hub, dense: Dense, tmp_path: Path) -> None:
    hub.add(NAME, dense(**SIZES))
    plan = far(tmp_path / "far", target__num_experts=16)
    before = hub.sent_bytes
    convert(plan)
    weights = (dense(**SIZES) / "model.safetensors").stat().st_size
    header_and_rows_of_the_embedding = 100_000 + 2 * PAGE_BYTES
    assert hub.sent_bytes - before < weights + header_and_rows_of_the_embedding


def test_rows_and_pieces_are_the_bytes_of_the_file(
    hub: Hub, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moe_convert.checkpoint.ranged.CHUNK_BYTES", 40_000)
    monkeypatch.setattr("moe_convert.checkpoint.ranged.PAGE_BYTES", 1 << 10)
    local, remote = tensors(source), open_source(NAME, download=False).fetch().tensors
    assert local.keys() == remote.keys()
    for name, ref in remote.items():
        assert isinstance(ref, RangedRef)
        assert b"".join(ref.blocks()) == local[name]
        assert ref.read().shape == ref.shape
    table = remote["model.embed_tokens.weight"]
    row = table.num_bytes // table.shape[0]
    for start, stop in ((0, 1), (7, 13), (4095, 4096), (0, 4), (2, 3000)):
        found = b"".join(table.rows(start, stop).blocks())
        assert found == local[table.name][start * row : stop * row]


def test_the_plan_counts_traffic_but_no_disk(hub: Hub, source: Path) -> None:
    plan, usual = far(), planned(NAME)
    weights = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    assert plan.estimate.download_bytes == usual.estimate.download_bytes == weights
    assert usual.estimate.disk_bytes - plan.estimate.disk_bytes == weights
    assert plan.estimate.ram_bytes > usual.estimate.ram_bytes
    assert "parity_skipped" in {note.code for note in plan.warnings}
    shown = invoke("plan", NAME, "--no-download", "-e", "4").stdout
    assert "nothing kept" in shown


def test_the_check_says_what_it_could_not_compare(hub: Hub, source: Path, tmp_path: Path) -> None:
    manifest = upcycle(far(tmp_path / "far"))
    assert manifest.verify is not None
    assert manifest.verify.passed
    assert manifest.verify.tokenizer_identical
    assert manifest.verify.generation
    assert (manifest.verify.parity, manifest.verify.parity_expected) == ([], False)
    assert manifest.state == "converted"
    assert not [path for path in cached(tmp_path) if path.suffix == ".safetensors"]
    report, told = verify_folder(tmp_path / "far", str(source))
    assert told is not None
    assert (report.passed, told.state) == (True, "verified")


@pytest.mark.parametrize(
    "fault",
    [
        Fault("GET", "/cdn/", 500, times=3),
        Fault("GET", "/cdn/", 0, times=3),
        Fault("GET", "/cdn/", times=3, after_bytes=100),
        Fault("GET", "/resolve/.*safetensors", 503, times=3),
    ],
    ids=["status", "dropped", "cut off", "address"],
)
def test_faults_that_pass_are_waited_out(
    hub: Hub, source: Path, tmp_path: Path, fault: Fault
) -> None:
    plan = far(tmp_path / "far")
    source_refs = plan.source.fetch()
    hub.faults = [Fault(**vars(fault))]
    convert(plan)
    assert not hub.faults[0].times
    assert source_refs is plan.source.fetch()
    converted(source, tmp_path / "near")
    assert tensors(tmp_path / "far") == tensors(tmp_path / "near")


def test_a_run_that_broke_off_goes_on_at_its_layer(hub: Hub, source: Path, tmp_path: Path) -> None:
    def break_off(what: str, done: int, total: int) -> None:
        if what == "convert" and done > total / 2:
            hub.faults = [Fault("GET", "/cdn/", 0, times=999)]

    with pytest.raises(HubError, match=r"cannot be read any further.*same command again"):
        convert(far(tmp_path / "far"), break_off)
    assert (tmp_path / "far.partial").is_dir()
    hub.faults = []
    plan, before = far(tmp_path / "far"), hub.sent_bytes
    convert(plan)
    rest = hub.sent_bytes - before
    plan, before = far(tmp_path / "near"), hub.sent_bytes
    convert(plan)
    embedding = SIZES["vocab_size"] * SIZES["hidden_size"] * 4
    assert 0 < rest < hub.sent_bytes - before - embedding * 0.8
    assert tensors(tmp_path / "far") == tensors(tmp_path / "near")


def test_a_private_source_is_read_with_the_token_and_only_by_the_hub(
    hub: Hub, source: Path, tmp_path: Path
) -> None:
    hub.repos[NAME].private = True
    with pytest.raises(SourceError, match="this token can see"):
        far()
    convert(make_plan(recipe_of(NAME, tmp_path / "far", source__download=False), TOKEN))
    assert f"Bearer {TOKEN}" in hub.tokens
    assert all(TOKEN.encode() not in p.read_bytes() for p in (tmp_path / "far").iterdir())
    ref = next(iter(open_source(NAME, token=TOKEN, download=False).fetch().tensors.values()))
    assert TOKEN not in repr(ref)


def test_values_that_are_not_finite_are_told(hub: Hub, dense: Dense, tmp_path: Path) -> None:
    def spoil(data: dict[str, Any]) -> None:
        data["model.embed_tokens.weight"][0, 0] = float("nan")
        data["model.layers.1.mlp.up_proj.weight"][0, 0] = float("inf")

    folder = Path(shutil.copytree(dense(**SIZES), tmp_path / "shards"))
    edit_tensors(folder, spoil)
    hub.add(NAME, folder)
    manifest = convert(far(tmp_path / "far"))
    told = [note.message for note in manifest.warnings if note.code == "nonfinite"]
    assert len(told) == 2
    assert "embed_tokens" in "".join(told)
    assert "layers.1.mlp.up_proj" in "".join(told)


def test_experts_of_other_repositories_are_not_downloaded_either(
    hub: Hub, dense: Dense, tmp_path: Path
) -> None:
    hub.add(NAME, dense(**SIZES))
    hub.add("org/other", dense(**SIZES))
    method = {
        "experts__method": "compose",
        "experts__sources": [{"model": NAME}, {"model": "org/other"}] * 2,
    }
    manifest = convert(far(tmp_path / "far", **method))
    assert [one.id for one in manifest.expert_sources] == [NAME, "org/other"] * 2
    assert not [path for path in cached(tmp_path) if path.suffix == ".safetensors"]


def lost_tensor(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    del header["model.norm.weight"]
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    path.write_bytes(data[:8] + text + data[8 + length :])


def no_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:8] + b"?" + data[9:])


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("spoil", "pattern"),
    [
        (lost_tensor, "has no tensor model.norm.weight"),
        (no_header, "header cannot be read"),
        (truncated, "is truncated"),
    ],
)
def test_files_that_are_broken_on_the_hub_are_told(
    hub: Hub, dense: Dense, tmp_path: Path, spoil: Callable[[Path], None], pattern: str
) -> None:
    folder = Path(shutil.copytree(dense(**SIZES), tmp_path / "shards"))
    spoil(folder)
    hub.add(NAME, folder)
    with pytest.raises(SourceError, match=pattern):
        convert(far(tmp_path / "far"))


def local(hub: Hub, dense: Dense, tmp_path: Path) -> str:
    return str(dense())


def pickled(hub: Hub, dense: Dense, tmp_path: Path) -> str:
    (tmp_path / "bin").mkdir()
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / "bin" / name).write_bytes((dense() / name).read_bytes())
    (tmp_path / "bin" / "pytorch_model.bin").write_bytes(b"pickle")
    hub.add("org/bin", tmp_path / "bin")
    return "org/bin"


@pytest.mark.parametrize(
    ("make", "kind", "pattern"),
    [
        (local, UsageError, "--no-download has no effect.*not on the Hub"),
        (pickled, SourceError, "no safetensors files, which --no-download needs"),
    ],
)
def test_what_cannot_be_read_by_range_is_refused(
    hub: Hub,
    dense: Dense,
    tmp_path: Path,
    make: Callable[[Hub, Dense, Path], str],
    kind: type[MoeConvertError],
    pattern: str,
) -> None:
    with pytest.raises(kind, match=pattern):
        planned(make(hub, dense, tmp_path), source__download=False)


def test_a_server_that_ignores_ranges_is_refused(
    hub: Hub, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ref = next(iter(open_source(NAME, download=False).fetch().tensors.values()))
    monkeypatch.setattr("tests.hub_server.Handler.ranges", False)
    with pytest.raises(HubError, match=r"were asked for.*Leave --no-download out"):
        ref.read()
