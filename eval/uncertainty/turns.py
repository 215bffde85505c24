"""Intervals of what is measured in every turn beside its time: energy, which adds up, and peaks of memory.

A counter of energy moves in ticks that may be longer than a call: one reading is then wrong by up to a tick, while
their mean over calls that begin at any moment of a tick is right. So energy has means where times have medians, and a
reading of zero is a reading. Readings that agree say nothing of the part of a tick that they miss: an interval takes
their variance to be at least that of a tick, and calls of few ticks have none. A peak of memory mostly is the same in
every turn; else the range says by how much.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from diffaccel.errors import DiffAccelError
from diffaccel.eval.uncertainty.intervals import LEAST_FOR_VERDICT, LEAST_TURNS, Array, Interval, Ratio, Values, finite
from diffaccel.eval.uncertainty.student import student_quantile

TICK = 0.1  # seconds between two readings of NVML's counter that differ, at most
LONG = 20 * TICK  # of calls whose readings are good enough for an interval
TICK_VARIANCE = 1 / 12  # of a reading around the truth, in squared ticks: that of a uniform error of one tick
_QUANTILE = 0.975  # of two-sided 95 % intervals


def too_short(seconds: float) -> str:
    """Return why readings of energy have no interval, those of fewer than 20 ticks of the counter; "" of longer ones.

    Simulated, intervals of shorter calls cover from 47 to 100 %: all turns may be wrong by the same part of a tick, and
    what would hold that part is wider than the noise (``docs/results/coverage_cpu.json``).
    """
    return (
        "" if seconds >= LONG else f"no interval, since readings of under {LONG:g} s are short beside the meter's tick"
    )


def of_ticks(seconds: float) -> float:
    """Return the least relative variance of the reading of a call, from the counter's resolution."""
    return TICK_VARIANCE * (TICK / seconds) ** 2


def mean_of_turns(values: Values, resolution: float = 0.0) -> Interval | None:
    """Compute the mean of what is not negative, with Student's 95 % interval; None for fewer than 6 turns.

    Args:
        values: (n,), one a turn.
        resolution: least relative variance of a value, as :func:`of_ticks` gives it.
    """
    x = finite(values, "turns")
    if len(x) < LEAST_TURNS:
        return None
    mean = float(x.mean())
    half = _half_width(x, resolution * mean * mean)
    return Interval(mean, max(0.0, mean - half), mean + half, method=f"mean of {len(x)} turns, Student's t")


def mean_difference(a: Values, b: Values, resolutions: tuple[float, float] = (0.0, 0.0)) -> Interval | None:
    """Compute the mean of ``a - b`` over turns with Student's 95 % interval; None for fewer than 10 turns.

    Args:
        a, b: (n,), one a turn.
        resolutions: least relative variance of a value of each, as :func:`of_ticks` gives it.

    Raises:
        DiffAccelError: for different numbers of turns.
    """
    x, y = _paired(a, b)
    difference = x - y
    if len(difference) < LEAST_FOR_VERDICT:
        return None
    least = float(resolutions[0] * x.mean() ** 2 + resolutions[1] * y.mean() ** 2)
    mean, half = float(difference.mean()), _half_width(difference, least)
    method = f"paired over {len(difference)} turns, Student's t"
    return Interval(mean, mean - half, mean + half, method=method, null=0.0)


def ratio_of_means(a: Values, b: Values, resolutions: tuple[float, float] = (0.0, 0.0)) -> Ratio:
    """Compute ``r = mean(a) / mean(b)`` over turns with its 95 % interval, none for fewer than 6 turns.

    The interval goes from ``r exp(-h)`` to ``r exp(h)`` with ``h = t sd(e) / sqrt(n)`` of the relative residuals
    ``e = (a - r b) / mean(a)``: the ratio estimator's variance (Cochran 1977, section 6.4) on the logarithm. What moves
    both readings of a turn alike leaves it narrow, down to the ``resolutions`` of both (:func:`of_ticks`).

    Raises:
        DiffAccelError: for different numbers of turns, fewer than 2, negative values, or a mean of zero.
    """
    x, y = _paired(a, b)
    if len(x) < 2:
        raise DiffAccelError(f"A ratio over turns needs at least 2 of them, got {len(x)}.")
    if min(x.min(), y.min()) < 0 or min(x.mean(), y.mean()) <= 0:
        raise DiffAccelError(
            f"A ratio of means needs values of 0 or more, not all 0; the means are {x.mean():g} and {y.mean():g}."
        )
    n, value = len(x), float(x.mean() / y.mean())
    if n < LEAST_TURNS:
        return Ratio(value, None, f"ratio of means of {n} turns; an interval needs {LEAST_TURNS}")
    half = _half_width((x - value * y) / x.mean(), sum(resolutions))
    method = f"ratio of means of {n} turns, Student's t"
    return Ratio(
        value, Interval(value, value * math.exp(-half), value * math.exp(half), 0.95, method, null=1.0), method
    )


def energy_ratio(
    own: Sequence[float] | None, base: Sequence[float] | None, seconds: tuple[float, float]
) -> Ratio | None:
    """Return the energy of a way over that of the baseline; None where one was not measured, or read as nothing.

    Args:
        own, base: joules of every turn.
        seconds: of a reading of each.
    """
    if not own or not base or sum(own) <= 0 or sum(base) <= 0:
        return None
    if why := too_short(min(seconds)):
        ratio = ratio_of_means(own, base)
        return Ratio(ratio.value, None, f"ratio of means of {len(own)} turns; {why}")
    return ratio_of_means(own, base, (of_ticks(seconds[0]), of_ticks(seconds[1])))


def range_of_turns(values: Values, *, null: float | None = None) -> Interval | None:
    """Return the highest value with the range of all of them, which is an interval too; None for fewer than 6 turns.

    ``n`` turns hold the median of their distribution, whatever it is, between the lowest and the highest with a
    probability of at least ``1 - 2^(1 - n)``: 96.9 % of 6 turns, 99.8 % of 10 (the sign test's interval).

    Args:
        values: (n,), one a turn.
        null: the value of "no effect", where there is one.
    """
    x = finite(values, "turns")
    n = len(x)
    if n < LEAST_TURNS:
        return None
    low, high = float(x.min()), float(x.max())
    method = f"the same in all {n} turns" if low == high else f"range of {n} turns, the value is the highest"
    return Interval(high, low, high, 1 - 2.0 ** (1 - n), method, null=null)


def _half_width(x: Array, least: float = 0.0) -> float:
    """Return half of Student's interval of a mean, of values whose variance is at least ``least``."""
    return student_quantile(_QUANTILE, len(x) - 1) * math.sqrt(max(float(x.var(ddof=1)), least) / len(x))


def _paired(a: Values, b: Values) -> tuple[Array, Array]:
    x, y = finite(a, "first turns"), finite(b, "second turns")
    if len(x) != len(y):
        raise DiffAccelError(f"Turns are paired, and there are {len(x)} and {len(y)} of them. Take both of one timing.")
    return x, y
