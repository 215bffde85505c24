"""Confidence intervals of means, paired differences, win rates and ratios of timings.

Prompts are the unit of resampling: images of one prompt with several seeds are correlated, so whole prompts are drawn
(``clusters``). All numbers are float64. For one seed, the interval does not depend on the order of the values.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.eval.uncertainty import studentised
from diffaccel.eval.uncertainty.median import median_ends

Array = NDArray[np.float64]
Values = Tensor | Sequence[float] | NDArray[Any]
LEAST_FOR_VERDICT = 10  # independent values; intervals of fewer cover too rarely to call a difference one
LEAST_TURNS = 6  # of timings, before a ratio of times has an interval


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval.

    Attributes:
        value: the estimate.
        low, high: ends of the interval; ``low <= high``.
        level: the chance that such an interval covers the truth.
        method: how it was computed, as a report prints it.
        null: the value of "no effect" (0 of a difference, 1 of a ratio), or None where there is none.
        units: number of independent values behind it, such as prompts; None where it does not say.
        carriers: number of them that carry its spread: see
            :func:`diffaccel.eval.uncertainty.studentised.carriers`; None where it does not say.
    """

    value: float
    low: float
    high: float
    level: float = 0.95
    method: str = ""
    null: float | None = None
    units: int | None = None
    carriers: float | None = None

    @property
    def significant(self) -> bool:
        """Whether the interval excludes ``null``; False where there is none."""
        return self.null is not None and not self.low <= self.null <= self.high

    @property
    def too_few(self) -> str:
        """Sentence that takes the place of a verdict where fewer than 10 prompts stand behind it; "" elsewhere."""
        return too_few(self.units)


@dataclass(frozen=True)
class Paired:
    """Comparison of two runs on the same ids.

    Attributes:
        interval: the mean of ``a - b``.
        wins: the share of ids where ``a`` is better; a tie counts half.
        n: number of pairs.
        ties: number of pairs of equal values.
    """

    interval: Interval
    wins: Interval
    n: int
    ties: int


def too_few(units: int | None) -> str:
    """Return the sentence that takes the place of a verdict from fewer than 10 prompts; "" for more, or None."""
    return "" if units is None or units >= LEAST_FOR_VERDICT else f"too few prompts (n = {units}) for a verdict"


def bootstrap_mean(
    values: Values,
    *,
    clusters: Sequence[Hashable] | Tensor | None = None,
    draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Compute the mean with its studentised bootstrap interval (bootstrap-t; Efron & Tibshirani 1993, section 12.5).

    With ``clusters``, whole clusters are drawn with replacement, and the mean is over all their values. Simulated, 95 %
    intervals cover 92 to 98 % from 10 normal or lognormal values on, and rare failures from those on that were met
    five times (``docs/results/coverage_cpu.json``). What too few values have not shown yet, such as one ruined picture
    of 1000, no interval accounts for: ``carriers`` tells how many values the width comes from. Values that are
    all equal have an interval of no width. See :func:`diffaccel.eval.uncertainty.studentised.offsets`.

    Args:
        values: (n,), finite, n >= 2.
        clusters: (n,) labels such as prompts; values of one label are drawn together. At least 2 labels.
        draws: number of bootstrap samples.
        seed: seed of the draws.
        level: confidence level of the interval.

    Raises:
        DiffAccelError: for fewer than 2 values or clusters, values that are not finite, or labels of another number.
    """
    x = finite(values, "values")
    if draws < 1:
        raise DiffAccelError(f"A bootstrap needs at least 1 draw, not {draws}. 1000 is usual.")
    tail, mean = _tail(level), math.fsum(x) / len(x)
    if (x == x[0]).all():
        mean = float(x[0])  # without rounding
    residuals, counts, unit = x - mean, np.ones_like(x), "values"
    if clusters is not None:
        (residuals, counts), unit = cluster_sums(residuals, clusters), "clusters"
    low, high = studentised.offsets(residuals, counts, draws=draws, seed=seed, tail=tail)
    method = f"studentised bootstrap over {len(counts)} {unit}, {draws} draws"
    few = studentised.carriers(residuals)
    return Interval(mean, mean + low, mean + high, level, method, units=len(counts), carriers=few)


def paired_difference(
    a: Values,
    b: Values,
    *,
    clusters: Sequence[Hashable] | Tensor | None = None,
    better: Literal["higher", "lower"] = "higher",
    draws: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Paired:
    """Compute the mean of ``a - b`` over pairs with its bootstrap interval, and how often ``a`` is better.

    A tie counts as half a win. The win rate has a Wilson interval; with ``clusters`` it is that of ``n / D`` pairs,
    where the design effect ``D >= 1`` is the variance of the win rate by clusters over that of independent pairs
    (Kish 1965).

    Args:
        a, b: (n,), finite; ``a[i]`` and ``b[i]`` belong to one id.
        clusters: (n,) labels such as prompts.
        better: the direction that wins.

    Raises:
        DiffAccelError: for different lengths, and whatever :func:`bootstrap_mean` refuses.
    """
    x, y = _pair(a, b)
    if better not in ("higher", "lower"):
        raise DiffAccelError(f"better is 'higher' or 'lower', not '{better}'.")
    difference = x - y
    mean = bootstrap_mean(difference, clusters=clusters, draws=draws, seed=seed, level=level)
    wins = np.where(difference == 0, 0.5, (difference > 0) == (better == "higher")).astype(np.float64)
    rate = wins.mean()
    pairs = float(len(wins)) if clusters is None else _effective_pairs(wins, clusters)
    interval = wilson(float(rate * pairs), pairs, level)
    method = interval.method + ", a tie is half a win"
    wins_interval = replace(interval, value=float(rate), method=method, null=0.5, units=mean.units)
    return Paired(replace(mean, null=0.0), wins_interval, len(x), int((difference == 0).sum()))


def wilson(successes: float, n: float, level: float = 0.95) -> Interval:
    """Compute the score interval of a share (Wilson 1927).

    Its ends are ``(p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)``.

    ``successes`` and ``n`` need not be whole numbers: ties count half, and clustered pairs count less than one each.

    Raises:
        DiffAccelError: unless ``0 <= successes <= n`` and ``n > 0``.
    """
    if not (math.isfinite(n) and n > 0 and -1e-9 * n <= successes <= n * (1 + 1e-9)):
        raise DiffAccelError(f"A share needs n > 0 and 0 <= successes <= n; got {successes} of {n}.")
    z = NormalDist().inv_cdf(1 - _tail(level))
    p = min(max(successes / n, 0.0), 1.0)
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low = 0.0 if p == 0 else centre - half
    high = 1.0 if p == 1 else centre + half
    return Interval(p, low, high, level, f"Wilson, n = {n:.6g}", null=0.5)


@dataclass(frozen=True)
class Ratio:
    """A ratio of times that were measured in turns.

    Attributes:
        value: the median over turns.
        interval: its 95 % interval; None for fewer than 6 turns.
        method: how both were computed, as a report prints it.
    """

    value: float
    interval: Interval | None
    method: str

    def to_dict(self) -> dict[str, Any]:
        """Return the ratio as JSON-ready values; ends that are not known are null, and significance with them."""
        interval = self.interval
        return {
            "value": self.value,
            "low": None if interval is None else interval.low,
            "high": None if interval is None else interval.high,
            "method": self.method,
            "significant": None if interval is None else interval.significant,
        }


def median_ratio(a: Values, b: Values) -> Ratio:
    """Compute the median of ``a / b`` over turns, with the 95 % interval of a median (:func:`median_ends`).

    For timings taken in turns (A B A B ...): a machine that slows down slows both timings of a turn. The interval
    is of the ratios' logarithms, so that it turns with the ratio, and holds for skewed times: Student's, of the mean
    logarithm, leaves the median out the more often the more turns there are. The ratio is ``significant`` when the
    interval excludes 1. Fewer than 6 turns have no interval.

    Raises:
        DiffAccelError: for different lengths, fewer than 2 turns, or values that are not positive.
    """
    x, y = _pair(a, b)
    if len(x) < 2:
        raise DiffAccelError(f"An interval of a ratio needs at least 2 turns, got {len(x)}.")
    if (x <= 0).any() or (y <= 0).any():
        raise DiffAccelError(f"Timings must be positive; the smallest is {min(x.min(), y.min()):g}.")
    with np.errstate(over="ignore"):
        ratios = x / y
    if not (np.isfinite(ratios).all() and ratios.all()):
        raise DiffAccelError(f"Timings from {min(x.min(), y.min()):g} to {max(x.max(), y.max()):g} have no ratio.")
    n, value = len(x), float(np.median(ratios))
    ends = median_ends(np.log(ratios))
    if ends is None:
        return Ratio(value, None, f"median of {n} turns; an interval needs {LEAST_TURNS}")
    low, high = min(math.exp(ends[0]), value), max(math.exp(ends[1]), value)  # round-off never leaves the median out
    method = f"median of {n} turns, order statistics"
    return Ratio(value, Interval(value, low, high, method=method, null=1.0), method)


def spearman(x: Values, y: Values) -> float:
    """Compute Spearman's rank correlation; ties have their mean rank.

    Raises:
        DiffAccelError: for different lengths, fewer than 2 values, or values that are all equal.
    """
    ranks = [_ranks(values) - (len(values) - 1) / 2 for values in _pair(x, y)]
    norms = [float(np.sqrt((rank * rank).sum())) for rank in ranks]
    if min(norms) == 0:
        raise DiffAccelError("A rank correlation needs at least 2 different values on both sides.")
    return float((ranks[0] * ranks[1]).sum() / (norms[0] * norms[1]))


def finite(values: Values, label: str) -> Array:
    """Convert values to (n,) float64, and check that they are finite; error messages call them ``label``.

    Raises:
        DiffAccelError: for another shape, no value, or values that are not finite (their number, and the first).
    """
    if isinstance(values, Tensor):
        values = values.detach().cpu().to(torch.float64).numpy()
    try:
        x: Array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise DiffAccelError(f"The {label} must be numbers ({error}).") from error
    if x.ndim != 1 or len(x) == 0:
        raise DiffAccelError(f"The {label} must be a list of numbers, (n,); got shape {x.shape}.")
    bad = np.flatnonzero(~np.isfinite(x))
    if len(bad):
        raise DiffAccelError(f"{len(bad)} of {len(x)} {label} are not finite, the first at {bad[0]}: {x[bad[0]]}.")
    return x


def cluster_sums(values: Array, clusters: Sequence[Hashable] | Tensor) -> tuple[Array, Array]:
    """Return the sum and the number of values of every cluster, in order of first appearance.

    Raises:
        DiffAccelError: for another number of labels than of values.
    """
    labels = clusters.tolist() if isinstance(clusters, Tensor) else list(clusters)
    if len(labels) != len(values):
        raise DiffAccelError(f"{len(values)} values, but {len(labels)} cluster labels. Give one label a value.")
    numbers: dict[Hashable, int] = {}
    cluster = np.array([numbers.setdefault(label, len(numbers)) for label in labels])
    return np.bincount(cluster, weights=values).astype(np.float64), np.bincount(cluster).astype(np.float64)


def mean_variance(sums: Array, counts: Array) -> float:
    """Estimate the variance of the ratio ``sum(sums) / sum(counts)`` over ``k`` independent clusters.

    ``k / (k - 1) sum_c (s_c - m n_c)^2 / N^2`` with the mean ``m`` and ``N = sum_c n_c`` (Cochran 1977, section 6.4).
    """
    k, total = len(sums), counts.sum()
    residuals = sums - sums.sum() / total * counts
    return float(k / (k - 1) * (residuals * residuals).sum() / total**2)


def _effective_pairs(wins: Array, clusters: Sequence[Hashable] | Tensor) -> float:
    """Return the number of pairs over the design effect."""
    sums, counts = cluster_sums(wins, clusters)
    independent = float(wins.var(ddof=1)) / len(wins)
    if independent == 0:  # no variance: nothing shows that seeds of one prompt are independent
        return float(len(sums))
    return len(wins) / max(1.0, mean_variance(sums, counts) / independent)


def _pair(a: Values, b: Values) -> tuple[Array, Array]:
    x, y = finite(a, "first values"), finite(b, "second values")
    if len(x) != len(y):
        raise DiffAccelError(f"Paired values need equal numbers of them; got {len(x)} and {len(y)}. Pair them by id.")
    return x, y


def _ranks(x: Array) -> Array:
    """Return the ranks of values, from 0; ties have their mean rank."""
    _, group, counts = np.unique(x, return_inverse=True, return_counts=True)
    end = np.cumsum(counts)
    return (end - (counts + 1) / 2)[group]


def _tail(level: float) -> float:
    """Return the probability outside each end of an interval."""
    if not 0 < level < 1:
        raise DiffAccelError(f"A confidence level lies between 0 and 1, such as 0.95; got {level}.")
    return (1 - level) / 2
