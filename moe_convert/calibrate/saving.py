"""When a run writes a checkpoint: every so many steps, after some time, and when asked to stop."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from moe_convert.calibrate.job import Job
from moe_convert.training import state

if TYPE_CHECKING:
    from accelerate import Accelerator

SAVE_S = 300.0
"""Seconds after which a checkpoint is due, however few steps they were."""
Tensors = Callable[[], dict[str, torch.Tensor]]


class Saving:
    """Writes the checkpoints of a run, from its main process."""

    def __init__(self, job: Job, accelerator: Accelerator, step: int) -> None:
        """Go on after `step`, of which there is a checkpoint if it is not the first."""
        self._job, self._accelerator = job, accelerator
        self._saved = (step, time.monotonic())

    def after(self, position: state.Position, tensors: Tensors, *, stop: bool) -> None:
        """Write one after a step if it is due in any process, or if any was asked to stop.

        Raises:
            KeyboardInterrupt: one was; the checkpoint has been written.
        """
        stopped, due = self._everywhere(stop, self._due(position.step))
        if stopped or due:
            self.save(position, tensors)
        if stopped:
            # A launcher stops all processes when the first one ends, and one may still be writing.
            self._accelerator.wait_for_everyone()
            raise KeyboardInterrupt

    def save(self, position: state.Position, tensors: Tensors) -> None:
        """Write one unless the last one is of this step."""
        if position.step == self._saved[0]:
            return
        found = tensors()
        if self._accelerator.is_main_process:
            state.save(self._job.folder, position, found, self._job.section.keep)
        self._saved = (position.step, time.monotonic())

    def _due(self, step: int) -> bool:
        late = time.monotonic() - self._saved[1] > SAVE_S
        return late or step % self._job.section.save_every == 0

    def _everywhere(self, *wishes: bool) -> list[bool]:
        """Return which wishes any process has."""
        if self._accelerator.num_processes == 1:
            return list(wishes)
        flags = torch.tensor(wishes, dtype=torch.float32, device=self._accelerator.device)
        return [count > 0 for count in self._accelerator.reduce(flags, "sum").tolist()]
