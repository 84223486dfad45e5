"""The plan: everything that a conversion will write, decided from headers before a tensor is read.

Every error that a user can cause is raised here. The conversion then writes the announced tensors
and no others.
"""

from moe_convert.plan.choices import most_dense
from moe_convert.plan.estimate import available_ram_bytes, check_fits
from moe_convert.plan.layout import blank_experts, lay_out, without_ffn
from moe_convert.plan.model import Estimate, Layout, Note, Plan, Step
from moe_convert.plan.resolve import make_plan, plan_source, with_layers

__all__ = [
    "Estimate",
    "Layout",
    "Note",
    "Plan",
    "Step",
    "available_ram_bytes",
    "blank_experts",
    "check_fits",
    "lay_out",
    "make_plan",
    "most_dense",
    "plan_source",
    "with_layers",
    "without_ffn",
]
