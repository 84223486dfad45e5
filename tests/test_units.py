"""The small pure parts: lazy weights, FFNs, sizes, layer lists, and the writer's refusals."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from moe_convert.checkpoint import CheckpointWriter, TensorSpec, read_folder, sha256_of, shard
from moe_convert.errors import MoeConvertError, SourceError
from moe_convert.ffn import Assignment, Ffn, Weight, as_range, concatenated, gather
from moe_convert.recipe import chosen_layers, parse_bytes

SPECS = (
    TensorSpec("a", (4, 6), "F32"),
    TensorSpec("b", (8,), "BF16"),
    TensorSpec("c", (2, 0), "F32"),
)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def ffn_of(gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> Ffn:
    return Ffn(Weight.of(gate, "F32"), Weight.of(up, "F32"), Weight.of(down, "F32"))


def small_ffn() -> tuple[Ffn, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    gate, up, down = random(12, 8), random(12, 8) + 1, random(8, 12)
    return ffn_of(gate, up, down), (gate, up, down)


def run(ffn: Ffn, x_TD: torch.Tensor) -> torch.Tensor:
    gate, up, down = (w.load() for w in (ffn.gate_FD, ffn.up_FD, ffn.down_DF))
    return (torch.nn.functional.silu(x_TD @ gate.T) * (x_TD @ up.T)) @ down.T


@pytest.mark.parametrize("indices", [[0, 1, 2], [3, 4, 5, 6], [5, 1, 3], [2, 2, 2], [], [11]])
def test_rows_and_columns_are_indexing(indices: list[int]) -> None:
    tensor, neurons = random(12, 12), torch.tensor(indices, dtype=torch.int64)
    weight = Weight.of(tensor, "F32")
    for found, expected in (
        (weight.rows(as_range(neurons)), tensor[neurons]),
        (weight.columns(as_range(neurons)), tensor[:, neurons]),
    ):
        assert found.shape == tuple(expected.shape)
        assert torch.equal(found.load(), expected)


def test_consecutive_indices_become_a_range() -> None:
    assert as_range(torch.tensor([3, 4, 5])) == range(3, 6)
    assert as_range(torch.tensor([], dtype=torch.int64)) == range(0)
    assert isinstance(as_range(torch.tensor([3, 5])), torch.Tensor)
    assert isinstance(as_range(torch.tensor([4, 3])), torch.Tensor)


@pytest.mark.parametrize(("axis", "shape"), [(0, (24, 8)), (1, (12, 16))])
def test_concatenation(axis: int, shape: tuple[int, int]) -> None:
    one, two = random(12, 8), random(12, 8) * 2
    joined = concatenated([Weight.of(one, "F32"), Weight.of(two, "F32")], axis)
    assert joined.shape == shape
    assert torch.equal(joined.load(), torch.cat([one, two], axis))


def test_loading_is_lazy_and_casts_are_declared() -> None:
    loaded = []

    def load() -> torch.Tensor:
        loaded.append(1)
        return random(4, 4)

    weight = Weight((4, 4), "F32", load).cast("BF16").rows(range(2)).map(lambda t: t * 2)
    assert (weight.shape, weight.dtype, weight.num_bytes) == ((2, 4), "BF16", 16)
    assert loaded == []
    assert torch.equal(weight.load(), random(4, 4)[:2] * 2)
    assert weight.scaled(1.0) is weight


def test_stored_bytes_survive_exactly_what_leaves_them_alone(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, shard(SPECS, 10**9))
    tensor = random(4, 6)
    for spec in SPECS:
        writer.write(
            spec.name,
            Weight.of(tensor if spec.name == "a" else torch.zeros(spec.shape), spec.dtype),
        )
    writer.finish()
    weight = read_folder(tmp_path)["a"].weight()
    assert weight.stored is not None
    assert weight.rows(range(1, 3)).stored is not None
    assert torch.equal(weight.rows(range(1, 3)).load(), tensor[1:3])
    for changed in (
        weight.cast("BF16"),
        weight.map(lambda t: t),
        weight.columns(range(2)),
        weight.scaled(2),
    ):
        assert changed.stored is None
    assert weight.cast("F32").stored is not None


@pytest.mark.parametrize("neurons", [list(range(12)), [3, 1, 2, 0, 11, 10], [4, 5, 6, 7]])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_select_is_the_network_of_these_neurons(neurons: list[int], scale: float) -> None:
    ffn, (gate, up, down) = small_ffn()
    chosen = ffn.select(torch.tensor(neurons), scale)
    x_TD = random(5, 8)
    hidden = torch.nn.functional.silu(x_TD @ gate[neurons].T) * (x_TD @ up[neurons].T)
    assert chosen.num_neurons == len(neurons)
    assert torch.allclose(run(chosen, x_TD), scale * hidden @ down[:, neurons].T, atol=1e-5)


def test_gathered_parts_of_a_partition_add_up() -> None:
    ffn, _ = small_ffn()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    assignment = Assignment(order[:8].view(2, 4), order[8:], (0, 0), routed_scale=2.0)
    experts = gather((ffn,), assignment)
    x_TD = random(5, 8)
    assert experts.shared is not None
    total = sum(run(e, x_TD) for e in experts.routed) / 2.0 + run(experts.shared, x_TD)
    assert torch.allclose(total, run(ffn, x_TD), atol=1e-5)


def test_rows_come_from_the_source_they_name() -> None:
    one, _ = small_ffn()
    two = ffn_of(one.gate_FD.load() * 3, one.up_FD.load() * 3, one.down_DF.load() * 3)
    neurons = torch.arange(12).expand(2, -1)
    experts = gather((one, two), Assignment(neurons, torch.arange(0), (1, 0)))
    assert torch.equal(experts.routed[0].up_FD.load(), two.up_FD.load())
    assert torch.equal(experts.routed[1].up_FD.load(), one.up_FD.load())


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("1.5 kb", 1500), (" 2TB ", 2 * 10**12)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "5", "GB", "five GB", "0GB", "-1GB", "5GiB", "nanGB", "infGB"]
)
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match=r"size|positive"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("all", (0, 1, 2, 3, 4, 5)),
        ("4:", (4, 5)),
        (":2", (0, 1)),
        ("::2", (0, 2, 4)),
        ("1:5:3", (1, 4)),
        ("-2:", (4, 5)),
        ("0,2,5", (0, 2, 5)),
        ("5, 0", (0, 5)),
        ("3", (3,)),
        ("-1", (5,)),
        ([2, 0, 2], (0, 2)),
        ("9:", ()),
        ("::-1", (0, 1, 2, 3, 4, 5)),
    ],
)
def test_layer_choices(layers: str | list[int], expected: tuple[int, ...]) -> None:
    assert chosen_layers(layers, 6) == expected


@pytest.mark.parametrize("layers", ["six", "1-3", "6", "-7", "1:2:3:4", "::0", "a:", "0,", [6]])
def test_no_layer_choices(layers: str | list[int]) -> None:
    with pytest.raises(ValueError, match=r"slice|layer|all|invalid"):
        chosen_layers(layers, 6)


def test_shards_keep_the_order_and_the_limit() -> None:
    specs = [TensorSpec(f"t{n}", (n,), "F32") for n in (10, 10, 100, 1, 1)]
    shards = shard(specs, 100)
    names = [[spec.name for spec in part.specs] for part in shards]
    assert names == [["t10", "t10"], ["t100"], ["t1", "t1"]]
    assert shards[0].file == "model-00001-of-00003.safetensors"
    assert shard(specs, 10**6)[0].file == "model.safetensors"


def test_the_writer_writes_what_safetensors_reads(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    writer = CheckpointWriter(tmp_path, shard(SPECS, 10**9))
    values = {"a": random(4, 6), "b": random(8), "c": torch.zeros(2, 0)}
    for name in ("b", "c", "a"):
        spec = next(s for s in SPECS if s.name == name)
        writer.write(name, Weight.of(values[name], spec.dtype))
    hashes = writer.finish()
    found = load_file(tmp_path / "model.safetensors")
    assert torch.equal(found["a"], values["a"])
    assert torch.equal(found["b"], values["b"].bfloat16())
    assert found["c"].shape == (2, 0)
    assert hashes == {"model.safetensors": sha256_of(tmp_path / "model.safetensors")}
    assert not list(tmp_path.glob(".progress"))


@pytest.mark.parametrize("max_shard_bytes", [10**9, 1])
def test_a_file_is_hashed_no_further_than_it_is_written(
    tmp_path: Path, max_shard_bytes: int
) -> None:
    """The last tensor of each file comes first, with time to hash what lies before it."""
    writer = CheckpointWriter(tmp_path, shard(SPECS, max_shard_bytes))
    for spec in reversed(SPECS):
        writer.write(spec.name, Weight.of(random(*spec.shape), spec.dtype))
        writer.finish_step(spec.name)
        time.sleep(0.1)
    hashes = writer.finish()
    assert hashes == {path.name: sha256_of(path) for path in tmp_path.glob("*.safetensors")}


@pytest.mark.parametrize(
    ("name", "weight", "sentence"),
    [
        ("d", Weight.filled((4, 6), 0, "F32"), "did not announce"),
        ("a", Weight.filled((6, 4), 0, "F32"), "announced"),
        ("a", Weight.filled((4, 6), 0, "BF16"), "announced"),
        ("a", Weight((4, 6), "F32", lambda: torch.zeros(4, 5)), "announced"),
    ],
)
def test_the_writer_refuses_what_was_not_announced(
    tmp_path: Path, name: str, weight: Weight, sentence: str
) -> None:
    writer = CheckpointWriter(tmp_path, shard(SPECS, 10**9))
    with pytest.raises(MoeConvertError, match=sentence):
        writer.write(name, weight)
    writer.close()


def test_the_writer_refuses_to_finish_half_way(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, shard(SPECS, 10**9))
    writer.write("a", Weight.filled((4, 6), 1, "F32"))
    with pytest.raises(MoeConvertError, match="wrote no b"):
        writer.finish()
    writer.close()


def test_a_copy_from_a_file_that_ends_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    writer = CheckpointWriter(tmp_path / "source", shard(SPECS, 10**9))
    writer.close()
    ref = read_folder(tmp_path / "source")["a"]
    with ref.path.open("r+b") as file:
        file.truncate(ref.offset + 10)
    (tmp_path / "out").mkdir()
    writer = CheckpointWriter(tmp_path / "out", shard(SPECS, 10**9))
    writer.write("a", ref.weight())
    with pytest.raises(SourceError, match="ends inside tensor a"):
        writer.finish()
    writer.close()


def test_every_error_has_its_exit_code() -> None:
    from moe_convert import errors

    tree = {
        "MoeConvertError": 1, "UsageError": 2, "SourceError": 3, "UnsupportedError": 3,
        "DoesNotFitError": 4, "VerificationError": 5, "HubError": 6, "OutputExistsError": 7,
        "MissingDependencyError": 8,
    }  # fmt: skip
    assert {name: getattr(errors, name).exit_code for name in tree} == tree
    assert str(errors.UsageError("No.", "Do that.")) == "No. Do that."
