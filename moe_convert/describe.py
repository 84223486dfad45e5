"""Families, targets and methods in words, from the tables alone."""

from __future__ import annotations

import difflib
import inspect
from typing import TYPE_CHECKING


from moe_convert.edits import EDITS
from moe_convert.errors import UsageError
from moe_convert.experts import METHODS
from moe_convert.families import FAMILIES, DenseFamily
from moe_convert.routers import Router
from moe_convert.targets import TARGETS, MoeTarget

if TYPE_CHECKING:
    from pydantic import BaseModel

ROUTING = {"softmax": "softmax over all experts, then top-k", "sigmoid": "sigmoid scores, top-k"}
CONSTANT = {True: "a constant, so clones are exact", False: "what the router says"}
DENSE = {"none": "none", "prefix": "the first ones", "any": "any"}
SHARED = {"none": "none", "free": "of any width", "units": "in units of the expert size"}


def describe(name: str) -> dict[str, list[str]]:
    """Return title and lines about a family or target.

    Raises:
        UsageError: no row has this name.
    """
    sections = {}
    if name in FAMILIES:
        sections[f"dense family {name}"] = _family(FAMILIES[name])
        for target in FAMILIES[name].targets:
            sections[f"as {target}"] = _target(TARGETS[target])
    elif name in TARGETS:
        sections[f"MoE target {name}"] = _target(TARGETS[name])
        held = [f.model_type for f in FAMILIES.values() if name in f.targets]
        sections["holds"] = [", ".join(held)]
    else:
        near = difflib.get_close_matches(name, [*FAMILIES, *TARGETS], n=1)
        raise UsageError(
            f"There is no family or target {name!r}.",
            f"Did you mean {near[0]}?" if near else "See `moe-convert archs ls`.",
        )
    return sections


def _family(family: DenseFamily) -> list[str]:
    lines = [f"class: {family.architecture}", f"for example: {family.examples}"]
    for name, allowed in family.only.items():
        lines.append(f"refused unless {name} is {' or '.join(map(repr, allowed))}")
    return lines


def _target(target: MoeTarget) -> list[str]:
    holds = [*target.holds, *target.always]
    constant = target.weights_sum is not None
    refused = "refused: any other feature of the body, by name"
    lines = [
        f"class: {target.architecture}",
        f"router: {ROUTING[target.scoring]}; the weights of the chosen sum to {CONSTANT[constant]}",
        f"shared experts: {SHARED[target.shared]}",
        f"dense layers between: {DENSE[target.dense_layers]}",
        f"can hold: {', '.join(holds) or 'a plain Llama body'}; {refused}",
    ]
    for engine in target.engines:
        traps = "; ".join(trap.text for trap in engine.traps) or "no known trap"
        lines.append(f"{engine.name}: {traps if engine.registered else 'not registered'}")
    return lines


def method_summaries() -> dict[str, str]:
    """Return name and one line of every method and router initialiser."""
    methods = {name: f"{row.summary} ({row.paper})" for name, row in METHODS.items()}
    edits = {f"edit {name}": f"{row.summary} ({row.paper})" for name, row in EDITS.items()}
    routers = {f"router {name}": text for name, text in Router.summaries.items()}
    return methods | edits | routers


def describe_method(name: str) -> list[str]:
    """Return documentation and options of a method or of the routers.

    Raises:
        UsageError: no method has this name.
    """
    word, _, last = name.rpartition(" ")
    known: dict[str, type[BaseModel]] = {**METHODS, **EDITS, "router": Router}
    model = Router if word == "router" else known.get(last)
    if model is None:
        raise UsageError(f"There is no method {name!r}.", f"Known: {', '.join(known)}.")
    lines = inspect.cleandoc(model.__doc__ or "").splitlines()
    for field, info in model.model_fields.items():
        lines.append(f"  {field} = {info.default!r}  {info.description or ''}".rstrip())
    return lines
