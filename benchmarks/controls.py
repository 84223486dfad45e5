"""What the benchmarks of splits share: shares as counts, and the static control.

The control is a conversion like any other, of which nothing but the shared neurons counts: stock
types must choose an expert, so the chosen one is empty. Its values stay zero in training, for
neither `down` nor what comes before it gets a gradient from the other.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from moe_convert.carving import Carved
from moe_convert.convert import convert
from moe_convert.edits import Fit
from moe_convert.ffn import FfnSample, Neurons
from moe_convert.manifest import Manifest
from moe_convert.plan import Plan, make_plan
from moe_convert.recipe import SCHEMA, build_recipe


class Mute(Fit):
    """Let nothing but the shared neurons fire, so that a split becomes static pruning."""

    edit: Literal["mute"] = "mute"

    def fit(self, carved: Carved, sample: FfnSample, seed: int) -> Carved:
        """Empty the routed experts, and choose none of them."""
        shared_F = (carved.group_F == len(carved.router_ED)).float()
        old = carved.neurons
        neurons = Neurons(
            old.gate_FD * shared_F[:, None],
            old.up_FD * shared_F[:, None],
            old.down_DF * shared_F,
            old.act,
        )
        return replace(carved, neurons=neurons, top_k=0)


def counts(active: float, units: int) -> dict[str, int]:
    """Return the counts of a share, half of what fires being shared."""
    fires = round(active * units)
    shared = fires // 2
    return {
        "target.num_experts": units - shared,
        "target.top_k": fires - shared,
        "target.shared_experts": shared,
    }


def static(active: float, units: int) -> dict[str, int]:
    """Return counts in which all that fires is shared; the one expert that is chosen is empty."""
    fires = round(active * units)
    return {
        "target.num_experts": units - fires,
        "target.top_k": 1,
        "target.shared_experts": fires,
    }


def split_plan(folder: Path, fields: dict[str, Any], *, muted: bool = False) -> Plan:
    """Return the plan of a split, as `fields` of a recipe say; `muted` makes the control of it."""
    always = {
        "output.dir": str(folder),
        "output.card": False,
        "experts.method": "split",
        "calibration.enabled": False,
    }
    recipe = build_recipe({"schema": SCHEMA}, {**always, **fields})
    if muted:
        edits = (Mute(), *recipe.experts.edits)
        method = recipe.experts.model_copy(update={"edits": edits})
        recipe = recipe.model_copy(update={"experts": method})
    return make_plan(recipe)


def split_to(folder: Path, fields: dict[str, Any], *, muted: bool = False) -> Manifest:
    """Split into a folder; see `split_plan`."""
    manifest = convert(split_plan(folder, fields, muted=muted))
    if muted:  # what comes later reads the recipe, which knows no such edit
        manifest.recipe["experts"]["edits"] = manifest.recipe["experts"]["edits"][1:]
        manifest.save(folder)
    return manifest
