"""Routers made of hidden states: against cases done by hand, and against the written model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_convert import streams
from moe_convert.checkpoint import open_source, read_folder
from moe_convert.clustering import kmeans, lloyd
from moe_convert.convert import convert
from moe_convert.data import Data, Prompt, token_ids
from moe_convert.errors import UsageError
from moe_convert.families import find_family
from moe_convert.inputs import Inputs
from moe_convert.manifest import Manifest, load_manifest
from moe_convert.routers import (
    Router,
    centroid_rows,
    closest,
    condition,
    prompt_rows,
    routed,
    within_groups,
)
from moe_convert.streams import DenseStream
from moe_convert.targets import TARGETS, MoeShape
from tests.conftest import Dense
from tests.tiny import VOCAB_SIZE
from tests.tools import converted, difference, digest, load, logits, planned

TEXT = "the river and the lower fields were under the water, and by morning\nall of it was gone. "
PROMPTS = [["aaaa aaaa", "aa"], ["bbbbbbbb"], ["cccc", "ccccc"], ["dd dd dd"]]
ROUTER = "model.layers.{}.block_sparse_moe.gate.weight"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("".join(f"{n} {TEXT}" for n in range(60)), encoding="utf-8")
    return path


def shape_of(num_experts: int, top_k: int, num_groups: int = 1, top_groups: int = 1) -> MoeShape:
    return MoeShape(
        num_experts=num_experts,
        top_k=top_k,
        expert_size=8,
        shared_size=0,
        dense_size=8,
        num_layers=1,
        moe_layers=(0,),
        num_groups=num_groups,
        top_groups=top_groups,
    )


def rows(folder: Path, layer: int = 0) -> torch.Tensor:
    return read_folder(folder)[ROUTER.format(layer)].read().float()


def ffn_inputs(folder: Path, ids_BT: torch.Tensor) -> list[torch.Tensor]:
    """Return what every FFN of a dense model receives, [T, D], by a hook of the test's own."""
    model, received = load(folder), list[torch.Tensor]()
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, args: received.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        model(ids_BT)
    return received


def test_kmeans_of_four_points() -> None:
    centres, labels = kmeans(torch.tensor([[0.0], [1.0], [10.0], [11.0]]), 2, seed=0)
    assert sorted(centres.flatten().tolist()) == pytest.approx([0.5, 10.5])
    assert labels[0] == labels[1] != labels[2] == labels[3]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_kmeans_finds_planted_clusters(seed: int, offset: float) -> None:
    generator = torch.Generator().manual_seed(3)
    planted_KD = 20 * torch.randn(7, 12, generator=generator) + offset
    truth_T = torch.arange(7).repeat_interleave(torch.tensor([5, 9, 30, 8, 17, 60, 11]))
    x_TD = planted_KD[truth_T] + torch.randn(len(truth_T), 12, generator=generator)
    centres_KD, labels_T = kmeans(x_TD, 7, seed)
    for cluster in range(7):
        mine = labels_T[truth_T == cluster]
        assert (mine == mine[0]).all()
        mean_D = x_TD[truth_T == cluster].mean(dim=0)
        assert torch.allclose(centres_KD[mine[0]], mean_D, atol=1e-3)
    assert len(labels_T.unique()) == 7


def test_kmeans_is_seeded_and_survives_equal_points() -> None:
    x_TD = torch.randn(200, 8, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(5)
    one = kmeans(x_TD, 6, seed=4)[0]
    torch.manual_seed(6)
    assert torch.equal(one, kmeans(x_TD, 6, seed=4)[0])
    assert not torch.equal(one, kmeans(x_TD, 6, seed=5)[0])
    assert kmeans(torch.ones(5, 3), 3, seed=0)[0].tolist() == [[1.0] * 3] * 3
    with pytest.raises(ValueError, match="2 points do not form 3"):
        kmeans(torch.ones(2, 3), 3, seed=0)


def test_an_empty_cluster_moves_to_the_farthest_point() -> None:
    x_TD = torch.tensor([[0.0], [2.0], [9.0]])
    distance_T, labels_T = torch.tensor([0.0, 2.0, 81.0]), torch.zeros(3, dtype=torch.int64)
    means_KD = lloyd._means(x_TD, labels_T, distance_T, 2)
    assert means_KD.flatten().tolist() == pytest.approx([11 / 3, 9.0])


def test_states_are_sorted_by_prompt_and_leave_added_tokens_out() -> None:
    """Rows 0 and 1 have two and one prompts; each begins with a token that is not its own."""

    def prompt(length: int) -> Prompt:
        return Prompt(torch.zeros(1, length, dtype=torch.int64), torch.arange(length) > 0)

    inputs = Inputs(
        torch.zeros(2, 3, dtype=torch.int64),
        positive=((prompt(2), prompt(3)), (prompt(2),)),
        negative=((), (prompt(4),)),
    )
    states = inputs.states(torch.arange(17.0).unsqueeze(1))
    assert states.data_TD.flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert [x.flatten().tolist() for x in states.positive] == [[7, 9, 10], [12]]
    assert [x.flatten().tolist() for x in states.negative] == [[], [14, 15, 16]]


def test_composed_experts_take_the_prompts_of_their_sources(dense: Dense, tmp_path: Path) -> None:
    sources = [{"model": str(dense()), "prompts": texts} for texts in PROMPTS]
    settings: dict[str, Any] = {"experts__method": "compose", "experts__sources": sources}
    converted(dense(), tmp_path / "one", router__init="prompts", **settings)
    converted(dense(), tmp_path / "two", router__init="prompts", router__prompts=PROMPTS)
    assert torch.equal(rows(tmp_path / "one", 1), rows(tmp_path / "two", 1))
    assert "prompts_unused" in {note.code for note in planned(dense(), **settings).warnings}
    with pytest.raises(UsageError, match=r"no effect with experts\.method compose"):
        planned(dense(), router__init="prompts", router__prompts=PROMPTS, **settings)
    sources[2] = {"model": str(dense())}
    with pytest.raises(UsageError, match=r"Source .*dense-model has no prompts"):
        planned(dense(), router__init="prompts", **settings)


def test_centroid_rows_are_centred_and_leave_the_mean_out() -> None:
    """The mean is (3, 0, 0): the centres differ along y, and by 2 along the mean's own axis."""
    x_TD = torch.tensor([[4.0, 1.0, 0.0], [4.0, 1.0, 0.0], [2.0, -1.0, 0.0], [2.0, -1.0, 0.0]])
    found = {tuple(row) for row in centroid_rows(x_TD, 2, seed=0).tolist()}
    assert found == {(0.0, 1.0, 0.0), (0.0, -1.0, 0.0)}


def test_prompt_rows_by_hand() -> None:
    """Means (4, 3, 0) and (4, 0, 1) less (0, 3, 0); the mean over the lists is (8, 6, 1) / 3."""
    positive = (
        torch.tensor([[4.0, 2.0, 0.0], [4.0, 4.0, 0.0]]),
        torch.tensor([[4.0, 0.0, 1.0]]),
    )
    negative = (torch.zeros(0, 3), torch.tensor([[0.0, 3.0, 0.0]]))
    mean = torch.tensor([8.0, 6.0, 1.0])
    expected = []
    for row in (torch.tensor([4.0, 3.0, 0.0]), torch.tensor([4.0, -3.0, 1.0])):
        rest = row - mean * float(row @ mean) / 101
        expected.append(rest / rest.norm())
    assert torch.allclose(prompt_rows(positive, negative), torch.stack(expected), atol=1e-6)


def test_load_by_hand() -> None:
    """Top-1 of four tokens goes to experts 0, 0, 0 and 2."""
    x_TD = torch.tensor([[1.0, 0.0, 0.0], [2.0, 1.0, 0.0], [1.0, 0.0, 0.5], [0.0, 1.0, 3.0]])
    found = routed(torch.eye(3), x_TD, shape_of(3, 1), 1)
    assert found.load_E.tolist() == [0.75, 0.0, 0.25]
    assert found.max_over_mean == pytest.approx(2.25)
    assert found.num_dead == 1
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(3)
    assert found.entropy == pytest.approx(entropy)
    assert found.logit_std == pytest.approx(float(x_TD.std()))
    both = routed(torch.eye(3), x_TD, shape_of(3, 2), 1)
    assert both.load_E.tolist() == pytest.approx([3 / 8, 3 / 8, 2 / 8])


def test_groups_limit_the_choice() -> None:
    """Expert 0 is the best, but its group's best two are worth less than the other group's."""
    logits_TE = torch.tensor([[3.0, -9.0, 2.0, 2.0]])
    masked = within_groups(logits_TE, shape_of(4, 1, 2, 1))
    assert masked.tolist() == [[-math.inf, -math.inf, 2.0, 2.0]]
    assert torch.equal(within_groups(logits_TE, shape_of(4, 1, 2, 2)), logits_TE)


def test_condition_and_closest_by_hand() -> None:
    assert condition(torch.tensor([[3.0, 0.0], [-3.0, 0.0]])) == pytest.approx(1.0)
    corners = torch.tensor([[2.0, 0.0, 5.0], [-2.0, 0.0, 5.0], [0.0, 1.0, 5.0], [0.0, -1.0, 5.0]])
    assert condition(corners[:, :2]) == pytest.approx(2.0)
    assert condition(corners) is None
    assert closest(torch.tensor([[1.0, 0.0], [3.0, 4.0], [-1.0, 0.0]])) == pytest.approx(0.6)
    assert closest(torch.tensor([[1.0, 0.0], [-1.0, 0.0]])) == pytest.approx(-1.0)


@pytest.mark.parametrize(
    ("model_type", "variant"), [("llama", "plain"), ("mistral", "window"), ("qwen3", "plain")]
)
def test_rows_in_turns_give_the_states_of_all_at_once(
    dense: Dense, monkeypatch: pytest.MonkeyPatch, model_type: str, variant: str
) -> None:
    folder = dense(model_type, variant)
    source = open_source(str(folder))
    family, body = find_family(source.config)
    weights = {name: ref.weight() for name, ref in source.tensors.items()}
    generator = torch.Generator().manual_seed(2)
    ids = [torch.randint(VOCAB_SIZE, size, generator=generator) for size in ((5, 24), (1, 7))]
    monkeypatch.setattr(streams.base, "BATCH_TOKENS", 50)
    stream = DenseStream(source.config, family, weights, ids)
    assert len(stream.states) == 4
    masks = {id(call[0][1].get("attention_mask")) for call in stream._calls[:2]}
    assert len(masks) == 1, "rows of one length share their mask"
    expected = [ffn_inputs(folder, part) for part in ids]
    for layer in range(body.num_layers):
        whole_TD = torch.cat([received[layer] for received in expected])
        assert torch.allclose(stream.reach(layer), whole_TD, atol=1e-4)


@pytest.mark.parametrize("init", ["normal", "orthogonal", "centroid", "prompts"])
@pytest.mark.parametrize(
    ("target", "changes"),
    [
        ("mixtral", {}),
        ("glm4_moe", {"target__num_groups": 4, "target__top_groups": 2}),
        ("qwen2_moe", {"target__layers": "1:", "target__dtype": "bf16"}),
    ],
)
def test_the_report_is_what_the_written_model_does(
    dense: Dense, tmp_path: Path, text: Path, init: str, target: str, changes: dict[str, Any]
) -> None:
    """Loads and spread, counted by hooks on the routers of the loaded result."""
    manifest = converted(
        dense(),
        tmp_path / "out",
        target__architecture=target,
        target__num_experts=8,
        router__init=init,
        router__prompts=[[word] for word in TEXT.split()[:8]] if init == "prompts" else [],
        data__train=str(text),
        data__seq_len=64,
        data__max_tokens=1024,
        **changes,
    )
    report = manifest.routing
    assert report is not None
    assert load_manifest(tmp_path / "out").routing == report
    ids_BT = token_ids(Data(train=str(text), seq_len=64, max_tokens=1024), dense(), VOCAB_SIZE)
    assert report.tokens == ids_BT.numel() == 1024
    seen = router_outputs(tmp_path / "out", target, ids_BT)
    assert len(seen) == len(report.layers) == len(manifest.target.moe_layers)
    tolerance = 1e-3 if "target__dtype" not in changes else 2e-2
    for (logits_TE, chosen_TK), load_E, std in zip(
        seen, report.load, report.logit_std, strict=True
    ):
        counts_E = torch.bincount(chosen_TK.flatten(), minlength=8)
        assert load_E == pytest.approx((counts_E / counts_E.sum()).tolist(), abs=tolerance)
        assert std == pytest.approx(float(logits_TE.std()), rel=2 * tolerance)
        assert std == pytest.approx(0.5, rel=2 * tolerance)
    load_LE = torch.tensor(report.load, dtype=torch.float64)
    entropy_L = -torch.xlogy(load_LE, load_LE).sum(dim=1) / math.log(8)
    assert report.entropy_mean == pytest.approx(float(entropy_L.mean()))
    assert report.entropy_min == pytest.approx(float(entropy_L.min()))
    assert report.max_over_mean == pytest.approx(float(8 * load_LE.max()))
    assert report.dead_experts == int((load_LE < 0.1 / 8).sum())


def router_outputs(
    folder: Path, target: str, ids_BT: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return logits [T, E], worked out from the router's input, and its own choice [T, K]."""
    model, seen = load(folder), list[tuple[torch.Tensor, torch.Tensor]]()

    def watch(module: Any, args: Any, out: Any) -> None:
        x_TD = args[0].flatten(0, -2).float()
        seen.append((x_TD @ module.weight.float().T, out[2].flatten(0, -2)))

    for name, module in model.named_modules():
        if name.endswith("." + TARGETS[target].router_module):
            module.register_forward_hook(watch)
    with torch.no_grad():
        model(ids_BT)
    return seen


def test_prompts_go_to_their_experts(dense: Dense, tmp_path: Path) -> None:
    converted(dense(), tmp_path / "out", router__init="prompts", router__prompts=PROMPTS)
    tokenizer = tokenizer_of(dense())
    for expert, texts in enumerate(PROMPTS):
        for prompt in texts:
            ids_BT = tokenizer(prompt, return_tensors="pt").input_ids
            logits_TE, chosen_TK = router_outputs(tmp_path / "out", "mixtral", ids_BT)[0]
            assert (logits_TE.argmax(dim=1) == expert).float().mean() >= 0.75, prompt
            assert (chosen_TK == expert).any(dim=1).all(), prompt


def tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_prompt_rows_come_from_the_true_input_of_each_prompt_alone(
    dense: Dense, tmp_path: Path
) -> None:
    """Means over the FFN inputs that a hook sees, no pads, every token; only the scale is free."""
    negatives = [["water"], [], ["the river", "under"], []]
    converted(
        dense(),
        tmp_path / "out",
        router__init="prompts",
        router__prompts=PROMPTS,
        router__negative_prompts=negatives,
    )
    tokenizer = tokenizer_of(dense())

    def states(texts: list[str], layer: int) -> torch.Tensor:
        found = [
            ffn_inputs(dense(), tokenizer(text, return_tensors="pt").input_ids)[layer]
            for text in texts
        ]
        return torch.cat(found) if found else torch.zeros(0, 64)

    for layer in range(3):
        positive = tuple(states(texts, layer) for texts in PROMPTS)
        negative = tuple(states(texts, layer) for texts in negatives)
        expected = prompt_rows(positive, negative)
        found = rows(tmp_path / "out", layer)
        assert torch.allclose(found / found[0].norm(), expected, atol=1e-4)


def test_negative_prompts_push_tokens_away(dense: Dense, tmp_path: Path) -> None:
    settings = {"router__init": "prompts", "router__prompts": [["abcd"], ["bbbb"], ["cc"], ["d"]]}
    converted(dense(), tmp_path / "without", **settings)
    negatives = [["bbbbbb"], [], [], []]
    converted(dense(), tmp_path / "with", **settings, router__negative_prompts=negatives)
    ids_BT = tokenizer_of(dense())("bbbb", return_tensors="pt").input_ids
    before, after = (
        router_outputs(tmp_path / name, "mixtral", ids_BT)[0][0][:, 0].mean()
        for name in ("without", "with")
    )
    assert after < before - 0.1


def test_centroids_send_clusters_to_experts_of_their_own(
    dense: Dense, tmp_path: Path, text: Path
) -> None:
    """Most tokens go to the expert whose row their own cluster centre gave."""
    converted(dense(), tmp_path / "out", router__init="centroid", data__train=str(text))
    ids_BT = token_ids(Data(train=str(text)), dense(), VOCAB_SIZE)
    for layer, x_TD in enumerate(ffn_inputs(dense(), ids_BT)):
        found_ED = rows(tmp_path / "out", layer)
        _, labels_T = kmeans(x_TD, 4, seed=layer)
        assert ((x_TD @ found_ED.T).argmax(dim=1) == labels_T).float().mean() > 0.8
        mean_D = x_TD.mean(dim=0)
        cosine_E = (found_ED @ mean_D) / (found_ED.norm(dim=1) * mean_D.norm())
        assert float(cosine_E.abs().max()) < 1e-4


@pytest.mark.parametrize("init", ["normal", "orthogonal"])
def test_random_rows_leave_the_mean_out_unless_told_otherwise(
    dense: Dense, tmp_path: Path, text: Path, init: str
) -> None:
    settings = {"router__init": init, "data__train": str(text)}
    mean_D = ffn_inputs(dense(), token_ids(Data(train=str(text)), dense(), VOCAB_SIZE))[1].mean(0)
    for center, below in ((True, True), (False, False)):
        converted(dense(), tmp_path / f"{center}", router__center=center, **settings)
        found = rows(tmp_path / f"{center}", 1)
        cosine_E = (found @ mean_D) / (found.norm(dim=1) * mean_D.norm())
        assert (float(cosine_E.abs().max()) < 1e-4) == below


@pytest.mark.parametrize("init", ["centroid", "normal"])
def test_seeds_reproduce_bytes(dense: Dense, tmp_path: Path, text: Path, init: str) -> None:
    settings = {"router__init": init, "data__train": str(text)}
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        converted(dense(), tmp_path / name, router__seed=seed, **settings)
    weights = "model.safetensors"
    one, two, other = (digest(tmp_path / name)[weights] for name in ("one", "two", "other"))
    assert one == two != other


def test_virtual_groups_share_the_rows_of_clusters(
    dense: Dense, tmp_path: Path, text: Path
) -> None:
    manifest = converted(
        dense(),
        tmp_path / "out",
        target__num_experts=6,
        experts__granularity=2,
        router__init="centroid",
        data__train=str(text),
    )
    found = rows(tmp_path / "out", 1)
    assert torch.equal(found[0::2], found[1::2])
    assert manifest.routing is not None
    assert manifest.routing.closest[1] == pytest.approx(closest(found[::2]), abs=1e-4)
    assert manifest.routing.condition[1] == pytest.approx(condition(found[::2]), rel=1e-3)
    assert difference(logits(dense()), logits(tmp_path / "out")) <= 1e-4


def test_a_resumed_run_reports_every_layer(dense: Dense, tmp_path: Path) -> None:
    def stop(what: str, done: int, total: int) -> None:
        if what == "convert" and 2 * done > total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(planned(dense(), tmp_path / "out"), stop)
    resumed = converted(dense(), tmp_path / "out")
    assert resumed.routing == converted(dense(), tmp_path / "whole").routing
    assert resumed.routing is not None
    assert resumed.routing.layers == [0, 1, 2]


def test_changed_data_begins_anew(dense: Dense, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"

    def stop(what: str, done: int, total: int) -> None:
        if what == "convert" and 2 * done > total:
            raise KeyboardInterrupt

    settings = {"router__init": "centroid", "data__train": str(path)}
    path.write_text(TEXT * 20, encoding="utf-8")
    with pytest.raises(KeyboardInterrupt):
        convert(planned(dense(), tmp_path / "out", **settings), stop)
    path.write_text(TEXT[::-1] * 20, encoding="utf-8")
    converted(dense(), tmp_path / "out", **settings)
    converted(dense(), tmp_path / "whole", **settings)
    for layer in range(3):
        assert torch.equal(rows(tmp_path / "out", layer), rows(tmp_path / "whole", layer))


def warned(manifest: Manifest) -> dict[str, str]:
    return {note.code: note.message for note in manifest.warnings}


def test_parallel_rows_are_named(dense: Dense, tmp_path: Path) -> None:
    same = [["aaaa"], ["bbbb"], ["bbbb"], ["cccc"]]
    settings = {"router__init": "prompts", "target__architecture": "qwen2_moe"}
    found = converted(
        dense(), tmp_path / "same", router__prompts=same, target__layers="1:", **settings
    )
    assert "layers 1, 2" in warned(found)["parallel_rows"]
    assert found.routing is not None
    assert found.routing.closest == pytest.approx([1.0, 1.0], abs=1e-5)
    assert "parallel_rows" not in warned(
        converted(dense(), tmp_path / "differ", router__prompts=PROMPTS, **settings)
    )


def test_nothing_is_reported_where_nothing_is_measured(dense: Dense, tmp_path: Path) -> None:
    assert converted(dense(), tmp_path / "zeros", router__init="zeros").routing is None
    assert converted(dense(), tmp_path / "norms", router__measure=False).routing is None


def test_no_local_path_is_written(dense: Dense, tmp_path: Path, text: Path) -> None:
    converted(dense(), tmp_path / "out", data__train=str(text))
    for name in ("recipe.yaml", "moe_convert.json"):
        written = (tmp_path / "out" / name).read_text(encoding="utf-8")
        assert str(text.parent) not in written
        assert text.name in written


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no prompts": ({"router__init": "prompts"}, "has 0 lists, and there are 4 experts"),
    "too few lists": (
        {"router__init": "prompts", "router__prompts": [["a"], ["b"]]},
        "has 2 lists, and there are 4 experts",
    ),
    "lists per copy": (
        {
            "router__init": "prompts",
            "router__prompts": [["a"]] * 4,
            "experts__granularity": 2,
        },
        "has 4 lists, and there are 2 copies",
    ),
    "empty list": (
        {"router__init": "prompts", "router__prompts": [["a"], [], ["b"], ["c"]]},
        "Expert 1 has no prompts",
    ),
    "empty prompt": (
        {"router__init": "prompts", "router__prompts": [["a"], ["b"], ["c", " "], ["d"]]},
        "Expert 2 has an empty prompt",
    ),
    "negative lists": (
        {
            "router__init": "prompts",
            "router__prompts": PROMPTS,
            "router__negative_prompts": [["a"]],
        },
        "negative_prompts has 1 lists",
    ),
    "unused prompts": ({"router__prompts": PROMPTS}, r"no effect with router\.init normal"),
    "unmeasured centroids": (
        {"router__init": "centroid", "router__measure": False},
        "hidden states, which --no-measure",
    ),
    "unused data": ({"router__init": "zeros", "data__train": "x.txt"}, "--data has no effect"),
    "orthogonal": (
        {"router__init": "orthogonal", "target__num_experts": 65},
        "65 rows of 64 numbers",
    ),
    "clusters": (
        {"router__init": "centroid", "target__num_experts": 600},
        "512 tokens, fewer than the 600 clusters",
    ),
}


@pytest.mark.parametrize("mistake", list(REFUSED))
def test_the_plan_refuses_what_cannot_work(dense: Dense, mistake: str) -> None:
    changes, sentence = REFUSED[mistake]
    with pytest.raises(UsageError, match=sentence):
        planned(dense(), **changes)


@pytest.mark.parametrize("init", ["prompts", "centroid"])
def test_a_source_without_tokenizer_is_refused(
    dense: Dense, tmp_path: Path, text: Path, init: str
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in dense().iterdir():
        if "token" not in file.name:
            (bare / file.name).symlink_to(file)
    prompts = {"router__prompts": PROMPTS} if init == "prompts" else {"data__train": str(text)}
    with pytest.raises(UsageError, match="no tokenizer"):
        planned(bare, router__init=init, **prompts)


def test_clusters_of_the_built_in_text_are_worth_a_warning(dense: Dense, text: Path) -> None:
    notes = {note.code for note in planned(dense(), router__init="centroid").warnings}
    assert "sample_text" in notes
    plan = planned(dense(), router__init="centroid", data__train=str(text))
    assert "sample_text" not in {note.code for note in plan.warnings}


def test_every_kind_has_a_summary() -> None:
    kinds = Router.model_fields["init"].annotation
    assert set(Router.summaries) == set(kinds.__args__)  # type: ignore[union-attr]
