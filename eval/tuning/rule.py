"""A gate as a promise: a plan keeps it where even the end of every interval that is nearest to failing does.

Margins say how far a plan is from failing, in the gate's own tolerance: 1 is as good as the baseline, 0 is the limit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from diffaccel.eval.comparison.gate import Clause, Condition, Gate
from diffaccel.eval.comparison.row import Row
from diffaccel.eval.uncertainty.intervals import LEAST_FOR_VERDICT, Interval, bootstrap_mean

COST = ("seconds", "speedup", "nfe", "forwards", "peak_memory")  # one number a plan, in a gate
ERROR = 0.05  # probability of a broken promise, at most


@dataclass(frozen=True)
class Samples:
    """What was measured of a plan.

    Attributes:
        values: by metric, a number of every prompt: a distance to the baseline's picture, or a score minus that of the
            baseline's picture.
        cost: by metric, one number.
        cost_intervals: by metric, its interval where it was timed often enough.
    """

    values: Mapping[str, Sequence[float]]
    cost: Mapping[str, float] = field(default_factory=dict)
    cost_intervals: Mapping[str, Interval] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Number of prompts."""
        return max((len(numbers) for numbers in self.values.values()), default=0)


@dataclass(frozen=True)
class Reading:
    """A metric's mean and the ends of its interval; infinite ends where there are too few prompts for one."""

    value: float
    low: float
    high: float
    units: int | None = None
    why: str = ""  # it has no interval

    @property
    def ends(self) -> list[float | None]:
        """The mean and both ends for JSON, which has no infinity: None for those that are not finite."""
        return [number if math.isfinite(number) else None for number in (self.value, self.low, self.high)]


@dataclass(frozen=True)
class Judgement:
    """How a plan stands to a promise.

    Attributes:
        margin: distance of the estimates from failing; 1 for the baseline, 0 at the limit, negative beyond it.
        safe: the same of the ends of the intervals that are nearest to failing.
        hopeful: the same of their other ends.
        keeps: whether it is proven that the gate does not hold.
        readings: of every metric of the gate.
    """

    margin: float
    safe: float
    hopeful: float
    keeps: bool
    readings: dict[str, Reading]


@dataclass(frozen=True)
class Promise:
    """A gate that must not hold of the mean over all prompts there could be.

    Attributes:
        gate: the condition; it fails a plan.
        baseline: by metric, what the gate compares of the baseline itself: SSIM 1, LPIPS 0, a score's difference 0.
    """

    gate: Gate
    baseline: Mapping[str, float] = field(default_factory=dict)

    @property
    def level(self) -> float:
        """Level of every clause's interval.

        All parts of an ``or`` must be disproven, which takes no correction; of an ``and`` one is enough, and each is a
        chance to err: they share the probability.
        """
        return 1 - ERROR / _chances(self.gate.condition)

    def judge(self, samples: Samples, *, seed: int = 0) -> Judgement:
        """Return how a plan of which ``samples`` were measured stands to the promise."""
        readings = {metric: read(samples, metric, self.level, seed=seed) for metric in self.gate.metrics}
        worst = {name: {"<": reading.low, ">": reading.high} for name, reading in readings.items()}
        best = {name: {"<": reading.high, ">": reading.low} for name, reading in readings.items()}
        middle = {name: {"<": reading.value, ">": reading.value} for name, reading in readings.items()}
        margins = [self._margin(self.gate.condition, ends) for ends in (middle, worst, best)]
        return Judgement(margins[0], margins[1], margins[2], not _holds(self.gate.condition, worst), readings)

    def _margin(self, condition: Condition, ends: Mapping[str, Mapping[str, float]]) -> float:
        if not isinstance(condition, Clause):
            combine = min if condition.word == "or" else max
            return combine(self._margin(part, ends) for part in condition.parts)
        end = ends[condition.metric][condition.op[0]]
        distance = end - condition.number if condition.op[0] == "<" else condition.number - end
        return distance / self._scale(condition)

    def _scale(self, clause: Clause) -> float:
        """Return the tolerance of a clause: from the baseline's own value to the number, where it is one."""
        own = self.baseline.get(clause.metric, math.nan)
        tolerance = own - clause.number if clause.op[0] == "<" else clause.number - own
        return tolerance if math.isfinite(tolerance) and tolerance > 0 else max(abs(clause.number), 1e-9)


def read(samples: Samples, metric: str, level: float = 0.95, *, seed: int = 0) -> Reading:
    """Return the mean of a metric over the prompts with its interval of ``level``.

    Infinite values, the PSNR of equal pictures, are left out of the mean, as in a report. There is no interval for
    fewer than 2 prompts, and none where one prompt of 30 or more carries the spread: see
    :meth:`diffaccel.eval.comparison.row.Row.set_interval`.
    """
    if metric in samples.cost:
        value, interval = samples.cost[metric], samples.cost_intervals.get(metric)
        return Reading(value, value, value) if interval is None else Reading(value, interval.low, interval.high)
    numbers = np.asarray(samples.values[metric], dtype=np.float64)
    kept = numbers[np.isfinite(numbers)]
    if len(numbers) and not len(kept):
        return Reading(float(numbers[0]), float(numbers[0]), float(numbers[0]), len(numbers))
    if len(kept) < 2:
        value = float(kept[0]) if len(kept) else math.nan
        return Reading(value, -math.inf, math.inf, len(kept), "fewer than 2 prompts")
    row = Row(metric=metric, key=metric, family="fidelity", run="", better="higher")
    row.set_interval("interval", bootstrap_mean(kept, seed=seed, level=level))
    if row.interval is None:
        return Reading(float(kept.mean()), -math.inf, math.inf, len(kept), str(row.detail["from"]))
    return Reading(row.interval.value, row.interval.low, row.interval.high, len(kept))


def with_timing(samples: Samples, timing: Mapping[str, Any]) -> Samples:
    """Return samples whose seconds and speed-up are those of a timing in turns, with intervals."""
    ratio, base = timing["ratio"], timing["baseline_seconds"]
    cost = {**samples.cost, "seconds": base / ratio["value"], "speedup": ratio["value"]}
    if ratio["low"] is None:
        return replace(samples, cost=cost)
    intervals = {
        "speedup": Interval(ratio["value"], ratio["low"], ratio["high"]),
        "seconds": Interval(cost["seconds"], base / ratio["high"], base / ratio["low"]),
    }
    return replace(samples, cost=cost, cost_intervals=intervals)


def fails_equals(gate: Gate, perfect: Mapping[str, float]) -> bool:
    """Return whether a gate fails also pictures that equal the baseline's.

    Args:
        gate: the condition.
        perfect: by metric of pairs, the number of two equal pictures; every other clause is taken not to hold.
    """

    def holds(condition: Condition) -> bool:
        if isinstance(condition, Clause):
            return condition.metric in perfect and condition.holds(perfect[condition.metric])
        return (any if condition.word == "or" else all)(map(holds, condition.parts))

    return holds(gate.condition)


def too_few(judgement: Judgement) -> bool:
    """Return whether a metric of prompts was read from too few of them for a verdict."""
    return any(r.units is not None and r.units < LEAST_FOR_VERDICT for r in judgement.readings.values())


def _chances(condition: Condition) -> int:
    """Return how many chances there are to disprove a condition that holds."""
    if isinstance(condition, Clause):
        return 1
    return (max if condition.word == "or" else sum)(map(_chances, condition.parts))


def _holds(condition: Condition, ends: Mapping[str, Mapping[str, float]]) -> bool:
    if isinstance(condition, Clause):
        return not math.isfinite(_number(condition, ends)) or condition.holds(_number(condition, ends))
    return (any if condition.word == "or" else all)(_holds(part, ends) for part in condition.parts)


def _number(clause: Clause, ends: Mapping[str, Mapping[str, float]]) -> float:
    """Return the end that a clause is checked with; the PSNR of equal pictures becomes the largest number."""
    end = ends[clause.metric][clause.op[0]]
    good = (end > 0) == (clause.op[0] == "<")
    return math.copysign(1e300, end) if math.isinf(end) and good else end
