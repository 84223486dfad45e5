"""Experts from several checkpoints: open them, hold them against the base, merge and average.

All tensors stay lazily loaded: an adapter is added to a weight, and an average is taken, when that
one tensor is written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_convert.checkpoint import Source, TensorRef, open_source
from moe_convert.checkpoint.lora import Adapter, is_adapter, open_adapter
from moe_convert.errors import SourceError, UsageError
from moe_convert.experts import Compose
from moe_convert.families import Body, DenseFamily, split_name
from moe_convert.ffn import ITEM_BITS, Ffn, Weight

if TYPE_CHECKING:
    import torch

UNCOMPARED = frozenset({"carried", "max_positions", "exact_below"})
"""Body fields that may differ: token ids, dropout, and how long a context is allowed."""

ATTENTION_ONLY = frozenset({
    "rope", "local_rope", "partial_rotary", "interleaved_rope", "sliding_window", "layer_types",
    "nope_layers", "clip_qkv", "attention_multiplier",
})  # fmt: skip
"""Body fields without tensors that say how attention works: they may differ from a base that keeps
its own attention."""

Reader = Callable[[Source], tuple[Source, Body]]


@dataclass(frozen=True)
class ExpertSource:
    """A checkpoint whose FFNs become experts: a model of its own, or an adapter on the base."""

    source: Source
    body: Body
    scale: float = 1.0
    adapter: Adapter | None = None

    @property
    def name(self) -> str:
        """What the manifest records."""
        return self.adapter.name if self.adapter else self.source.name

    @property
    def folder(self) -> Path | None:
        """Where its files lie, if they are at hand."""
        return self.adapter.folder if self.adapter else self.source.folder

    @property
    def revision(self) -> str | None:
        """Branch or tag of a model from the Hub."""
        return None if self.adapter else self.source.revision

    @property
    def sha(self) -> str | None:
        """Commit of a model from the Hub."""
        return None if self.adapter else self.source.sha

    @property
    def dtype(self) -> str:
        """How most of its weights are stored."""
        return self.adapter.refs[0].dtype if self.adapter else self.source.dtype

    @property
    def num_params(self) -> int:
        """Parameters of the model or of the adapter alone."""
        if self.adapter:
            return self.adapter.num_params
        return sum(ref.weight().num_params for ref in self.source.tensors.values())

    @property
    def refs(self) -> tuple[TensorRef, ...]:
        """Every tensor that it adds to what the base has."""
        return self.adapter.refs if self.adapter else tuple(self.source.tensors.values())

    def fetch(self) -> ExpertSource:
        """Make the tensors readable; a GGUF file keeps its name and hash."""
        source = replace(self.source.fetch(), name=self.source.name, sha=self.source.sha)
        return replace(self, source=source)

    def same_as(self, base: Source) -> bool:
        """Whether it is the base itself, so that its experts change nothing."""
        mine, theirs = (replace(s, fetch=_unfetched) for s in (self.source, base))
        return self.adapter is None and self.scale == 1.0 and mine == theirs

    @cached_property
    def weights(self) -> dict[str, Weight]:
        """Its tensors, an adapter's changes included."""
        weights = {name: ref.weight() for name, ref in self.source.tensors.items()}
        return self.adapter.merged(weights) if self.adapter else weights

    def ffn(self, layer: int, family: DenseFamily, dtype: str) -> Ffn:
        """Return the FFN of one layer, `down` times the scale."""
        ffn = family.ffn(layer, self.weights, self.body).cast(dtype)
        return replace(ffn, down_DF=ffn.down_DF.scaled(self.scale))


def _unfetched() -> Source:
    raise AssertionError("only compared")


def open_experts(
    method: Compose,
    base: Source,
    body: Body,
    read: Reader,
    token: str | None = None,
    download: bool = True,
) -> tuple[ExpertSource, ...]:
    """Open every source by its headers, one that is named twice only once, and check that it fits.

    `read` returns a source as its family understands it, and its body.

    Raises:
        SourceError: one is missing, corrupt or unsupported.
        UsageError: model type, sizes, a tensor or a tokenizer differ from the base's.
    """
    opened: dict[tuple[str, str], ExpertSource] = {}
    found = []
    for wanted in method.sources:
        key = (wanted.model, wanted.revision)
        if key not in opened:
            opened[key] = _open(*key, base, body, read, token, download)
            _check(opened[key], base, body, averaged=method.attention == "average")
        found.append(replace(opened[key], scale=wanted.scale))
    return tuple(found)


def _open(
    model: str,
    revision: str,
    base: Source,
    body: Body,
    read: Reader,
    token: str | None,
    download: bool,
) -> ExpertSource:
    folder = Path(model).expanduser()
    if folder.is_dir() and is_adapter(folder):
        return ExpertSource(base, body, adapter=open_adapter(folder))
    source = open_source(model, revision, token, download)
    ours, theirs = base.config["model_type"], source.config["model_type"]
    if ours != theirs:
        raise _differ("model_type", base, ours, source.name, theirs)
    return ExpertSource(*read(source))


def _check(expert: ExpertSource, base: Source, body: Body, *, averaged: bool) -> None:
    """Refuse a source that does not fit the base, with both sides and both values."""
    if expert.adapter:
        _check_adapter(expert.adapter, base)
        return
    for name, mine, other in _differences(body, expert.body):
        if averaged or name not in ATTENTION_ONLY:
            raise _differ(name, base, mine, expert.name, other)
    _check_shapes(expert.source, base)
    check_tokenizers(expert.source, base)


def distinct(experts: tuple[ExpertSource, ...]) -> list[ExpertSource]:
    """Return every checkpoint once, however many experts it gives."""
    found: dict[int, ExpertSource] = {}
    for expert in experts:
        found.setdefault(id(expert.adapter or expert.source), expert)
    return list(found.values())


def _differ(what: str, base: Source, mine: object, other: str, theirs: object) -> UsageError:
    return UsageError(
        f"{what} differs: {mine} in the base {base.name}, {theirs} in {other}.",
        "Experts must come from checkpoints of one model.",
    )


def _differences(mine: Body, theirs: Body) -> Iterator[tuple[str, object, object]]:
    """Yield the features in which two bodies differ, with both values."""
    for field in fields(Body):
        ours, other = getattr(mine, field.name), getattr(theirs, field.name)
        if field.name not in UNCOMPARED and ours != other:
            yield field.name, ours, other


def _check_shapes(source: Source, base: Source) -> None:
    for name, ref in base.tensors.items():
        other = source.tensors.get(name)
        if "rotary_emb.inv_freq" in name or (other and other.shape == ref.shape):
            continue
        theirs = list(other.shape) if other else "none"
        raise _differ(f"Tensor {name}", base, list(ref.shape), source.name, theirs)


def _check_adapter(adapter: Adapter, base: Source) -> None:
    for name, change in adapter.changes.items():
        ref = base.tensors.get(name)
        if ref is None:
            raise UsageError(
                f"The adapter {adapter.name} changes {name}, which the base {base.name} does not "
                "have.",
                f"It was trained on {adapter.base}." if adapter.base else "",
            )
        if ref.shape != change.shape:
            raise _differ(f"Tensor {name}", base, list(ref.shape), adapter.name, list(change.shape))


def check_tokenizers(source: Source, base: Source) -> None:
    """Refuse a source whose tokenizer gives other ids; a chat template may differ.

    Nothing is compared where one side is not at hand or has no tokenizer: see `untold_tokenizers`.

    Raises:
        UsageError: a token's id or a merge differs.
    """
    if source.folder is None or base.folder is None:
        return
    mine, theirs = tokenizer_content(base.folder), tokenizer_content(source.folder)
    for file in sorted(mine.keys() & theirs.keys()):
        if mine[file] != theirs[file]:
            what, ours, other = _first_difference(mine[file], theirs[file])
            raise _differ(f"The tokenizer ({file}): {what}", base, ours, source.name, other)


def tokenizer_content(folder: Path) -> dict[str, Any]:
    """Return what decides token ids, by file: ids by token, merges in order, or raw bytes."""
    found: dict[str, Any] = {}
    if (folder / "tokenizer.json").is_file():
        return {"tokenizer.json": _fast_tokenizer(folder / "tokenizer.json")}
    if (folder / "vocab.json").is_file():
        found["vocab.json"] = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    for name in ("merges.txt", "tokenizer.model"):
        if (folder / name).is_file():
            lines = (folder / name).read_bytes().splitlines()
            found[name] = [line for line in lines if not line.startswith(b"#version")]
    return found


def _fast_tokenizer(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        vocab = data["model"].get("vocab", {})
        pieces = isinstance(vocab, list)
        ids = {piece[0]: n for n, piece in enumerate(vocab)} if pieces else dict(vocab)
        ids |= {token["content"]: token["id"] for token in data.get("added_tokens") or ()}
        merges = data["model"].get("merges") or ()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(f"{path.name} in {path.parent.name} cannot be read.") from error
    joined = {f"merge {n}": m if isinstance(m, str) else " ".join(m) for n, m in enumerate(merges)}
    return {**{f"token {token!r}": number for token, number in ids.items()}, **joined}


def _first_difference(mine: Any, theirs: Any) -> tuple[str, object, object]:
    if isinstance(mine, list):
        return "its content", f"{len(mine)} lines", f"{len(theirs)} other lines"
    for key in {**mine, **theirs}:
        if mine.get(key) != theirs.get(key):
            return key, mine.get(key, "none"), theirs.get(key, "none")
    raise AssertionError("they are equal")


def notes(
    method: Compose,
    experts: tuple[ExpertSource, ...],
    base: Source,
    family: DenseFamily,
    body: Body,
) -> Iterator[tuple[str, str, str]]:
    """Yield code, sentence and remedy of what is left out or could not be compared."""
    for expert in distinct(experts):
        if expert.adapter:
            yield from _adapter_notes(method, expert.adapter, base, family)
            continue
        yield from _source_notes(expert.source, base)
        for name, mine, other in _differences(body, expert.body):
            yield (
                "attention_differs",
                f"{name} is {mine} in the base and {other} in {expert.name}, whose FFNs were "
                "trained with another attention than they get here.",
                "Expect to train afterwards.",
            )


def _source_notes(source: Source, base: Source) -> Iterator[tuple[str, str, str]]:
    if source.folder is not None and base.folder is not None:
        mine, theirs = tokenizer_content(base.folder), tokenizer_content(source.folder)
        if mine.keys().isdisjoint(theirs):
            yield (
                "tokenizer_unknown",
                f"The tokenizers of the base {base.name} and of {source.name} could not be "
                "compared: they have no file in common.",
                "Make sure that both give the same token ids.",
            )
    if ITEM_BITS[source.dtype] > ITEM_BITS[base.dtype]:
        yield (
            "expert_rounded",
            f"{source.name} is stored as {source.dtype} and the base as {base.dtype}.",
            "Use --dtype fp32 to keep every bit of its FFNs.",
        )


def _adapter_notes(
    method: Compose, adapter: Adapter, base: Source, family: DenseFamily
) -> Iterator[tuple[str, str, str]]:
    inside = family.ffn_names.names
    other = sorted({i for _, i in map(split_name, adapter.changes) if i not in inside})
    parts = ", ".join(name.removesuffix(".weight") for name in other)
    if other and method.attention == "base":
        yield (
            "adapter_ignored",
            f"The adapter {adapter.name} also changes {parts}, which an expert does not hold, so "
            "these changes are left out.",
            "Use experts.attention: average to take them in.",
        )
    if len(other) == len({i for _, i in map(split_name, adapter.changes)}):
        yield (
            "adapter_without_ffn",
            f"The adapter {adapter.name} changes no FFN: its expert is the base's.",
            "Train an adapter on gate, up and down projections.",
        )
    named = (adapter.base or "").rstrip("/").rsplit("/", 1)[-1]
    if named and named != base.name.rsplit("/", 1)[-1]:
        yield (
            "adapter_base",
            f"The adapter {adapter.name} was trained on {named}, and the base is {base.name}.",
            "Its changes only make sense on the model that it was trained on.",
        )


def averaged(experts: tuple[ExpertSource, ...]) -> dict[str, Weight]:
    """Return the mean of every tensor over the experts, as Branch-Train-MiX averages attention."""
    parts = [expert.weights for expert in experts]
    return {name: _mean([part[name] for part in parts if name in part]) for name in parts[0]}


def _mean(weights: list[Weight]) -> Weight:
    return Weight(weights[0].shape, weights[0].dtype, partial(_load_mean, weights), rounds=True)


def _load_mean(weights: list[Weight]) -> torch.Tensor:
    """Add in fp32, one tensor at a time."""
    total = weights[0].load().float()
    for weight in weights[1:]:
        total = total.add(weight.load().float())
    return total / len(weights)
