"""The steps of a run in order, across the stages of a sampler that changes the resolution."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional

from diffaccel.session import Session


class Track:
    """Which step belongs to which stage, at which timestep and resolution.

    Args:
        session: the call's own.
        parts: session and noise levels of every stage; none for a run at one resolution.
    """

    def __init__(self, session: Session, parts: Sequence[tuple[Session, Tensor]] = ()) -> None:
        self.own, self._parts = session, parts
        self.sessions = [at for at, _ in parts] or [session]
        self._starts = list(accumulate((len(sigmas) - 1 for _, sigmas in parts), initial=0))  # and the end

    @property
    def has_stages(self) -> bool:
        """Whether the sampler announced stages."""
        return bool(self._parts)

    @cached_property
    def timesteps(self) -> Tensor:
        """The timestep of every step."""
        if not self.has_stages:
            return self.own.schedule.timesteps
        times = [at.schedule.timestep(level) for at, levels in self._parts for level in levels[:-1]]
        return torch.stack([time.reshape(()).to(times[0]) for time in times])

    def stage(self, step: int) -> int:
        """Return the index of the stage of a step."""
        return min(sum(step >= end for end in self._starts[1:]), len(self.sessions) - 1)

    def session(self, step: int) -> Session:
        """Return the session of a step's resolution."""
        return self.sessions[self.stage(step)]

    def place(self, step: int) -> tuple[int, int] | None:
        """Return the index of a step in its stage, and the number of that stage's steps; None without stages."""
        if not self.has_stages:
            return None
        stage = self.stage(step)
        return step - self._starts[stage], self._starts[stage + 1] - self._starts[stage]

    def at_full_size(self, x: Tensor) -> Tensor:
        """Return the latents of a run that was interrupted in any stage, at the call's own size."""
        size = self.own.x.shape[2:]
        if not self.has_stages or x.shape[2:] == size:
            return x
        return functional.interpolate(x, size=tuple(size), mode="nearest")
