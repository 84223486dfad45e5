"""Student and teacher: loaded, placed, and told apart into what is trained and what is not.

E routed experts · D hidden size
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig

from moe_convert.calibration import PARTS, Calibration, Part, patterns
from moe_convert.checkpoint.names import auto_class
from moe_convert.checkpoint.source import read_config
from moe_convert.errors import SourceError
from moe_convert.targets import TARGETS, MoeTarget
from moe_convert.targets.custom import custom_target, written_by_us
from moe_convert.training.optimizer import Trained
from moe_convert.training.shards import is_cut
from moe_convert.wrappers import written_target

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def target_of(folder: Path) -> MoeTarget:
    """Return the row of the architecture that a folder holds.

    Raises:
        SourceError: it is no known MoE target.
    """
    config = read_config(folder / "config.json")
    family = written_by_us(folder, config)
    found = TARGETS.get(str(config["model_type"]))
    if "text_config" in config:
        found = written_target(config)
    elif family is not None:
        found = custom_target(family, config)
    if found is None:
        raise SourceError(f"{folder} holds a {config['model_type']}, which is no known MoE target.")
    return found


def load(folder: Path, dtype: torch.dtype, **options: Any) -> PreTrainedModel:
    """Load a folder in inference mode, frozen; code in it runs only if it is ours to the byte."""
    trusted = written_by_us(folder, read_config(folder / "config.json")) is not None
    auto = auto_class(AutoConfig.from_pretrained(folder, trust_remote_code=trusted))
    model: PreTrainedModel = auto.from_pretrained(
        folder, dtype=dtype, trust_remote_code=trusted, **options
    )
    return model.eval().requires_grad_(False)


def load_teacher(
    folder: Path, dtype: torch.dtype, device: torch.device, how: str
) -> PreTrainedModel:
    """Load the dense model on the device, or `offload`: leave it on the host and stream it."""
    from accelerate import cpu_offload

    teacher = load(folder, dtype)
    if how == "offload":
        return cpu_offload(teacher, execution_device=device)
    return teacher.to(device)


def modules_of(model: PreTrainedModel, suffix: str) -> list[tuple[str, torch.nn.Module]]:
    """Return the modules whose path ends so and that hold a parameter, in the order of layers."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if name.endswith(f".{suffix}") and next(module.parameters(), None) is not None
    ]


def prepare_student(
    model: PreTrainedModel,
    target: MoeTarget,
    section: Calibration,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> list[Trained]:
    """Switch gradients on in an fp32 model and move it; return what is trained, routers first.

    The model computes in `dtype` but for its routers, which stay fp32. Parameters that are not fp32
    any more leave an fp32 copy for the optimiser to step, so that small steps are not lost.
    """
    assert section.train is not None
    parameters = [(n, p) for n, p in model.named_parameters() if p.numel() and not _is_bias(n)]
    parts: dict[str, Part] = {}
    for part, pattern in patterns(section.train, target).items():
        parts |= {n: part for n, _ in parameters if pattern.search(n) and n not in parts}
    masters: dict[str, torch.Tensor] = {}
    if dtype != torch.float32:
        masters = {n: p.data.to(device) for n, p in parameters if n in parts}
        _narrow(model, target, dtype)
    if section.parallel == "replicate":
        model.to(device)
    trained = []
    for name, parameter in parameters:
        if name in parts:
            parameter.requires_grad_(True)
            own = masters[name] if parameter.dtype != torch.float32 else parameter
            trained.append(Trained(name, parts[name], parameter, own.requires_grad_(True)))
    return sorted(trained, key=lambda one: PARTS.index(one.part))


def _is_bias(name: str) -> bool:
    """Whether a tensor only biases the selection, which no gradient reaches."""
    return name.endswith(("correction_bias", "expert_bias"))


def _narrow(model: PreTrainedModel, target: MoeTarget, dtype: torch.dtype) -> None:
    """Round all parameters but those of routers, which then compute in fp32; buffers stay."""
    routers = modules_of(model, target.router_module)
    wide = {id(parameter) for _, router in routers for parameter in router.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in wide:
            parameter.data = parameter.data.to(dtype)
    for _, router in routers:
        _feed_fp32(router)


def _feed_fp32(router: torch.nn.Module) -> None:
    """Let a router compute in fp32, and experts with weights in their own dtype.

    What experts give times weights in fp32 would be as wide, and moved about at twice the cost.
    """
    forward = router.forward

    @functools.wraps(forward)
    def widened(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        found = forward(hidden.float(), *args, **kwargs)
        if not isinstance(found, tuple):
            return found
        logits, weights, chosen = found
        return logits, weights.to(hidden.dtype), chosen

    router.forward = widened


def selection_biases(model: PreTrainedModel) -> list[tuple[str, torch.Tensor]]:
    """Return name and tensor of every selection bias, in the order of layers."""
    every = [*model.named_parameters(), *model.named_buffers()]
    return [(name, tensor) for name, tensor in every if _is_bias(name)]


def share_weights(teacher: PreTrainedModel, student: PreTrainedModel) -> int:
    """Let the teacher use the student's frozen tensors of equal name and bits; return the bytes.

    Tied tensors of the teacher stay tied: they are replaced one by one with the same one.
    """
    frozen = {n: p for n, p in _all_names(student) if not p.requires_grad}
    saved = 0
    for name, parameter in _all_names(teacher):
        twin = frozen.get(name)
        if twin is None or twin is parameter or not _same(parameter, twin):
            continue
        module, _, leaf = name.rpartition(".")
        setattr(teacher.get_submodule(module), leaf, twin)
        saved += twin.numel() * twin.element_size()
    return saved


def _all_names(model: PreTrainedModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    return iter(list(model.named_parameters(remove_duplicate=False)))


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    if (
        is_cut(other)
        or one.shape != other.shape
        or one.dtype != other.dtype
        or one.device != other.device
    ):
        return False
    return bool(torch.equal(one, other))
