"""Text to token ids: what is read, how it is packed, one sentence for everything that is wrong."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from moe_convert.cli import app
from moe_convert.data import Data, pack, prompt_ids, read_documents, token_ids, tokenizer_of
from moe_convert.errors import MissingDependencyError, UsageError
from tests.conftest import Dense
from tests.tiny import VOCAB_SIZE
from tests.tools import converted, planned

HAS_DATASETS = importlib.util.find_spec("datasets") is not None
WORDS = "the river and the lower fields were under the water "
EOS = 1


def ids(folder: Path, path: Path | str, **settings: Any) -> torch.Tensor:
    return token_ids(Data(train=str(path), **settings), folder, VOCAB_SIZE)


def decoded(folder: Path, ids_BT: torch.Tensor) -> str:
    tokenizer = tokenizer_of(folder, "a test")
    return str(tokenizer.decode(ids_BT.flatten().tolist()))


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def with_bos(dense: Dense, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder whose tokenizer begins every text with <s>."""
    from tokenizers.processors import TemplateProcessing

    tokenizer: Any = tokenizer_of(dense(), "a test")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    folder = tmp_path_factory.mktemp("bos")
    tokenizer.save_pretrained(folder)
    return folder


def test_rows_are_whole_and_in_order(dense: Dense, tmp_path: Path) -> None:
    text = "".join(f"{n}: {WORDS}\n" for n in range(100))
    path = tmp_path / "text.txt"
    path.write_text(text, encoding="utf-8")
    found = ids(dense(), path, seq_len=32, max_tokens=330, shuffle_seed=None)
    assert found.shape == (10, 32)
    assert found.dtype == torch.int64
    assert text.startswith(decoded(dense(), found))


def test_a_short_text_is_one_short_row(dense: Dense, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(WORDS * 3, encoding="utf-8")
    found = ids(dense(), path, seq_len=1024)
    assert found.shape[0] == 1
    assert found[0, -1] == EOS
    assert decoded(dense(), found[:, :-1]) == WORDS * 3


def test_documents_are_parted_by_the_end_of_text(dense: Dense, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", [{"text": "water"}, {"text": "fields"}] * 8)
    found = ids(dense(), path, seq_len=16, shuffle_seed=None)
    assert decoded(dense(), found).startswith("water</s>fields</s>water</s>")


def test_every_row_begins_as_the_tokenizer_begins_a_text(with_bos: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(WORDS * 40, encoding="utf-8")
    found = ids(with_bos, path, seq_len=32, max_tokens=320, shuffle_seed=None)
    assert found.shape == (10, 32)
    assert (found[:, 0] == 0).all()
    assert not (found[:, 1:] == 0).any()
    assert (WORDS * 40).startswith(decoded(with_bos, found[:, 1:]))


def test_the_seed_decides_the_order(dense: Dense, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", [{"text": f"{n} {WORDS}"} for n in range(50)])
    one, same, other, plain = (
        ids(dense(), path, seq_len=32, shuffle_seed=seed) for seed in (0, 0, 1, None)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert decoded(dense(), plain).startswith("0 the river")
    assert not decoded(dense(), one).startswith("0 the river")


def test_plain_text_is_shuffled_in_pieces_at_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {n} {WORDS}\n" for n in range(200)), encoding="utf-8")
    documents = read_documents(Data(train=str(path), seq_len=64))
    pieces = [str(document.content) for document in documents]
    assert len(pieces) > 10
    assert all(piece.startswith("line ") and piece.endswith("\n") for piece in pieces)
    assert "".join(sorted(pieces, key=lambda p: int(p.split()[1]))) == path.read_text("utf-8")
    in_order = read_documents(Data(train=str(path), seq_len=64, shuffle_seed=None))
    assert "".join(str(document.content) for document in in_order) == path.read_text("utf-8")
    assert [document.ends for document in in_order] == [False] * (len(in_order) - 1) + [True]


def test_large_files_are_read_in_proportion_from_their_beginnings(tmp_path: Path) -> None:
    for name, lines in (("a", 3000), ("b", 1000)):
        text = "".join(f"{name} {n} {WORDS}\n" for n in range(lines))
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    documents = read_documents(Data(train=str(tmp_path / "*.txt"), max_tokens=1024))
    lengths = {"a": 0, "b": 0}
    for document in documents:
        lengths[str(document.content)[0]] += len(str(document.content))
    assert sum(lengths.values()) == pytest.approx(1024 * 64, rel=0.02)
    assert lengths["a"] / lengths["b"] == pytest.approx(3, rel=0.1)


def test_a_character_cut_in_two_at_the_limit_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("x" + "ü" * 5000, encoding="utf-8")
    documents = read_documents(Data(train=str(path), max_tokens=16, seq_len=16))
    assert {c for document in documents for c in str(document.content)} <= {"x", "ü"}


def test_chats_go_through_the_template(dense: Dense, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "the river "}, {"role": "assistant", "content": "water "}]
    path = jsonl(tmp_path / "rows.jsonl", [{"messages": chat}] * 8)
    found = ids(dense(), path, seq_len=32, messages_field="messages")
    assert decoded(dense(), found).startswith("the river water the river water ")


def test_another_field_and_a_byte_order_mark(dense: Dense, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\ufeff" + json.dumps({"body": WORDS * 3}) + "\n\n", encoding="utf-8")
    assert decoded(dense(), ids(dense(), path, text_field="body")).startswith(WORDS)


def test_without_data_there_is_the_built_in_text(dense: Dense) -> None:
    assert decoded(dense(), token_ids(Data(), dense(), VOCAB_SIZE)).startswith("The river had")


def test_prompts_know_their_own_tokens(dense: Dense, with_bos: Path) -> None:
    plain, added = (
        prompt_ids(["water"], tokenizer_of(folder, "a test"))[0] for folder in (dense(), with_bos)
    )
    assert plain.own_T.all()
    assert added.own_T.tolist() == [False] + [True] * plain.ids_1T.numel()
    assert torch.equal(added.ids_1T[:, added.own_T], plain.ids_1T)


def empty(folder: Path) -> Path:
    (folder / "a.txt").write_bytes(b"")
    return folder / "a.txt"


def blank(folder: Path) -> Path:
    (folder / "a.txt").write_text(" \n\n", encoding="utf-8")
    return folder / "a.txt"


def short(folder: Path) -> Path:
    (folder / "a.txt").write_text("water", encoding="utf-8")
    return folder / "a.txt"


def latin1(folder: Path) -> Path:
    (folder / "a.txt").write_bytes(b"the river \xfc " * 50)
    return folder / "a.txt"


def latin1_line(folder: Path) -> Path:
    (folder / "a.jsonl").write_bytes(b'{"text": "river"}\n{"text": "\xfc"}\n')
    return folder / "a.jsonl"


def cut_off(folder: Path) -> Path:
    (folder / "a.txt").write_bytes(b"the river " * 5 + b"\xc3")
    return folder / "a.txt"


def lines(*rows: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / "a.jsonl").write_text("\n".join(rows), encoding="utf-8")
        return folder / "a.jsonl"

    return make


def directory(folder: Path) -> Path:
    return folder


def no_match(folder: Path) -> Path:
    return folder / "*.txt"


def odd_name(folder: Path) -> Path:
    (folder / "notes.md").write_text("x", encoding="utf-8")
    return folder / "notes.md"


BROKEN: dict[str, tuple[Callable[[Path], Path], str]] = {
    "empty": (empty, r"^a\.txt is empty"),
    "blank": (blank, r"^a\.txt holds no text"),
    "short": (short, r"^a\.txt holds \d tokens, and at least 16"),
    "latin-1": (latin1, r"^a\.txt is not UTF-8: byte 10 "),
    "latin-1 in a line": (latin1_line, r"^a\.jsonl is not UTF-8: byte 28 "),
    "cut off": (cut_off, r"^a\.txt is not UTF-8: byte 50 "),
    "no JSON": (lines('{"text": "a"}', "", "{text}"), r"^a\.jsonl line 3 is not valid JSON: "),
    "no object": (lines('["text"]'), r"^a\.jsonl line 1 is no JSON object"),
    "no field": (
        lines('{"text": "a"}', '{"body": "b", "id": 1}'),
        r"^a\.jsonl line 2 has no field 'text'; it has body, id\. Set --text-field",
    ),
    "no text": (lines('{"text": 7}'), r"^a\.jsonl line 1: field 'text' holds int, expected text"),
    "surrogate": (lines(r'{"text": "\ud800"}'), "holds half of a surrogate pair"),
    "folder": (directory, r"is a folder\. Write a glob"),
    "no match": (no_match, r"^There is no file .*\*\.txt"),
    "unknown format": (odd_name, r"^The name notes\.md does not tell its format"),
}


@pytest.mark.parametrize("mistake", list(BROKEN))
def test_the_plan_says_what_is_wrong_in_one_sentence(
    dense: Dense, tmp_path: Path, mistake: str
) -> None:
    make, sentence = BROKEN[mistake]
    with pytest.raises(UsageError, match=sentence) as caught:
        planned(dense(), data__train=str(make(tmp_path)))
    assert "\n" not in str(caught.value)


def test_messages_must_be_messages(dense: Dense, tmp_path: Path) -> None:
    for value in ("hello", [], ["hello"], 3):
        path = jsonl(tmp_path / "rows.jsonl", [{"chat": value}])
        with pytest.raises(UsageError, match="line 1: field 'chat' is no list of messages"):
            ids(dense(), path, messages_field="chat")


def test_a_template_that_cannot_render_is_an_error(dense: Dense, tmp_path: Path) -> None:
    tokenizer: Any = tokenizer_of(dense(), "a test")
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    documents = read_documents(
        Data(
            train=str(jsonl(tmp_path / "rows.jsonl", [{"m": [{"role": "user", "content": "x"}]}])),
            messages_field="m",
        )
    )
    with pytest.raises(UsageError, match="roles must alternate"):
        pack(documents, tokenizer, Data(messages_field="m"), VOCAB_SIZE)
    tokenizer.chat_template = None
    with pytest.raises(UsageError, match="no chat template"):
        pack(documents, tokenizer, Data(messages_field="m"), VOCAB_SIZE)


def test_a_tokenizer_of_another_model_is_refused(dense: Dense, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(WORDS * 9, encoding="utf-8")
    with pytest.raises(UsageError, match=r"makes token .* and the model knows 100"):
        token_ids(Data(train=str(path)), dense(), 100)


@pytest.mark.skipif(HAS_DATASETS, reason="needs an environment without datasets")
@pytest.mark.parametrize("train", ["org/name", {"hub": "org/name"}, "table.parquet"])
def test_the_hub_and_tables_need_the_extra(
    dense: Dense, tmp_path: Path, train: str | dict[str, str]
) -> None:
    if train == "table.parquet":
        (tmp_path / "table.parquet").write_bytes(b"PAR1")
        train = str(tmp_path / "table.parquet")
    with pytest.raises(MissingDependencyError, match=r"pip install 'moe-convert\[train\]'"):
        planned(dense(), data__train=train)


@pytest.mark.skipif(not HAS_DATASETS, reason="needs datasets")
def test_tables_are_read_with_datasets(dense: Dense, tmp_path: Path) -> None:
    from pyarrow import parquet, table

    rows = table({"text": [f"{n} {WORDS}" for n in range(30)]})
    parquet.write_table(rows, tmp_path / "table.parquet")
    found = ids(dense(), tmp_path / "table.parquet", seq_len=32, shuffle_seed=None)
    assert decoded(dense(), found).startswith(f"0 {WORDS}</s>1 {WORDS}</s>")
    assert len(read_documents(Data(train=str(tmp_path / "table.parquet")))) == 30
    with pytest.raises(UsageError, match=r"table\.parquet row 1 has no field 'body'"):
        ids(dense(), tmp_path / "table.parquet", text_field="body")
    (tmp_path / "table.parquet").write_bytes(b"PAR1")
    with pytest.raises(UsageError, match=r"^Cannot read the data set table\.parquet"):
        ids(dense(), tmp_path / "table.parquet")


@pytest.mark.parametrize(
    ("train", "name", "revision"),
    [("org/name", "org/name", None), ("org/name@v1.0", "org/name", "v1.0")],
)
def test_org_and_name_mean_the_hub(train: str, name: str, revision: str | None) -> None:
    hub = Data(train=train).hub
    assert hub is not None
    assert (hub.hub, hub.revision, hub.split) == (name, revision, "train")


@pytest.mark.parametrize("train", ["data/text.txt", "data/*.jsonl", "text", "a/b/c", None])
def test_anything_else_is_a_path(train: str | None) -> None:
    assert Data(train=train).hub is None


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("data.train={hub: a/b, splits: test}", r"no field data\.train\.splits"),
        ("data.seqlen=64", r"no field data\.seqlen. Did you mean data\.seq_len"),
        ("data.max_tokens=0", r"data\.max_tokens"),
    ],
)
def test_recipe_mistakes_are_named(dense: Dense, setting: str, sentence: str) -> None:
    result = CliRunner().invoke(app, ["plan", str(dense()), "--set", setting])
    assert result.exit_code == 2
    assert re.search(sentence, " ".join(result.stderr.split())), result.stderr


def test_options_reach_the_report(dense: Dense, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "rows.jsonl", [{"body": f"{n} {WORDS}"} for n in range(90)])
    arguments = ["upcycle", dense(), "-o", tmp_path / "out", "-e", "4", "--router", "centroid"]
    options = ["--data", path, "--text-field", "body", "--no-verify", "--json"]
    result = CliRunner().invoke(app, [str(value) for value in [*arguments, *options]])
    assert result.exit_code == 0, result.stderr
    routing = json.loads(result.stdout)["routing"]
    assert routing["data"] == "rows.jsonl"
    assert [len(load) for load in routing["load"]] == [4, 4, 4]
    assert all(sum(load) == pytest.approx(1) for load in routing["load"])
    assert {"entropy_mean", "entropy_min", "max_over_mean", "dead_experts"} <= routing.keys()


def test_data_decides_the_scale_of_random_routers(dense: Dense, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("0123456789 " * 200, encoding="utf-8")
    with_data = converted(dense(), tmp_path / "with", data__train=str(path)).routing
    without = converted(dense(), tmp_path / "without").routing
    assert with_data is not None
    assert without is not None
    assert with_data.data == "text.txt"
    assert without.data == "built-in sample"
    assert with_data.tokens_sha256 != without.tokens_sha256
    for routing in (with_data, without):
        assert routing.logit_std == pytest.approx([0.5] * 3, rel=1e-3)
