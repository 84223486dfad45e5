"""The `calibration` section of a recipe, and the tensors that its parts name.

Nothing here imports torch: the section is part of the recipe.
"""

from __future__ import annotations

import re
from typing import Literal, get_args

from pydantic import Field, field_validator

from moe_convert.targets import MoeTarget
from moe_convert.training.settings import Node, Optimizer, Schedule

Part = Literal["router", "experts", "norms", "all"]
Tracker = Literal["trackio", "tensorboard", "wandb"]
PARTS: tuple[Part, ...] = get_args(Part)
TRACKERS: tuple[Tracker, ...] = get_args(Tracker)


class Objective(Node):
    """Weights of the loss terms; those that are not named keep what the method presets.

    `distill` is the KL divergence from the dense model, `hidden` the squared error of every MoE
    layer's output by itself, `lm` cross-entropy, `aux` the load balance of every layer and `z` the
    squared log-sum-exp of router logits.
    """

    distill: float = Field(0.0, ge=0)
    hidden: float = Field(0.0, ge=0)
    lm: float = Field(0.0, ge=0)
    aux: float = Field(0.0, ge=0)
    z: float = Field(0.0, ge=0)

    @property
    def terms(self) -> dict[str, float]:
        """The terms that count."""
        return {name: weight for name, weight in self.model_dump().items() if weight}


class EarlyStop(Node):
    """Stop when the smoothed loss has not fallen by `min_delta` for `patience` steps."""

    patience: int | None = Field(None, ge=1)
    min_delta: float = Field(0.0, ge=0)


class Guards(Node):
    """When a run counts as failed: exit code 5, and the weights stay those of the start."""

    max_loss_ratio: float = Field(3.0, gt=1, description="loss over that of the first step")
    max_ppl_rise: float = Field(3.0, gt=1, description="perplexity over that before the training")
    max_ppl_ratio: float | None = Field(None, gt=0, description="perplexity over the dense model's")
    max_dead_share: float | None = Field(None, ge=0, le=1, description="dead experts of all")


class Calibration(Node):
    """A short fine-tune of a converted checkpoint; null leaves a choice to the method."""

    enabled: bool | None = Field(None, description="null: for splits, where there is a GPU")
    train: tuple[Part, ...] | None = Field(None, description="router, experts, norms or all")
    objective: Objective | None = None
    bias_update: float = Field(
        0.0, ge=0, description="loss-free balancing: step of the biases, for scores of spread 0.2"
    )
    dense_router: bool | None = Field(
        None,
        description="straight-through gradient from all experts; null: for splits whose experts "
        "are so narrow that it costs nothing",
    )
    max_tokens: int | None = Field(None, ge=16, description="tokens to train on, repeats included")
    max_steps: int | None = Field(None, ge=1)
    batch_size: int | None = Field(None, ge=1, description="rows of a step, over all processes")
    grad_accum: int = Field(1, ge=1, description="parts that a process's rows are cut into")
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    clip_norm: float = Field(1.0, gt=0)
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    gradient_checkpointing: Literal["auto"] | bool = Field(
        "auto", description="compute layers twice to save memory; auto: if a step does not fit"
    )
    compile: bool = Field(
        False, description="fuse what lies between products: faster, after a minute of compiling"
    )
    teacher: Literal["shared", "offload"] = Field(
        "shared", description="weights shared with the student, or streamed from the host"
    )
    parallel: Literal["replicate", "fsdp", "experts"] = Field(
        "replicate", description="on several processes: what each of them holds"
    )
    save_every: int = Field(
        200, ge=1, description="steps between checkpoints; there is one every five minutes as well"
    )
    keep: int = Field(2, ge=1, description="checkpoints that are kept")
    early_stop: EarlyStop = EarlyStop()
    guards: Guards = Guards()
    trackers: tuple[Tracker, ...] = ()
    seed: int = Field(0, ge=0, description="decides the order of the rows")

    @field_validator("train", mode="before")
    @classmethod
    def _one_part_is_a_list(cls, value: object) -> object:
        return re.split(r"[+,]", value) if isinstance(value, str) else value

    @field_validator("objective", mode="before")
    @classmethod
    def _names_are_weights(cls, value: object) -> object:
        """Read `distill+lm` as `exact_objective` does."""
        return exact_objective(value) if isinstance(value, str) else value


def exact_objective(text: str) -> dict[str, float]:
    """Return `distill+lm` as weights of one, and zero for the terms that are not there.

    `none` is no term at all, which leaves loss-free balancing.
    """
    terms = [] if text == "none" else re.split(r"[+,]", text)
    return {**dict.fromkeys(Objective.model_fields, 0.0), **dict.fromkeys(terms, 1.0)}


def patterns(parts: tuple[Part, ...], target: MoeTarget) -> dict[Part, re.Pattern[str]]:
    """Return what the loaded model calls the tensors of each part, routers first.

    The names are those in memory: experts lie in `experts`, shared ones beside them, and a router
    is the weight of the module that `router_module` names.
    """
    router = re.escape(f".{target.router_module}.")
    known: dict[Part, str] = {
        "router": rf"{router}(\w+\.)*weight$",
        "experts": r"\.(experts|shared_experts?|shared_mlp)\.",
        "norms": r"(^|\.)[^.]*norm[^.]*\.(weight|bias)$",
        "all": r"",
    }
    return {part: re.compile(known[part]) for part in known if part in parts}
