"""Families, targets and methods in words, from the tables alone."""

from __future__ import annotations

import difflib
import inspect
from typing import TYPE_CHECKING

from moe_convert.edits import EDITS
from moe_convert.errors import UsageError
from moe_convert.experts import METHODS, STRATEGIES, Split
from moe_convert.families import FAMILIES, DenseFamily
from moe_convert.families.custom import CUSTOM, CUSTOM_FAMILIES, CustomFamily
from moe_convert.families.refused import REFUSED
from moe_convert.routers import Router
from moe_convert.targets import TARGETS, MoeTarget
from moe_convert.wrappers import WRAPPERS, Wrapper

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic import BaseModel

ROUTING = {"softmax": "softmax over all experts, then top-k", "sigmoid": "sigmoid scores, top-k"}
CONSTANT = {True: "a constant, so clones are exact", False: "what the router says"}
DENSE = {"none": "none", "prefix": "the first ones", "any": "any"}
CUSTOM_TEXT = (
    "--target custom: the dense class with experts for FFNs, by a modelling file beside the "
    "weights; needs trust_remote_code=True, and no serving engine loads it"
)
PROOF = "clones and full splits are tested to reproduce the dense logits to 1e-4 in fp32"
SHARED = {
    "none": "none",
    "free": "of any width",
    "units": "in units of the expert size",
    "one": "one of the expert size",
}


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
    if name in CUSTOM_FAMILIES:
        sections[f"{name} as {CUSTOM}"] = _custom(CUSTOM_FAMILIES[name])
    for wrapper in WRAPPERS:
        if name in {wrapper.model_type, wrapper.moe_type}:
            sections[f"{wrapper.model_type} as {wrapper.moe_type}"] = _wrapper(wrapper)
    if name in REFUSED:
        sections[f"{name}: refused"] = [REFUSED[name]]
    if name == CUSTOM:
        sections["MoE target custom"] = [CUSTOM_TEXT]
        sections["holds"] = [", ".join(CUSTOM_FAMILIES)]
    elif name in TARGETS:
        sections[f"MoE target {name}"] = _target(TARGETS[name])
        held = [f.model_type for f in FAMILIES.values() if name in f.targets]
        sections["holds"] = [", ".join(held)]
    elif not sections:
        wrapped = [row.model_type for row in WRAPPERS]
        known = [*FAMILIES, *TARGETS, *wrapped, *CUSTOM_FAMILIES, *REFUSED, CUSTOM]
        near = difflib.get_close_matches(name, known, n=1)
        raise UsageError(
            f"There is no family or target {name!r}.",
            f"Did you mean {near[0]}?" if near else "See `moe-convert archs ls`.",
        )
    return sections


def _family(family: DenseFamily) -> list[str]:
    lines = [f"class: {family.architecture}", f"for example: {family.examples}"]
    lines.append(f"exact{': ' + family.limit if family.limit else ''}; {PROOF}")
    for name, allowed in family.only.items():
        lines.append(f"refused unless {name} is {' or '.join(map(repr, allowed))}")
    return lines


def _wrapper(wrapper: Wrapper) -> list[str]:
    inner = [f"{dense} as {text.moe_type}" for dense, text in wrapper.texts.items()]
    return [
        f"class: {wrapper.architecture}",
        f"for example: {wrapper.examples}",
        f"text decoder: {', '.join(inner)}",
        "towers, projectors, their config and processor files go through as they are",
        f"exact; {PROOF}, for texts and for a prompt with an image",
    ]


def _custom(family: CustomFamily) -> list[str]:
    lines = [f"class: {family.architecture}", f"for example: {family.examples}"]
    return [*lines, f"no stock architecture holds all of it: {family.reason}", CUSTOM_TEXT]


def _target(target: MoeTarget) -> list[str]:
    holds = [*target.holds, *target.always, *sorted(target.absorbs)]
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
        traps = "; ".join(trap.described for trap in engine.traps) or "no known trap"
        lines.append(f"{engine.name}: {traps if engine.registered else 'not registered'}")
    return lines


def method_summaries() -> dict[str, str]:
    """Return name and one line of every method, strategy, edit and router initialiser."""
    methods = {name: f"{row.summary} ({row.paper})" for name, row in METHODS.items()}
    methods["split"] = "cut the dense FFN into experts; strategy contribution unless said otherwise"
    ways = {f"strategy {name}": f"{row.summary} ({row.paper})" for name, row in STRATEGIES.items()}
    edits = {f"edit {name}": f"{row.summary} ({row.paper})" for name, row in EDITS.items()}
    routers = {f"router {name}": text for name, text in Router.summaries.items()}
    return methods | ways | edits | routers


def describe_method(name: str) -> list[str]:
    """Return documentation and options of a method, strategy, edit or router initialiser.

    The word before its name in `method_summaries` may be left out.

    Raises:
        UsageError: nothing has this name.
    """
    word, _, last = name.rpartition(" ")
    if last in Router.summaries and word in {"", "router"}:
        about = f"{last}: {Router.summaries[last]}"
        return [about, "", f"Options of every router; this one is `init: {last}`.", *_node(Router)]
    known: dict[str, type[BaseModel]]
    known = {**METHODS, **_after("strategy", STRATEGIES), **_after("edit", EDITS), "router": Router}
    full = next((one for one in known if name in {one, one.rpartition(" ")[2]}), None)
    if full is None:
        named = [*method_summaries(), "router"]
        near = difflib.get_close_matches(name, [*named, *(n.split()[-1] for n in named)], n=1)
        raise UsageError(
            f"There is no method {name!r}.",
            f"Did you mean {near[0]}?" if near else "See `moe-convert methods ls`.",
        )
    return _node(known[full])


def _after(word: str, rows: Mapping[str, type[BaseModel]]) -> dict[str, type[BaseModel]]:
    return {f"{word} {name}": row for name, row in rows.items()}


def _node(model: type[BaseModel]) -> list[str]:
    """Return the documentation of a recipe node and its fields."""
    lines = inspect.cleandoc(model.__doc__ or "").splitlines()
    if issubclass(model, Split):
        edits = ", ".join(edit.edit for edit in model.default_edits) or "none"
        lines += ["", f"Where nothing else is asked for: router {model.router}, edits {edits}."]
    for field, info in model.model_fields.items():
        default = "(required)" if info.is_required() else f"= {info.default!r}"
        lines.append(f"  {field} {default}  {info.description or ''}".rstrip())
    return lines
