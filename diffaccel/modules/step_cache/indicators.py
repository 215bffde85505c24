"""Decisions by how much an indicator changes from step to step, read one step late so that no queue is drained."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffaccel.modules.step_cache.decisions import Decision, Look, Place


class LateNumber:
    """A number on its way from the device: it is copied to pinned memory behind the work that computes it."""

    def __init__(self, value: Tensor) -> None:
        self._event: Any = None
        self._value = value.detach()
        if value.is_cuda:
            self._value = torch.empty((), dtype=value.dtype, device="cpu", pin_memory=True)
            self._value.copy_(value.detach(), non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(value.device))

    def read(self) -> float:
        """Return the number; one step later this waits for the start of that step only, whose rest is still queued."""
        if self._event is not None:
            self._event.synchronize()
        return float(self._value)


def relative_change(value: Tensor, before: Tensor) -> Tensor:
    """Return ``mean |value - before| / mean |before|``, a scalar on the device; 0 for equal inputs, also for zeros."""
    difference = (value.float() - before.float()).abs().mean()
    return difference / before.float().abs().mean().clamp_min(1e-16)


@dataclass
class ChangeBound(Decision):
    """Skip while the indicator has changed by less than ``threshold`` since the last real step.

    The change at step i is ``sum_j d_j`` over the steps j since the last real one, with ``d_j`` the relative change
    from step j - 1 to j, or with ``accumulates=False`` the relative change from the last real step to i. One step late
    (the default) the newest known rate of change stands in for that of the step itself.

    Args:
        first, last: numbers of steps that are real at the start and at the end.
        most_skips: maximum number of skipped steps in a row; 0 for no limit.
        same_step: read the change of the step itself, which waits for the device at every step.
    """

    threshold: float
    accumulates: bool = True
    first: int = 1
    last: int = 1
    most_skips: int = 0
    same_step: bool = False

    def __post_init__(self) -> None:
        self._before: Tensor | None = None
        self._pending: tuple[LateNumber, int] | None = None
        self._known, self._rate = 0.0, math.inf

    def is_real(self, at: Place, look: Look) -> bool:
        if self.threshold <= 0:
            return True
        value = look()
        change = None if self._before is None else relative_change(value, self._before)
        estimate = self._same_step(change) if self.same_step else self._late(at)
        is_forced = at.step < self.first or at.step >= at.steps - self.last
        is_forced |= bool(self.most_skips) and at.skipped >= self.most_skips
        is_real = is_forced or estimate >= self.threshold
        if change is not None and not self.same_step:
            self._pending = LateNumber(change), 1 if self.accumulates else at.skipped + 1
        if is_real:
            self._known = 0.0
        if is_real or self.accumulates:
            self._before = value.detach()
        return is_real

    def _same_step(self, change: Tensor | None) -> float:
        number = math.inf if change is None else float(change)
        self._known = self._known + number if self.accumulates else number
        return self._known

    def _late(self, at: Place) -> float:
        """Return the change since the last real step, the last of it by the newest known rate."""
        if self._pending is not None:
            number, steps = self._pending
            change, self._pending = number.read(), None
            self._rate = change / steps
            if at.skipped:  # the step that it was read at was skipped: it counts
                self._known = self._known + change if self.accumulates else change
        return self._known + self._rate


def frequency_gain(size: int, noise_share: Tensor, power: float) -> Tensor:
    """Return the gain ``(size,)`` of each frequency of one axis, of the best linear estimate of the clean signal.

    ``g(f) = (1 - s) P / ((1 - s)^2 P + s^2)`` for noise share ``s`` and a spectrum ``P(f) = |f|^-power``
    (arXiv 2602.18993, equation 7).
    """
    s = noise_share.to(torch.float32).clamp(1e-6, 1 - 1e-6)
    frequencies = torch.fft.fftfreq(size, device=s.device, dtype=torch.float32)
    inverse = frequencies.abs().pow(power) + 1e-16  # 1 / P: the gain is (1 - s) / ((1 - s)^2 + s^2 / P)
    return (1 - s) / ((1 - s) ** 2 + s**2 * inverse)


def filtered(latents: Tensor, noise_share: Tensor, power: float) -> Tensor:
    """Return latents ``(B, C, [F,] H, W)`` filtered along each axis by :func:`frequency_gain`, of mean 1 together."""
    axes = tuple(range(2, latents.ndim))
    share = noise_share.to(latents.device, non_blocking=True)
    share = share.float().mean() if share.ndim else share
    gain = torch.ones((), dtype=torch.float32, device=latents.device)
    for axis in axes:
        shape = [1] * latents.ndim
        shape[axis] = latents.shape[axis]
        gain = gain * frequency_gain(latents.shape[axis], share, power).reshape(shape)
    spectrum = torch.fft.fftn(latents.float(), dim=axes)
    return torch.fft.ifftn(spectrum * (gain / gain.mean()), dim=axes).real
