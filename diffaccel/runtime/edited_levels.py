"""Noise levels that a step callback changed on the scheduler, which a stock loop's next step would read there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.runtime.callbacks import edit_detector
from diffaccel.session import Session


class EditedLevels:
    """Takes changes of ``pipe.scheduler.sigmas`` over into a session's schedule, in place: samplers hold views of it.

    Args:
        session: of a call with a step callback, after its scheduler's ``set_timesteps``.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self._watch()

    def _watch(self) -> None:
        levels: Any = getattr(self.session.scheduler, "sigmas", None)
        self._levels = levels if isinstance(levels, Tensor) else None
        self._was_edited = edit_detector(self._levels)

    def take(self, reached: int) -> None:
        """Take over what was changed since; the network is told the times of before, as in a stock loop.

        Args:
            reached: number of the level that the sampler has reached.

        Raises:
            DiffAccelError: where the scheduler has another number of levels than before.
        """
        before, now = self._levels, getattr(self.session.scheduler, "sigmas", None)
        if before is None or (now is before and not self._was_edited()):
            return
        if not isinstance(now, Tensor) or now.shape != before.shape:
            raise DiffAccelError(
                f"callback_on_step_end left {_described(now)} as pipe.scheduler.sigmas, which were {len(before)} noise "
                "levels. Change their values and not their number."
            )
        schedule = self.session.schedule
        start = len(self.session.scheduler.timesteps) - len(self.session.timesteps)
        entries = [start + schedule.entry(level) for level in range(len(schedule.sigmas))]
        if entries[-1] < len(now):
            levels = torch.as_tensor(now, dtype=torch.float32, device="cpu").detach()[entries]
            if schedule.has_scheduler_levels:
                schedule.take_levels(levels, reached)
            else:  # latents of VP states are converted by the level that they have: that one stays
                schedule.take_levels(levels / (1 + levels), reached + 1)
        self._watch()


def _described(levels: Any) -> str:
    return f"{len(levels)}" if isinstance(levels, Tensor) and levels.ndim else f"a {type(levels).__name__}"
