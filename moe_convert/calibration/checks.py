"""Settings that cannot do what they say, refused before anything is loaded."""

from __future__ import annotations

from moe_convert.calibration.choices import PRESETS, Made
from moe_convert.calibration.section import Calibration
from moe_convert.errors import UsageError
from moe_convert.experts import Split


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
    if section.compile and section.parallel != "replicate":
        raise UsageError(
            "--compile has no effect on layers that are cut over processes.",
            "Leave it out, or use --parallel replicate.",
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
