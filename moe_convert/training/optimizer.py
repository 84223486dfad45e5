"""AdamW on fp32 masters: routers at a rate of their own, cosine with warm-up, one clipped norm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moe_convert.training.settings import Descent, Schedule
from moe_convert.training.shards import clip, fill, is_cut, whole

STATE = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW keeps of each tensor."""
SCALER = ("scale", "_growth_tracker")
"""What the scaler of losses keeps."""
NOMINAL_SPREAD = 0.02
"""Spread of router rows for which their learning rate holds as it is given."""


@dataclass(frozen=True)
class Trained:
    """One trained tensor: its name in memory, the model's copy and the fp32 one that is stepped."""

    name: str
    part: str
    parameter: torch.nn.Parameter
    master: torch.Tensor

    @property
    def rate(self) -> float:
        """What its learning rate is multiplied by: for routers, the spread of the rows."""
        if self.part != "router":
            return 1.0
        spread = float(whole(self.master.detach()).square().mean().sqrt())
        return spread / NOMINAL_SPREAD if spread else 1.0


def rate_at(schedule: Schedule, step: int, steps: int) -> float:
    """Return what the learning rate of step 0, 1, … is multiplied by; never zero."""
    warmup = math.ceil(schedule.warmup * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if schedule.name == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


class Stepper:
    """Moves the trained tensors; holds the only optimiser state there is."""

    def __init__(
        self, trained: Sequence[Trained], section: Descent, steps: int, *, scaled: bool = False
    ) -> None:
        """Make a group for every learning rate, and an empty one where nothing is trained.

        With `scaled` losses are multiplied so that gradients in fp16 do not vanish; a step in which
        they overflow is left out, and the factor gets smaller.
        """
        self.trained, self._section, self._steps = list(trained), section, steps
        settings = section.optimizer
        assert settings.lr is not None
        assert settings.router_factor is not None
        groups: dict[float, list[torch.Tensor]] = {}
        for one in self.trained:
            factor = settings.router_factor if one.part == "router" else 1.0
            groups.setdefault(settings.lr * factor * one.rate, []).append(one.master)
        groups = groups or {0.0: []}
        self._peaks = list(groups)
        self._cut = any(is_cut(one.master) for one in self.trained)
        device = self.trained[0].master.device.type if self.trained else "cpu"
        self._scaler = torch.amp.GradScaler(device, enabled=scaled)
        self._optimizer = torch.optim.AdamW(
            [{"params": tensors, "lr": rate} for rate, tensors in groups.items()],
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            fused=bool(self.trained) and not self._cut,
            foreach=False if self._cut else None,
        )

    @property
    def lr(self) -> float:
        """The largest learning rate of the last step."""
        return max(float(group["lr"]) for group in self._optimizer.param_groups)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a loss to those at hand."""
        self._scaler.scale(loss).backward()

    def step(self, number: int) -> torch.Tensor:
        """Take the step of this number with the gradients at hand; return their norm."""
        masters = [one.master for one in self.trained]
        self._widen()
        self._scaler.unscale_(self._optimizer)
        clipped = clip if self._cut else torch.nn.utils.clip_grad_norm_
        norm: torch.Tensor = clipped(masters, self._section.clip_norm)
        factor = rate_at(self._section.schedule, number, self._steps)
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * factor
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        self._publish()
        return norm

    @property
    def _narrow(self) -> list[Trained]:
        """Those whose master is not the model's own copy."""
        return [one for one in self.trained if one.master is not one.parameter]

    def _widen(self) -> None:
        """Give the masters the model's gradients, in fp32."""
        narrow = [one for one in self._narrow if one.parameter.grad is not None]
        for one in narrow:
            one.master.grad = torch.empty_like(one.master)
        if narrow:
            found = [one.parameter.grad for one in narrow]
            torch._foreach_copy_([one.master.grad for one in narrow], found)
        for one in narrow:
            one.parameter.grad = None

    def _publish(self) -> None:
        """Give the model the new values, in its own dtype."""
        if self._narrow:
            with torch.no_grad():
                torch._foreach_copy_(
                    [one.parameter for one in self._narrow], [one.master for one in self._narrow]
                )

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return masters and the optimiser's state by name."""
        found = {f"master/{one.name}": whole(one.master.detach()) for one in self.trained}
        for one in self.trained:
            state = self._optimizer.state.get(one.master, {})
            found |= {f"{part}/{one.name}": whole(state[part]) for part in STATE if state}
        if self._scaler.is_enabled():
            kept = self._scaler.state_dict()
            found |= {f"scaler/{part}": torch.tensor(float(kept[part])) for part in SCALER}
        return found

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take up what `tensors` returned."""
        for one in self.trained:
            with torch.no_grad():
                fill(one.master, tensors[f"master/{one.name}"])
            if f"step/{one.name}" in tensors:
                device = one.master.device if self._optimizer.defaults["fused"] else "cpu"
                state = {"step": tensors[f"step/{one.name}"].to(device)}
                for part in STATE[1:]:
                    state[part] = torch.zeros_like(one.master.detach())
                    fill(state[part], tensors[f"{part}/{one.name}"])
                self._optimizer.state[one.master] = state
        if self._scaler.is_enabled():
            kept = {part: float(tensors[f"scaler/{part}"]) for part in SCALER}
            self._scaler.load_state_dict({**self._scaler.state_dict(), **kept})
        self._publish()
