"""Interval of a number that is smooth in the weights of its rows, as distances of two sets of features are.

To first order such a number moves like the mean of the rows' influences: ``psi_i`` is its derivative as row ``i`` gets
more weight. The studentised bootstrap of that mean (:mod:`diffaccel.eval.uncertainty.studentised`) gives the interval,
with its care for skewed values. Two things are added to it.

The variance of influences counts what two rows do together twice (Efron & Stein 1981), and near zero distance there is
little else. Influences on halves of the rows, where it weighs twice as much, show how large that share is: with the
variances ``h_1`` on all rows and ``h_2`` on halves, the variance is ``h_1 - (h_2 - h_1) / 2`` to second order. The
correction needs fourth moments, so it counts by ``K / (K + 10)`` for ``K`` carriers, and by half of that for distances.

A distance is positive and spreads like itself: its interval is symmetric in the logarithm. Where its influences have
heavy tails, as those of MIND grow with the square of a feature, most samples have not seen what the spread comes from,
and the truth lies above: ``tail`` moves the upper end by the logarithm of the influences' kurtosis. Of a difference it
moves the end on the side of the heavier tail.

Both numbers, the ten and the half, come from simulation: ``python -m scripts.bench_coverage --part distances``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from diffaccel.eval.uncertainty import studentised
from diffaccel.eval.uncertainty.intervals import Interval

LEAST_ROWS = 30  # of which influences are known well enough
DRAWS = 2000
_CARRIERS = 10  # at which half of the correction counts
_KURTOSIS = 5.0  # of influences whose tails are light; normal values have 3

Influences = Callable[[Tensor], Tensor]  # indices of rows (k,) to their influences on the number of these rows, (k,)


def too_few_rows(n: int, things: str = "pictures") -> str:
    """Return why a number of ``n`` rows has no interval; "" where it has one."""
    return "" if n >= LEAST_ROWS else f"an interval needs {LEAST_ROWS} {things}"


def influence_interval(
    value: float,
    influences: Influences,
    n: int,
    *,
    held: str,
    positive: float | None = None,
    tail: float = 0.0,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Compute the interval of a number from the influences of its rows.

    Args:
        value: the number of all rows.
        influences: function of row indices.
        n: number of rows, at least 4.
        held: what of the other side is held fixed or left out, as a report prints it.
        positive: a positive number that differs from ``value`` by a constant, and whose logarithm is symmetric; None
            for a difference, which has no sign and whose null is 0.
        tail: part by which the upper end of a positive number, or of a difference the end on the side of the
            influences' heavier tail, lies further for every factor of e that their kurtosis, ``n`` over their
            carriers, is above 5.
        seed: seed of the halves and of the bootstrap.
        level: confidence level.
    """
    rows = _array(influences(torch.arange(n)))
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    halves = [_array(influences(part.sort().values)) for part in order.tensor_split(2)]
    few, whole = studentised.carriers(rows), float(rows.var(ddof=1))
    half = sum(float(part.var(ddof=1)) for part in halves) / 2
    most = 0.5 if positive is None else 0.25
    weight = most * few / (few + _CARRIERS)
    together = min(max(half / whole - 1, 0.0), 1.0) if whole else 0.0
    shrink = math.sqrt(1 - weight * together)
    outside = (1 - level) / 2
    low, high = (shrink * end for end in studentised.offsets(rows, np.ones(n), draws=DRAWS, seed=seed, tail=outside))
    further = 1 + tail * max(0.0, math.log(n / few / _KURTOSIS)) if few else 1.0
    if positive is None:
        low, high = (low, further * high) if (rows**3).sum() >= 0 else (further * low, high)
    elif positive > 0:
        low, high = (positive * math.expm1(end / positive) for end in (low, further * high))
    method = f"studentised bootstrap of {n} influences, {held}"
    null = 0.0 if positive is None else None
    return Interval(value, value + low, value + high, level, method, null, units=n, carriers=few)


def _array(values: Tensor) -> studentised.Array:
    """Return influences around their mean, in float64; what is round-off beside their largest counts as 0."""
    rows: studentised.Array = values.detach().double().cpu().numpy()
    return rows - rows.mean()
