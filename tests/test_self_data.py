"""Text that the dense source writes: the model's own, from the seed alone, and written once."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
from typer.testing import CliRunner

from moe_convert.checkpoint import open_source
from moe_convert.checkpoint.names import auto_class
from moe_convert.cli import app
from moe_convert.data import Data, SelfWriter, check_varied, token_ids, tokenizer_of
from moe_convert.data.decoding import choose, fold_queries, sample
from moe_convert.data.starts import PIECE, PROMPTS, Start, chat_starts, document_start
from moe_convert.data.writing import pieces, row_starts, written
from moe_convert.errors import SourceError, UnsupportedError, UsageError
from moe_convert.wrappers import special_tokens
from tests.conftest import Dense
from tests.test_wrappers import CASES, make_multimodal
from tests.tiny import TINY, VOCAB_SIZE, make_dense
from tests.tiny_custom import CUSTOM_TINY, make_custom
from tests.tools import edit_tensors, planned

BOS, EOS = 0, 1
ROUNDING = 1e-5
WEIGHTS = "model.safetensors"
CHATML = (
    "{% for m in messages %}<s>{{ m['role'] }}:{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)
MAKERS: dict[str, Callable[[Path], Path]] = {
    **{name: partial(make_dense, name, next(iter(TINY[name]))) for name in TINY},
    **{
        f"custom-{name}": partial(make_custom, name, next(iter(CUSTOM_TINY[name])))
        for name in CUSTOM_TINY
    },
    **{f"wrapped-{name}": partial(make_multimodal, name) for name in CASES},
}
"""One tiny checkpoint for every dense family, whatever becomes of it."""


def load(folder: Path) -> Any:
    """Load a model in fp32 with transformers, as it comes."""
    auto = auto_class(AutoConfig.from_pretrained(folder))
    return auto.from_pretrained(folder, dtype=torch.float32).eval()


def replayed(model: Any, ids_T: torch.Tensor, uniform_T: torch.Tensor, first: int) -> int:
    """Return how many tokens after the first ones follow from the logits of the whole row."""
    with torch.no_grad():
        logits_TV = model(input_ids=ids_T[None], use_cache=False).logits[0].float()
    last = len(ids_T)
    if EOS in ids_T[first:]:
        last = first + int((ids_T[first:] == EOS).nonzero()[0]) + 1
    for position in range(first, last):
        logits_V = logits_TV[position - 1].double()
        logits_V[list(special_tokens(model.config) - {EOS})] = -torch.inf
        if position == first:
            logits_V[EOS] = -torch.inf
        summed_V = logits_V.softmax(-1).cumsum(-1)
        token, uniform = int(ids_T[position]), float(uniform_T[position])
        assert uniform < float(summed_V[token]) + ROUNDING, position
        assert token == 0 or uniform > float(summed_V[token - 1]) - ROUNDING, position
    return last - first


@pytest.mark.parametrize("name", list(MAKERS))
def test_tokens_are_drawn_from_the_models_own_logits(tmp_path: Path, name: str) -> None:
    folder = MAKERS[name](tmp_path / "dense")
    model = load(folder)
    fold_queries(model)
    made = written(model, None, 4, 24, seed=3)
    assert made.shape == (4, 24)
    uniform = torch.rand(4, 24, generator=torch.Generator().manual_seed(3))
    dense = load(folder)
    checked = sum(replayed(dense, made[row], uniform[row], 1) for row in range(4))
    assert checked > 24


def test_long_texts_outgrow_the_first_buffer(dense: Dense) -> None:
    model = load(dense())
    fold_queries(model)
    made = written(model, None, 2, 400, seed=0)
    uniform = torch.rand(2, 400, generator=torch.Generator().manual_seed(0))
    reference = load(dense())
    with torch.no_grad():
        logits_BTV = reference(input_ids=made, use_cache=False).logits.double()
    following_BT = logits_BTV.softmax(-1).cumsum(-1)[:, :-1]
    expected_BT = (following_BT <= uniform[:, 1:, None].double()).sum(-1)
    assert (expected_BT == made[:, 1:]).double().mean() > 0.95


def test_a_uniform_number_chooses_as_often_as_the_probability_says() -> None:
    probability_V = torch.tensor([0.5, 0.0, 0.2, 0.3, 0.0])
    grid_B = (torch.arange(10_000) + 0.5) / 10_000
    chosen_B = choose(probability_V.log().repeat(10_000, 1), grid_B)
    assert torch.bincount(chosen_B, minlength=5).tolist() == [5000, 0, 2000, 3000, 0]
    with pytest.raises(SourceError, match=r"logits are not finite.*--data"):
        choose(torch.tensor([[0.0, torch.nan]]), torch.tensor([0.5]))


@pytest.fixture(scope="module")
def chatty(dense: Dense, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Llama whose chat template says something around the messages."""
    folder = tmp_path_factory.mktemp("chatty") / "dense"
    shutil.copytree(dense(), folder)
    (folder / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def bare(dense: Dense, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Llama without a tokenizer."""
    folder = tmp_path_factory.mktemp("bare") / "dense"
    kept = shutil.ignore_patterns("*token*", "chat_template*")
    shutil.copytree(dense(), folder, ignore=kept)
    return folder


def ids(folder: Path, **settings: Any) -> torch.Tensor:
    """Return what `data.train: self` gives."""
    data = Data.model_validate({"train": "self", **settings})
    return token_ids(data, folder, VOCAB_SIZE, SelfWriter(open_source(str(folder))))


def kept() -> list[Path]:
    """Return the files of the cache folder."""
    folder = Path(os.environ["MOE_CONVERT_CACHE"])
    return sorted(folder.iterdir()) if folder.exists() else []


@pytest.mark.parametrize("kind", ["chatty", "bare"])
def test_the_seed_alone_decides_the_text(request: pytest.FixtureRequest, kind: str) -> None:
    folder = request.getfixturevalue(kind)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one = ids(folder, seq_len=32, max_tokens=200)
    assert torch.equal(torch.get_rng_state(), state)
    kept()[0].unlink()
    torch.manual_seed(2)
    assert torch.equal(ids(folder, seq_len=32, max_tokens=200), one)
    assert one.shape == (6, 32)
    assert one.dtype == torch.int64
    assert not torch.equal(ids(folder, seq_len=32, max_tokens=200, shuffle_seed=1), one)
    assert not torch.equal(one[0], one[2])


def test_what_was_written_is_kept(chatty: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(chatty, folder)
    first = ids(folder, seq_len=32, max_tokens=64)
    (path,) = kept()
    save_file({"ids": torch.full((2, 32), 7, dtype=torch.int32)}, path)
    assert (ids(folder, seq_len=32, max_tokens=64) == 7).all(), "the file was not used"
    path.write_bytes(b"broken")
    assert torch.equal(ids(folder, seq_len=32, max_tokens=64), first)
    assert torch.equal(load_file(path)["ids"].long(), first)
    ids(folder, seq_len=16, max_tokens=64)
    ids(folder, seq_len=32, max_tokens=64, shuffle_seed=3)
    assert len(kept()) == 3
    edit_tensors(folder, lambda t: t["lm_head.weight"].neg_())
    os.utime(folder / WEIGHTS, ns=(1, 1))
    assert not torch.equal(ids(folder, seq_len=32, max_tokens=64), first)
    (folder / "chat_template.jinja").write_text("x", encoding="utf-8")
    ids(folder, seq_len=32, max_tokens=64)
    assert len(kept()) == 5
    assert all(path.suffix == ".safetensors" for path in kept())


def test_half_are_documents_and_half_are_chats(chatty: Path) -> None:
    tokenizer = tokenizer_of(chatty, "a test")
    texts = [tokenizer.decode(row.tolist()) for row in ids(chatty, seq_len=48, max_tokens=480)]
    assert len(texts) == 10
    assert all(text.startswith("<s>user:") for text in texts[1::2])
    assert all(text.startswith("</s>") for text in texts[::2])
    assert not any(text.startswith("</s><s>user:") for text in texts[::2])


def test_pieces_of_a_given_text_are_continued(chatty: Path, tmp_path: Path) -> None:
    """From random places of it, behind what begins a document, and then in the model's words."""
    text = tmp_path / "deep" / "notes.txt"
    text.parent.mkdir()
    text.write_text(" ".join(f"Line {n} of the notes." for n in range(99)), encoding="utf-8")
    settings = {"seq_len": 512, "max_tokens": 2048, "shuffle_seed": 3}
    made = ids(chatty, train=f"self:{text}", **settings)
    read = token_ids(Data(train=str(text), **settings), chatty, VOCAB_SIZE).flatten().tolist()
    starts = [
        made[row, begin : begin + PIECE + 1].tolist() for row in range(4) for begin in (0, 256)
    ]
    assert all(start[0] == EOS for start in starts)
    windows = [read[place : place + PIECE] for place in range(len(read))]
    places = {windows.index(start[1:]) for start in starts}
    assert len(places) > 4
    assert not any(made[0, 1 : PIECE + 20].tolist() == read[p : p + PIECE + 19] for p in places)
    assert torch.equal(ids(chatty, train=f"self:{text}", **settings), made)
    text.write_text("The river rose in the night. " * 40, encoding="utf-8")
    assert not torch.equal(ids(chatty, train=f"self:{text}", **settings), made)
    data = Data(train=f"self:{text}")
    assert data.is_self
    assert data.name == data.public.train == "self:notes.txt"
    hub = Data(train="self:org/texts")
    assert hub.continued is not None
    assert hub.continued.hub is not None
    assert hub.public == hub


def test_a_text_to_continue_must_be_there(chatty: Path, tmp_path: Path) -> None:
    argv = ["plan", str(chatty), "--data", f"self:{tmp_path / 'none.txt'}", "--router", "centroid"]
    result = CliRunner().invoke(app, argv)
    assert result.exit_code == 2
    assert "There is no file" in result.stderr
    assert "none.txt to read text from." in result.stderr.replace("\n", "")


def test_every_piece_of_a_row_begins_a_text(chatty: Path) -> None:
    tokenizer = tokenizer_of(chatty, "a test")
    made = ids(chatty, seq_len=1000, max_tokens=2000)
    assert made.shape == (2, 1000)
    number, width = pieces(1000, 1024)
    assert (number, width) == (3, 334)
    assert all(int(made[0, start]) == EOS for start in (0, width, 2 * width))
    for start in (0, width, 2 * width):
        assert tokenizer.decode(made[1, start:].tolist()).startswith("<s>user:")


@pytest.mark.parametrize(
    ("seq_len", "max_positions", "expected"),
    [
        (16, None, (1, 16)),
        (511, None, (1, 511)),
        (512, None, (2, 256)),
        (1024, 1024, (4, 256)),
        (1024, 100, (11, 94)),
        (1021, 8192, (3, 341)),
    ],
)
def test_rows_of_any_length_are_made_of_pieces_that_the_model_takes(
    seq_len: int, max_positions: int | None, expected: tuple[int, int]
) -> None:
    assert pieces(seq_len, max_positions) == expected
    assert expected[0] * expected[1] >= seq_len


def test_a_templates_own_words_part_the_messages(chatty: Path) -> None:
    tokenizer = tokenizer_of(chatty, "a test")
    (start,) = chat_starts(tokenizer)
    assert tokenizer.decode(start.first) == "<s>user:"
    assert [tokenizer.decode(turn) for turn in start.turns] == [
        "</s>\n<s>assistant:",
        "</s>\n<s>user:",
    ]


def test_without_a_template_there_are_neutral_prompts(dense: Dense) -> None:
    tokenizer = tokenizer_of(dense(), "a test")
    starts = chat_starts(tokenizer)
    assert [tokenizer.decode(start.first) for start in starts] == [f"</s>{p}" for p in PROMPTS]
    assert document_start(tokenizer, None) == Start((EOS,))


def test_without_a_tokenizer_rows_begin_with_the_configs_token_or_any(bare: Path) -> None:
    made = ids(bare, seq_len=16, max_tokens=16 * 20)
    assert (made[::2, 0] == BOS).all()
    assert len(made[1::2, 0].unique()) > 5
    config = load(bare).config
    config.bos_token_id = None
    starts = row_starts(None, config, 2, 1, torch.Generator().manual_seed(0))
    assert starts[0] == Start((0,))


def test_a_new_text_follows_where_one_ends(dense: Dense) -> None:
    ends, start = frozenset(range(0, VOCAB_SIZE, 3)), Start((100, 101, 102))
    uniform = torch.rand(8, 60, generator=torch.Generator().manual_seed(4))
    made = sample(load(dense()), [start] * 8, uniform, ends, frozenset(range(200, 272)))
    assert made.shape == (8, 60)
    assert int(made.max()) < 200
    num_ends = 0
    for row in made.tolist():
        assert row[:3] == [100, 101, 102]
        position = 3
        while position < len(row):
            assert position + 1 == len(row) or row[position] not in ends, "an empty text"
            while position < len(row) and row[position] not in ends:
                position += 1
            num_ends += position < len(row)
            following = row[position + 1 : position + 4]
            assert following == [100, 101, 102][: len(following)]
            position += 4
    assert num_ends > 20


def test_what_follows_an_end_depends_on_where_it_comes() -> None:
    document, chat = Start((5, 6)), Start((9, 8), ((1, 20), (30, 1, 31)))
    assert document.after(5, 0) == ((6,), 0)
    assert document.after(1, 0) == ((5, 6), 0)
    assert chat.after(1, 0) == ((20,), 1)
    assert chat.after(1, 1) == ((31,), 2)
    assert chat.after(1, 2) == ((20,), 3)
    assert chat.after(2, 1) == ((9, 8), 0)


def test_a_tokenizer_smaller_than_the_model_never_meets_an_unknown_token(chatty: Path) -> None:
    model, tokenizer = load(chatty), tokenizer_of(chatty, "a test")
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(4, 40, generator=generator)
    made = sample(model, [Start((2,))] * 4, uniform, frozenset({EOS}), num_tokens=100)
    assert int(made.max()) < 100
    assert len(tokenizer) <= VOCAB_SIZE


def test_the_options_reach_the_report_and_the_plan_writes_nothing(
    chatty: Path, tmp_path: Path
) -> None:
    plan = ["--data", "self", "--set", "data.max_tokens=64", "--set", "data.seq_len=16"]
    result = CliRunner().invoke(app, ["plan", str(chatty), *plan])
    assert result.exit_code == 0, result.stderr
    assert not kept()
    options = ["-o", str(tmp_path / "out"), "-e", "4", "--router", "centroid", "--no-verify"]
    result = CliRunner().invoke(app, ["upcycle", str(chatty), *plan, *options, "--json"])
    assert result.exit_code == 0, result.stderr
    routing = json.loads(result.stdout)["routing"]
    assert (routing["data"], routing["tokens"]) == ("self", 64)
    assert len(kept()) == 1


def test_a_plan_knows_how_much_will_be_written(dense: Dense) -> None:
    with pytest.raises(UsageError, match="holds 16 tokens, fewer than the 32 clusters"):
        planned(
            dense(),
            target__num_experts=32,
            router__init="centroid",
            data__train="self",
            data__max_tokens=16,
        )


def test_what_cannot_write_is_refused_with_the_remedy(
    bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(str(bare))
    with pytest.raises(UsageError, match=r"weights on this disk\. Leave --no-download out"):
        SelfWriter(replace(source, streamed=True))(2, 16, 0)
    with pytest.raises(UnsupportedError, match=r"cannot write text.*Give text with --data"):
        SelfWriter(replace(source, folder=tmp_path))(2, 16, 0)
    with pytest.raises(UsageError, match="Nobody writes the text"):
        token_ids(Data(train="self"), bare, VOCAB_SIZE)
    monkeypatch.setenv("MOE_CONVERT_CACHE", str(tmp_path / "file" / "cache"))
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(UsageError, match=r"cannot be kept in .*Set MOE_CONVERT_CACHE"):
        SelfWriter(source)(2, 16, 0)


def test_ids_that_are_not_numbers_are_an_error(dense: Dense, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(dense(), folder)
    edit_tensors(folder, lambda t: t["model.norm.weight"].fill_(torch.nan))
    with pytest.raises(SourceError, match="logits are not finite"):
        ids(folder, seq_len=16, max_tokens=32)
    assert not kept()


def test_one_token_again_and_again_is_refused(dense: Dense, tmp_path: Path) -> None:
    same = torch.full((4, 64), 9)
    same[:, 0], same[0, -1] = 0, 1
    with pytest.raises(UsageError, match=r"^It is one token repeated: 98% of its 256 .* number 9"):
        check_varied(same, "It")
    check_varied(torch.tensor([[1, 2] * 32]), "It")
    path = tmp_path / "text.txt"
    path.write_text("a" * 2000, encoding="utf-8")
    with pytest.raises(UsageError, match=r"text\.txt is one token repeated") as caught:
        planned(dense(), data__train=str(path))
    assert "Give text like the model's later input" in caught.value.hint
    assert "\n" not in str(caught.value)


def test_progress_is_told(chatty: Path) -> None:
    told: list[tuple[str, int, int]] = []
    SelfWriter(open_source(str(chatty)), lambda *report: told.append(report))(3, 16, 0)
    assert told[0] == ("write", 0, 48)
    assert told[-1] == ("write", 48, 48)
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
