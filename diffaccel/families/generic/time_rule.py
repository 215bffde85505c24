"""The map from a scheduler's timesteps to a network's time argument, fitted on observed pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

TOLERANCE = 1e-5


@dataclass(frozen=True)
class TimeRule:
    """``time = slope * timestep + offset``, rounded as the pipeline rounds it.

    Attributes:
        form: the elementwise computation.
        exact: whether it equals the pipeline's to the bit.
    """

    slope: float
    offset: float
    form: Callable[[Tensor], Tensor]
    exact: bool

    def __call__(self, timestep: Tensor) -> Tensor:
        return self.form(timestep)

    def holds(self, timestep: Tensor, time: Tensor) -> bool:
        """Return whether ``timestep`` maps to ``time``; the two may be on different devices."""
        mapped = self(timestep).to(time.device)
        if self.exact:
            return torch.equal(mapped, time)
        return bool((mapped - time).abs() <= _tolerance(time.dtype) * max(1.0, float(time.abs())))


def _tolerance(dtype: torch.dtype) -> float:
    return max(TOLERANCE, torch.finfo(dtype).eps if dtype.is_floating_point else TOLERANCE)


def _forms(slope: float, offset: float, dtype: torch.dtype) -> Iterator[Callable[[Tensor], Tensor]]:
    """Yield the ways in which pipelines compute an affine map, which differ in their rounding."""
    unit = round(1 / abs(slope)) or 1
    computations: list[Callable[[Tensor], Tensor]] = [
        lambda t: t / unit if slope > 0 else -t / unit,
        lambda t: (t / unit if slope > 0 else -t / unit) + offset,
        lambda t: (offset * unit + (t if slope > 0 else -t)) / unit,
        lambda t: offset + (t / unit if slope > 0 else -t / unit),
        lambda t: t * slope,
        lambda t: t * slope + offset,
    ]
    if slope == 1 and offset == 0:
        yield lambda t: t if t.dtype == dtype else t.to(dtype)
    for compute in computations:
        yield lambda t, compute=compute: compute(t).to(dtype)  # type: ignore[misc]
        yield lambda t, compute=compute: compute(t.to(dtype))  # type: ignore[misc]


def fit_time(timesteps: list[Tensor], times: list[Tensor], train: int) -> TimeRule | None:
    """Return the affine map from scalars ``timesteps`` to scalars ``times``, or None when there is none.

    Two different timesteps determine the map, and it must hold at all others.

    Args:
        train: number of train steps.
    """
    t = torch.stack([x.detach().cpu().double() for x in timesteps])
    y = torch.stack([x.detach().cpu().double() for x in times])
    other = int((t - t[0]).abs().argmax())
    if t[other] == t[0] or y[other] == y[0]:
        return None
    slope = float(f"{float((y[other] - y[0]) / (t[other] - t[0])):.4g}")
    fitted = (slope, float(f"{float((y - slope * t).mean()):.3f}"))
    dtype = times[0].dtype
    # common maps first: a slope cannot be fitted well to times of low precision, such as bfloat16
    for slope, offset in ((1.0, 0.0), (1 / train, 0.0), (-1 / train, 1.0), (-1.0, float(train)), fitted):
        for form in _forms(slope, offset, dtype):
            rule = TimeRule(slope, offset, form, True)
            if all(rule.holds(a, b) for a, b in zip(timesteps, times, strict=True)):
                return rule
    slope, offset = fitted
    rule = TimeRule(slope, offset, lambda a: (slope * a.float() + offset).to(dtype), False)
    return rule if all(rule.holds(a, b) for a, b in zip(timesteps, times, strict=True)) else None
