"""What the dense model runs over so that routers can be made and measured: data and prompts.

B rows · D hidden size · R router rows · T tokens
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from moe_convert.data import (
    Prompt,
    Writer,
    check_data,
    prompt_ids,
    token_ids,
    tokenizer_of,
    unwritten,
)
from moe_convert.edits import Refit
from moe_convert.errors import UsageError
from moe_convert.experts import Compose, Split
from moe_convert.recipe import MEASURED, Recipe
from moe_convert.routers import Prompts, States

if TYPE_CHECKING:
    import torch

    from moe_convert.targets import MoeShape

TOKENS_PER_NEURON = 4
"""How many tokens `refit` needs at least for each column that it solves for."""
TOKENS_PER_EXPERT = 16
"""How many a split made of data needs at least for each routed expert.

Experts that get some tokens each can be told apart by more than chance. Good groups take far more.
"""
FITTED_TOKENS = 8192
"""Tokens at most to which a split is fitted whose hurt is measured layer by layer."""
JUDGED_TOKENS = 2048
"""Tokens at most on which that is measured; they are others than the fitted ones."""
JUDGED_LENGTH = 512
"""Tokens of a row at most that it is measured on."""


@dataclass(frozen=True)
class Inputs:
    """Token ids of the data, [B, T], and of every router row's prompts."""

    data_BT: torch.Tensor
    positive: tuple[tuple[Prompt, ...], ...] = ()
    negative: tuple[tuple[Prompt, ...], ...] = ()

    @property
    def prompts(self) -> list[Prompt]:
        """All prompts, positive ones first."""
        return [prompt for group in (*self.positive, *self.negative) for prompt in group]

    @property
    def ids(self) -> list[torch.Tensor]:
        """What the dense model runs over, in the order in which `states` expects it."""
        return [self.data_BT, *(prompt.ids_1T for prompt in self.prompts)]

    @property
    def sha256(self) -> str:
        """A hash of all token ids."""
        text = repr([ids.tolist() for ids in self.ids])
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def samples(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Evenly spaced rows to fit a trial to, and others, perhaps shorter, to judge it on.

        Of little data an eighth of the rows is judged on. There must be two rows or more.
        """
        num_rows, length = self.data_BT.shape
        short = min(length, JUDGED_LENGTH)
        num_judged = max(1, min(JUDGED_TOKENS // short, num_rows // 8))
        judged = range(0, num_rows, num_rows // num_judged)[:num_judged]
        others = [row for row in range(num_rows) if row not in judged]
        num_fitted = min(len(others), max(1, FITTED_TOKENS // length))
        fitted = others[:: len(others) // num_fitted][:num_fitted]
        return self.data_BT[fitted], self.data_BT[list(judged), :short]

    def states(self, received_TD: torch.Tensor) -> States:
        """Sort what one layer received on `ids` into data and prompts' own tokens."""
        import torch

        data_TD, *parts = received_TD.split([ids.numel() for ids in self.ids])
        own = (part_TD[p.own_T] for part_TD, p in zip(parts, self.prompts, strict=True))
        none_TD = data_TD[:0]

        def gathered(groups: tuple[tuple[Prompt, ...], ...]) -> tuple[torch.Tensor, ...]:
            return tuple(torch.cat([none_TD, *(next(own) for _ in group)]) for group in groups)

        return States(data_TD, gathered(self.positive), gathered(self.negative))


def num_rows(recipe: Recipe, shape: MoeShape) -> int:
    """Return how many different rows a router has: experts of one copy share theirs."""
    return -(-shape.num_experts // recipe.experts.shared_rows)


def read_inputs(
    recipe: Recipe,
    shape: MoeShape,
    vocab_size: int,
    folder: Path | None,
    writer: Writer | None = None,
) -> Inputs | None:
    """Return the token ids that the routers need, with the tokenizer in `folder`; None if none.

    `writer` writes the text of `data.train: self` and `self:TEXT`.

    Raises:
        UsageError: data or prompts cannot be read, or are too short.
    """
    if not recipe.needs_input:
        return None
    data_BT = token_ids(recipe.data, folder, vocab_size, writer)
    wanted = num_rows(recipe, shape)
    if recipe.router.kind == "centroid" and data_BT.numel() < wanted:
        raise UsageError(
            f"The data holds {data_BT.numel()} tokens, fewer than the {wanted} clusters that "
            "centroid routers need.",
            "Give more text with --data.",
        )
    _check_enough(recipe, shape, data_BT)
    if recipe.router.kind != "prompts":
        return Inputs(data_BT)
    tokenizer = tokenizer_of(folder, "router.init prompts")
    groups = [
        tuple(tuple(prompt_ids(texts, tokenizer)) for texts in prompts)
        for prompts in prompts_per_row(recipe, wanted)
    ]
    inputs = Inputs(data_BT, *groups)
    if not all(bool(prompt.own_T.any()) for prompt in inputs.prompts):
        raise UsageError("The tokenizer makes no token of one of the prompts.", "Change it.")
    return inputs


def _check_enough(recipe: Recipe, shape: MoeShape, data_BT: torch.Tensor) -> None:
    """Refuse data that say too little about neurons, experts or layers to decide by them."""
    num_tokens, neurons = data_BT.numel(), TOKENS_PER_NEURON * shape.dense_size
    if any(isinstance(edit, Refit) for edit in recipe.experts.edits) and num_tokens < neurons:
        raise UsageError(
            f"The data holds {num_tokens} tokens, and solving for {shape.dense_size} neurons needs "
            f"{neurons}, {TOKENS_PER_NEURON} for each.",
            f"Give more text, set data.max_tokens to {neurons} or more, or use --no-refit.",
        )
    num_experts = shape.without_nulls.num_experts
    needed = TOKENS_PER_EXPERT * num_experts
    if recipe.carves and num_tokens < needed:
        raise UsageError(
            f"The data holds {num_tokens} tokens, and a split into {num_experts} routed experts "
            f"needs {needed}, {TOKENS_PER_EXPERT} for each.",
            f"Give more text, or set data.max_tokens to {needed} or more.",
        )
    if recipe.target.layers == MEASURED and len(data_BT) < 2:
        raise UsageError(
            f"The data is one row of {num_tokens} tokens, and --layers auto needs another one, to "
            "measure on what it did not fit.",
            "Give more text, set a smaller data.seq_len, or choose layers by number.",
        )


def prompts_per_expert(recipe: Recipe) -> tuple[Prompts, Prompts]:
    """Return the positive and negative prompts as the recipe lists them: sources, or routers."""
    if isinstance(recipe.experts, Compose):
        sources = recipe.experts.sources
        return tuple(s.prompts for s in sources), tuple(s.negative_prompts for s in sources)
    return recipe.router.prompts, recipe.router.negative_prompts


def prompts_per_row(recipe: Recipe, wanted: int) -> tuple[Prompts, Prompts]:
    """Return the prompts of every router row; several experts of one source have the same ones."""
    positive, negative = prompts_per_expert(recipe)
    rounds = wanted // len(positive)
    return positive * rounds, negative * (rounds if len(positive) == len(negative) else 1)


def check_inputs(
    recipe: Recipe, shape: MoeShape, hidden_size: int, vocab_size: int, folder: Path | None
) -> None:
    """Refuse router settings that cannot work; what needs a tokenizer is tried if it is at hand.

    Raises:
        UsageError: with the reason.
        MissingDependencyError: the data needs a package that is not installed.
    """
    router, wanted = recipe.router, num_rows(recipe, shape)
    if router.learns and not router.measure:
        raise UsageError(
            f"{router.kind.capitalize()} routers are made of hidden states, which --no-measure "
            "leaves out.",
            "Leave --no-measure out.",
        )
    _check_settings(recipe)
    if router.kind == "orthogonal" and wanted > hidden_size:
        raise UsageError(
            f"{wanted} rows of {hidden_size} numbers cannot all be at right angles.",
            "Use --router normal.",
        )
    may_calibrate = recipe.calibration.enabled
    if may_calibrate is None:
        may_calibrate = isinstance(recipe.experts, Split)
    unread = not recipe.needs_input and not may_calibrate
    if recipe.data.train is not None and unread:
        why = "router.init zeros" if router.kind == "zeros" else "--no-measure"
        raise UsageError(
            f"--data has no effect: with {why} nothing is measured.", "Leave one of them out."
        )
    if router.kind == "prompts":
        _check_prompts(recipe, wanted)
    elif router.prompts or router.negative_prompts:
        raise UsageError(
            f"router.prompts has no effect with router.init {router.kind}.",
            "Use --router prompts.",
        )
    check_data(recipe.data)
    users = recipe.data.train is not None or router.learns
    if users and folder is not None and recipe.data.given.hub is None:
        read_inputs(recipe, shape, vocab_size, folder, unwritten)


def _check_settings(recipe: Recipe) -> None:
    """Refuse what says how routers are measured where a split made of data does not ask."""
    router = recipe.router
    if recipe.carves and not router.measure:
        raise UsageError(
            "--no-measure has no effect: a split made of data measures its routers as it goes.",
            "Leave --no-measure out.",
        )
    if router.fitted and not router.center:
        raise UsageError(
            f"router.center has no effect: {router.kind} routers are not drawn at random.",
            "Leave it out, or use --router normal.",
        )


def _check_prompts(recipe: Recipe, wanted: int) -> None:
    positive, negative = prompts_per_expert(recipe)
    if isinstance(recipe.experts, Compose):
        if recipe.router.prompts or recipe.router.negative_prompts:
            raise UsageError(
                "router.prompts has no effect with experts.method compose.",
                "Give each of experts.sources its own prompts.",
            )
        names = [f"Source {source.model}" for source in recipe.experts.sources]
    else:
        what = "copies of the FFN" if recipe.experts.shared_rows > 1 else "experts"
        _check_count("router.prompts", len(positive), wanted, what)
        if negative:
            _check_count("router.negative_prompts", len(negative), wanted, what)
        names = [f"Expert {number}" for number in range(wanted)]
    for name, texts in zip(names, positive, strict=True):
        if not texts:
            raise UsageError(f"{name} has no prompts.", "Each needs at least one.")
    for name, texts in [*zip(names, positive, strict=True), *zip(names, negative, strict=False)]:
        if not all(text.strip() for text in texts):
            raise UsageError(f"{name} has an empty prompt.", "Write some words, or leave it out.")


def _check_count(field: str, found: int, wanted: int, what: str) -> None:
    if found != wanted:
        raise UsageError(
            f"{field} has {found} lists, and there are {wanted} {what}.",
            "Give one list of texts for each.",
        )


def input_notes(recipe: Recipe) -> Iterator[tuple[str, str, str]]:
    """Yield code, sentence and remedy of what may not be what a user means."""
    if recipe.router.kind == "centroid" and recipe.data.train is None:
        yield (
            "sample_text",
            "The clusters of centroid routers come from a built-in text of a few hundred tokens.",
            "Give text like the model's later input with --data.",
        )
    if recipe.router.kind != "prompts" and any(any(lists) for lists in prompts_per_expert(recipe)):
        yield (
            "prompts_unused",
            f"The sources have prompts, and router.init {recipe.router.kind} uses none.",
            "Use --router prompts.",
        )
