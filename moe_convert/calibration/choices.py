"""What the open fields of the section become for a conversion and a machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moe_convert.calibration.section import Calibration, Objective, Part
from moe_convert.experts import Clone, Compose, ExpertsNode, SharedResidual, Split
from moe_convert.targets import MoeTarget
from moe_convert.training.settings import Optimizer

FULL_TOKENS = 2_000_000
CPU_TOKENS = 131_072
STEP_TOKENS = 8192
"""Tokens of one optimiser step where nobody says otherwise."""
MOVING = {"cpu": 64, "cuda": 192}
"""Width of an expert that takes as long to multiply by as moving a token to an expert and back.

Measured on one CPU core (hidden size 576, fp32: widths 24 to 192, 2 to 16 experts of 8 to 48); for
GPUs worked out from the bytes that are moved.
"""


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


@dataclass(frozen=True)
class Preset:
    """What a method leaves to calibrate, with which loss and how fast.

    Routers move at 1e-3 for rows of a spread of 0.02, one part in twenty of an entry a step, and
    the experts of clones at a tenth of that. Those of a split have more to learn, and its routers
    nothing: they are fitted to what each expert gives. Training them too, at the experts' rate,
    cost SmolLM2-135M 4 to 5 % of perplexity at half and a quarter of the FFN (36 M tokens, beside a
    static control on the same text), and a model of 260k parameters at a quarter 0.533 of KL to
    dense in place of 0.426, or 0.482 where routers hear of all experts by the straight-through
    gradient; at a tenth of the rate 0.432, and at half of the FFN 0.194 in place of 0.198. On quite
    another text learned routers did better.
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
