"""How a training run descends, as fields of a recipe. Nothing here imports torch."""

from __future__ import annotations

from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field


class Node(BaseModel):
    """A part of a section; fields it does not define are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Optimizer(Node):
    """AdamW; an entry of a router moves in proportion to the spread of its rows.

    An Adam step moves every entry by about the learning rate, whatever its size. Router rows come
    in very different sizes - a split flattens them on purpose - and a step as large as the rows
    would undo them, so their rate is `router_factor` times `lr` for rows of a spread of 0.02.
    """

    name: Literal["adamw"] = "adamw"
    lr: float | None = Field(None, gt=0, description="learning rate of all but the routers")
    router_factor: float | None = Field(None, gt=0, description="what routers multiply it by")
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.0, ge=0)


class Schedule(Node):
    """The learning rate over the run: linear warm-up, then cosine to zero, or constant."""

    name: Literal["cosine", "constant"] = "cosine"
    warmup: float = Field(0.05, ge=0, lt=1, description="share of all steps")


class Descent(Protocol):
    """What a section of a recipe says of its optimiser."""

    @property
    def optimizer(self) -> Optimizer:
        """AdamW's settings; the rates are given by now."""

    @property
    def schedule(self) -> Schedule:
        """How the rates go up and down."""

    @property
    def clip_norm(self) -> float:
        """The largest norm of all gradients together."""
