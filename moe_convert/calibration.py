"""The `calibration` section of a recipe, and what its open fields become for a conversion.

Nothing here imports torch: the section is part of the recipe, and choices are made from the method.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from pydantic import Field, field_validator

from moe_convert.errors import UsageError
from moe_convert.experts import Clone, Compose, ExpertsNode, SharedResidual, Split
from moe_convert.targets import MoeTarget
from moe_convert.training.settings import Node, Optimizer, Schedule

Part = Literal["router", "experts", "norms", "all"]
Tracker = Literal["trackio", "tensorboard", "wandb"]
PARTS: tuple[Part, ...] = get_args(Part)
TRACKERS: tuple[Tracker, ...] = get_args(Tracker)

FULL_TOKENS = 2_000_000
CPU_TOKENS = 131_072
STEP_TOKENS = 8192
"""Tokens of one optimiser step where nobody says otherwise."""
MOVING = {"cpu": 64, "cuda": 192}
"""Width of an expert that takes as long to multiply by as moving a token to an expert and back.

Measured on one CPU core (hidden size 576, fp32: widths 24 to 192, 2 to 16 experts of 8 to 48); for
GPUs worked out from the bytes that are moved.
"""


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


@dataclass(frozen=True)
class Preset:
    """What a method leaves to calibrate, with which loss and how fast.

    Routers move at 1e-3 for rows of a spread of 0.02, one part in twenty of an entry a step, and
    the experts of clones at a tenth of that. Those of a split have more to learn, and its routers
    nothing: they are fitted to what each expert gives. KL to dense at a quarter of the FFN of a
    model of 260k parameters, 1.03 before and after 600k tokens: 0.426 with experts alone, with
    routers at a tenth of their rate 0.432, at the same rate 0.533, or 0.482 where they hear of all
    experts by the straight-through gradient. At half of the FFN from 0.425 to 0.198 instead of
    0.245. That is on text of the same kind; on quite another one routers that learned did better.
    """

    train: tuple[Part, ...]
    objective: Mapping[str, float]
    lr: float
    router_factor: float = 10.0


BALANCED = {"lm": 1.0, "aux": 0.01, "z": 0.001}
PRESETS: dict[type, Preset] = {
    Split: Preset(("experts",), {"distill": 1.0}, 1e-3, router_factor=0.1),
    Compose: Preset(("router",), BALANCED, 1e-4),
    SharedResidual: Preset(("router", "experts"), BALANCED, 1e-4),
    Clone: Preset(("router", "experts"), BALANCED, 1e-4),
}
"""The first class that a method is an instance of decides.

A split has lost what the dense model knows and gets it back from the dense model's own logits; its
router predicts which neurons matter, and balance would only make that worse. A composed model is
none of its sources, so its routers learn from text.
"""


def resolved(section: Calibration, made: Made, *, gpu: bool) -> Calibration:
    """Return the section with every choice made that follows from the method and the machine."""
    preset = next(preset for kind, preset in PRESETS.items() if isinstance(made.method, kind))
    rates = {"lr": preset.lr, "router_factor": preset.router_factor}
    given = section.optimizer.model_dump(exclude_none=True)
    optimizer = Optimizer(**{**rates, **given})
    tokens = section.max_tokens or (FULL_TOKENS if gpu else CPU_TOKENS)
    precision = section.mixed_precision
    objective = _objective(section.objective, preset, made.target)
    train, dense_router = section.train, section.dense_router
    if train is None:
        train = preset.train if objective.terms else ()
    if dense_router is None:
        dense_router = _hears_all(section, made, train, objective, "cuda" if gpu else "cpu")
    if precision == "auto":
        precision = "bf16" if gpu and not objective.hidden else "no"
    return section.model_copy(
        update={
            "train": train,
            "objective": objective,
            "dense_router": dense_router,
            "optimizer": optimizer,
            "max_tokens": tokens,
            "mixed_precision": precision,
        }
    )


def _hears_all(
    section: Calibration, made: Made, train: tuple[Part, ...], objective: Objective, device: str
) -> bool:
    """Return whether routers hear of all experts by default: in a split, if these fire anyway."""
    learn = {"router", "all"} & set(train) and {"distill", "lm"} & objective.terms.keys()
    known = isinstance(made.method, Split) and made.gates_are_scores and not made.null_experts
    together = section.parallel != "experts"
    sizes = (made.expert_size, made.num_experts, made.top_k)
    return bool(learn) and known and together and all_cost_less(*sizes, device)


def all_cost_less(expert_size: int, num_experts: int, top_k: int, device: str) -> bool:
    """Return whether all experts on every token cost less than moving tokens to the chosen ones."""
    return expert_size * (num_experts / top_k - 1) <= MOVING[device]


def _objective(given: Objective | None, preset: Preset, target: MoeTarget) -> Objective:
    """Return the weights of all terms; layer by layer nothing of a preset can be learned beside."""
    named = given.model_dump(exclude_unset=True) if given else {}
    left_out = {"distill", "lm"} if named.get("hidden") else set()
    if target.router_gives == "shares":
        left_out |= {"z"}
    usual = {name: weight for name, weight in preset.objective.items() if name not in left_out}
    return Objective(**{**dict.fromkeys(Objective.model_fields, 0.0), **usual, **named})


def wanted(section: Calibration, method: ExpertsNode, exact: bool, *, gpu: bool) -> bool:
    """Return whether `upcycle` calibrates: by itself only what is of no use without."""
    if section.enabled is not None:
        return section.enabled
    return gpu and isinstance(method, Split) and not exact


@dataclass(frozen=True)
class Made:
    """The conversion that is to be calibrated, as far as the choices depend on it.

    `exact` says that its function was the dense one whatever the routers say or, for splits, with
    every expert chosen; `selection_bias` that the target stores one. With `null_experts` the
    routers' logits are held against a threshold.
    """

    method: ExpertsNode
    target: MoeTarget
    exact: bool
    top_k: int
    num_experts: int
    expert_size: int
    selection_bias: bool
    null_experts: int = 0

    @property
    def gates_are_scores(self) -> bool:
        """Whether the weights of the chosen experts are their scores over the sum of these."""
        return self.target.weights_sum is not None and not self.target.fixed_top_k


def check(section: Calibration, made: Made) -> None:
    """Refuse a resolved section that cannot do what it says.

    Raises:
        UsageError: with the reason.
    """
    assert section.objective is not None
    assert section.train is not None
    terms = section.objective.terms
    if not terms and not section.bias_update:
        raise UsageError(
            "calibration.objective has no term that counts.", "Give one a weight, such as lm: 1."
        )
    _check_parts(section, made)
    if terms.get("hidden") and set(terms) & {"distill", "lm"}:
        raise UsageError(
            "The hidden objective trains layer by layer and cannot be mixed with distill or lm.",
            "Run them one after the other.",
        )
    others = [part for part in section.train if part != "router"]
    if others and not set(terms) & {"distill", "lm", "hidden"}:
        raise UsageError(
            f"Balance alone says nothing to {', '.join(others)}.",
            "Use --train router, or add distill or lm to the objective.",
        )
    _check_effects(section)
    if terms.get("hidden"):
        _check_hidden(section)
    if section.mixed_precision == "fp16" and section.parallel != "replicate":
        raise UsageError(
            "fp16 needs its losses scaled, which does not work on parameters that are cut.",
            "Use --mixed-precision bf16.",
        )
    _check_balance(section, made)
    if made.null_experts:
        _check_threshold(section)
    learned = [name for name in terms if name in {"distill", "lm", "hidden"}]
    if learned and not others:
        _check_router_gradient(" and ".join(learned), made)


def _check_parts(section: Calibration, made: Made) -> None:
    """Refuse parts and losses, or rates and parts, that have nothing to do with each other."""
    assert section.objective is not None
    terms = section.objective.terms
    if not terms and section.train:
        raise UsageError(
            f"Without a loss only the selection biases move, and not {', '.join(section.train)}.",
            "Leave --train out, or give the objective a term.",
        )
    if terms and not section.train:
        raise UsageError(
            "calibration.train names no part, so that nothing would be trained.",
            "Name some, such as router, or leave it out.",
        )
    preset = next(preset for kind, preset in PRESETS.items() if isinstance(made.method, kind))
    own = section.optimizer.router_factor != preset.router_factor
    if own and not {"router", "all"} & set(section.train or ()):
        raise UsageError(
            "calibration.optimizer.router_factor has no effect where routers are not trained.",
            "Leave it out, or add router to --train.",
        )
    if "z" in terms and made.target.router_gives == "shares":
        raise UsageError(
            f"The router of {made.target.model_type} gives shares that add up to one, of which the "
            "z term is the same whatever they are.",
            "Leave --z-coef out.",
        )


def _check_effects(section: Calibration) -> None:
    """Refuse settings that need another one to mean something."""
    assert section.objective is not None
    learned = {"distill", "lm"} & section.objective.terms.keys()
    routers = {"router", "all"} & set(section.train or ())
    if section.dense_router and not (routers and learned) and not section.objective.hidden:
        raise UsageError(
            "--dense-router is a gradient of distill or lm to routers, and there is none.",
            "Leave it out, or train the router with --objective distill or lm.",
        )
    if section.early_stop.min_delta and section.early_stop.patience is None:
        raise UsageError(
            "calibration.early_stop.min_delta has no effect without a patience.",
            "Set calibration.early_stop.patience as well.",
        )
    offloaded = section.teacher == "offload" and not section.objective.hidden
    if offloaded and "distill" not in section.objective.terms:
        raise UsageError(
            "calibration.teacher: offload has no effect where nothing is distilled.",
            "Leave it out, or use --objective distill.",
        )


def _check_hidden(section: Calibration) -> None:
    """Refuse what layer by layer has no meaning."""
    settings = {
        "train": bool(set(section.train or ()) - {"router", "experts"}),
        "bias_update": bool(section.bias_update),
        "dense_router": section.dense_router,
        "mixed_precision": section.mixed_precision != "no",
        "gradient_checkpointing": section.gradient_checkpointing is True,
        "compile": section.compile,
        "grad_accum": section.grad_accum > 1,
        "teacher": section.teacher != "shared",
        "parallel": section.parallel != "replicate",
        "early_stop": section.early_stop.patience is not None,
    }
    named = ", ".join(f"calibration.{name}" for name, given in settings.items() if given)
    if named:
        raise UsageError(
            "The hidden objective trains routers and experts, and nothing else, a layer at a time "
            f"in fp32, so that {named} cannot take effect as given.",
            "Leave it out, or use --objective distill.",
        )


def _check_threshold(section: Calibration) -> None:
    assert section.train is not None
    if {"router", "all"} & set(section.train) or section.bias_update or section.dense_router:
        raise UsageError(
            "The routers predict norms that a threshold is held against, and training them would "
            "change how many experts a token uses.",
            "Use --train experts, without --bias-update and --dense-router.",
        )


def _check_balance(section: Calibration, made: Made) -> None:
    target = made.target
    if section.bias_update and not made.selection_bias:
        raise UsageError(
            f"{target.model_type} stores no selection bias, which loss-free balancing updates.",
            "Use --aux-coef, or convert to glm4_moe.",
        )
    if section.dense_router and not made.gates_are_scores:
        raise UsageError(
            f"The weights of {target.model_type}'s experts are not scores over their sum, which "
            "the straight-through gradient takes them for.",
            "Leave --dense-router out.",
        )


def _check_router_gradient(names: str, made: Made) -> None:
    """Refuse to train routers alone where the loss does not depend on them."""
    target = made.target
    if made.exact and not isinstance(made.method, Split):
        raise UsageError(
            "The experts are exact copies and their weights add up to a constant, so the routers "
            f"get no gradient from {names}.",
            "Train the experts too (--train router+experts), convert with --noise, or balance only "
            "(--objective aux).",
        )
    if target.fixed_top_k or (made.top_k == 1 and target.weights_sum is not None):
        why = f"{target.model_type} gives" if target.fixed_top_k else "top-1 gives"
        raise UsageError(
            f"{why} the chosen experts the same weight whatever the router says, so the routers "
            f"get no gradient from {names}.",
            "Train the experts too (--train router+experts), or balance only (--objective aux).",
        )


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
