"""Calibration as it is asked for: the section, its choices by method and machine, and checks."""

from moe_convert.calibration.checks import check
from moe_convert.calibration.choices import (
    MOVING,
    STEP_TOKENS,
    Made,
    all_cost_less,
    resolved,
    wanted,
)
from moe_convert.calibration.section import (
    PARTS,
    TRACKERS,
    Calibration,
    Part,
    exact_objective,
    patterns,
)

__all__ = [
    "MOVING",
    "PARTS",
    "STEP_TOKENS",
    "TRACKERS",
    "Calibration",
    "Made",
    "Part",
    "all_cost_less",
    "check",
    "exact_objective",
    "patterns",
    "resolved",
    "wanted",
]
