"""Construction methods: which neurons of which checkpoint every expert takes.

Each method is one recipe node: its fields are the YAML, its validation and the algorithm. A method
returns an `Assignment`; weights are moved by `ffn.gather` alone. To add a method, add a class to a
module here and to the tables below; to add a way to split, add one to `split.STRATEGIES`.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Discriminator, Tag

from moe_convert.experts.base import DEFAULT_TAGS, Method
from moe_convert.experts.clone import Clone, SharedResidual
from moe_convert.experts.compose import Compose, ComposeSource
from moe_convert.experts.split import (
    STRATEGIES,
    Cmoe,
    Coactivation,
    Contiguous,
    Contribution,
    ExpertWeaver,
    Gradient,
    Learned,
    Random,
    Split,
    Weights,
)


def _tag(value: Any) -> str:
    """Return what tells the nodes apart: the method, and for a split the strategy."""
    fields = value if isinstance(value, dict) else vars(value)
    method, strategy = (str(fields.get(tag, known)) for tag, known in DEFAULT_TAGS.items())
    return strategy if method == "split" else method


ExpertsNode = Annotated[
    Annotated[Clone, Tag("clone")]
    | Annotated[SharedResidual, Tag("shared-residual")]
    | Annotated[Compose, Tag("compose")]
    | Annotated[Contribution, Tag("contribution")]
    | Annotated[Coactivation, Tag("coactivation")]
    | Annotated[Cmoe, Tag("cmoe")]
    | Annotated[ExpertWeaver, Tag("expertweaver")]
    | Annotated[Gradient, Tag("gradient")]
    | Annotated[Learned, Tag("learned")]
    | Annotated[Weights, Tag("weights")]
    | Annotated[Random, Tag("random")]
    | Annotated[Contiguous, Tag("contiguous")],
    Discriminator(_tag),
]
"""The union of all construction methods; `experts.method`, or `experts.strategy`, picks one."""

METHODS: dict[str, type[Method]] = {
    "clone": Clone,
    "shared-residual": SharedResidual,
    "split": Contribution,
    "compose": Compose,
}
"""Construction methods by name; `STRATEGIES` holds the kinds of split."""

__all__ = [
    "METHODS",
    "STRATEGIES",
    "Clone",
    "Compose",
    "ComposeSource",
    "Contribution",
    "ExpertsNode",
    "Learned",
    "Method",
    "SharedResidual",
    "Split",
]
