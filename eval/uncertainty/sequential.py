"""Sequential equivalence test: stop sampling once two runs are proven equal within a tolerance, or different.

After every pair there is a confidence sequence of the mean difference, by betting (Waudby-Smith & Ramdas, arXiv
2010.09686, the hedged capital with predictable plug-in bets). It carries two one-sided tests (Schuirmann 1987): inside
``(-tolerance, tolerance)`` the runs are equivalent, outside ``[-tolerance, tolerance]`` they differ by more. The chance
that it ever leaves out the mean on one side is at most ``1 - level``, whatever the number of looks and whatever the
distribution between known bounds: skewed, mostly equal, or with rare pictures that are ruined. So many looks cost
nothing, and a proof costs two to three times the pictures that an interval for light tails would ask for.

It is about prompts in random order, or drawn from those that are meant. What it cannot do is prove a tolerance from few
pairs: with equal pictures, ``n`` of them leave room for ruined ones of a share of some ``4 / n``.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import numpy as np
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.eval.uncertainty.intervals import Array, Interval, Values, cluster_sums, finite

Verdict = Literal["equivalent", "different", "go on"]
LEAST_CLUSTERS = 16
STAKE = 0.75  # the largest share of the capital that one pair can lose
_HALVINGS = 32  # of [0, 1], until an end is known
_ROUNDING = 1e-6  # that values may lie beyond their bounds


def doubling(last: int, first: int = 64) -> tuple[int, ...]:
    """Return the looks ``first, 2 first, 4 first, ...`` up to ``last``, which is always the last look."""
    if not 2 <= first <= last:
        raise DiffAccelError(f"Looks go from first >= 2 up to last; got first {first}, last {last}.")
    looks = [first]
    while looks[-1] * 2 <= last:
        looks.append(looks[-1] * 2)
    return tuple(looks) if looks[-1] == last else (*looks, last)


@dataclass(frozen=True)
class Sequential:
    """Equivalence test that may stop early. It is stateless: a look depends on the differences so far alone.

    Attributes:
        tolerance: mean differences up to this size do not matter, in the metric's units.
        looks: numbers of pairs at which to test, chosen before the first image is sampled.
        level: 1 minus the probability of ever calling runs equivalent that are not.
        bounds: least and greatest difference that the metric can have.
    """

    tolerance: float
    looks: tuple[int, ...] = (64, 128, 256, 512, 1024)
    level: float = 0.95
    bounds: tuple[float, float] = (-1.0, 1.0)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.tolerance) and self.tolerance > 0):
            raise DiffAccelError(f"The tolerance must be positive, got {self.tolerance}.")
        looks = self.looks
        if not looks or looks[0] < 2 or any(a >= b for a, b in pairwise(looks)):
            raise DiffAccelError(f"Looks are growing numbers of pairs from 2 on, such as (64, 128, 256); got {looks}.")
        if not 0.5 < self.level < 1:
            raise DiffAccelError(f"The level lies between 0.5 and 1, such as 0.95; got {self.level}.")
        low, high = self.bounds
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise DiffAccelError(f"Bounds of differences are finite, the least first; got {low} and {high}.")

    def look(self, differences: Values, *, clusters: Sequence[Hashable] | Tensor | None = None) -> Verdict:
        """Return what the pairs so far prove.

        Args:
            differences: (n,) of paired values ``a - b`` in the order of sampling, n one of ``looks``.
            clusters: (n,) labels such as prompts, where one has several seeds; at least 16 different ones.

        Raises:
            DiffAccelError: for an n that is no look, fewer than 16 clusters, and values that are not finite or beyond
                the bounds.
        """
        interval = self.interval(differences, clusters=clusters)
        if -self.tolerance < interval.low and interval.high < self.tolerance:
            return "equivalent"
        if interval.low > self.tolerance or interval.high < -self.tolerance:
            return "different"
        return "go on"

    def interval(self, differences: Values, *, clusters: Sequence[Hashable] | Tensor | None = None) -> Interval:
        """Compute the interval of level ``1 - 2 (1 - level)`` that :meth:`look` tests; raises like :meth:`look`.

        Values are scaled into [0, 1] by ``bounds``. A bet that the mean lies above ``m`` has the capital
        ``prod_i (1 + l_i(m) (x_i - m))``, one that it lies below has ``prod_i (1 - l_i(m) (x_i - m))``; the interval
        leaves out every ``m`` against which a capital was ever ``1 / (1 - level)``. Bets depend on the past alone,
        ``l_i = sqrt(2 log(1 / (1 - level)) / (v_(i-1) i log(1 + i)))`` with the running variance ``v``, and lose at
        most three quarters of the capital. Intervals of later looks lie in those of earlier ones.

        A pair of a cluster that an earlier look has seen does not count: it is not independent of what was bet on.
        """
        x = finite(differences, "differences")
        if len(x) not in self.looks:
            raise DiffAccelError(
                f"{len(x)} pairs are no look of this test; looks are at {', '.join(map(str, self.looks))}."
            )
        low, high = self.bounds
        if x.min() < low - _ROUNDING * (high - low) or x.max() > high + _ROUNDING * (high - low):
            raise DiffAccelError(
                f"Differences from {x.min():g} to {x.max():g} are beyond their bounds, {low:g} to {high:g}. "
                "Give the metric's own bounds."
            )
        means = self._means(x, range(len(x)) if clusters is None else clusters)
        if len(means) < LEAST_CLUSTERS:
            raise DiffAccelError(
                f"An interval of few clusters cannot be trusted: {len(means)} given, at least {LEAST_CLUSTERS} needed. "
                "Use more prompts."
            )
        alpha, scaled = 1 - self.level, ((means - low) / (high - low)).clip(0, 1)
        least, most = _least_mean(scaled, alpha), 1 - _least_mean(1 - scaled, alpha)
        ends = sorted(low + (high - low) * end for end in (least, most))
        method = f"betting confidence sequence, {len(means)} clusters, values from {low:g} to {high:g}"
        return Interval(float(x.mean()), ends[0], ends[1], 1 - 2 * alpha, method, null=0.0, units=len(means))

    def at_most(self, pairs: int) -> Sequential:
        """Return the same test for at most ``pairs``: later looks are left out, and the last is at ``pairs``."""
        return replace(self, looks=(*(n for n in self.looks if n < pairs), pairs))

    def _means(self, x: Array, clusters: Sequence[Hashable] | Tensor) -> Array:
        """Return the mean of every cluster over its values up to the first look that sees it, in order of sampling."""
        labels = clusters.tolist() if isinstance(clusters, Tensor) else list(clusters)
        cluster_sums(x, labels)  # refuses another number of labels
        ends = [0, *(look for look in self.looks if look <= len(x))]
        seen: set[Hashable] = set()
        means: list[Array] = []
        for start, end in pairwise(ends):
            places = [i for i in range(start, end) if labels[i] not in seen]
            if places:
                sums, counts = cluster_sums(x[places], [labels[i] for i in places])
                means.append(sums / counts)
            seen.update(labels[start:end])
        return np.concatenate(means)


def _least_mean(x: Array, alpha: float) -> float:
    """Return the least mean of values in [0, 1] that betting on a larger one has not ruled out at level ``alpha``.

    The capital falls with ``m``, so that the end is found by halving.
    """
    bets = _plug_in_bets(x, alpha)
    ruled_out, possible = 0.0, 1.0
    for _ in range(_HALVINGS):
        m = (ruled_out + possible) / 2
        ruled_out, possible = (m, possible) if _rules_out(x, m, bets, alpha) else (ruled_out, m)
    return ruled_out


def _rules_out(x: Array, m: float, bets: Array, alpha: float) -> bool:
    """Return whether the capital of betting that the mean lies above ``m`` was ever ``1 / alpha``."""
    capital = np.cumsum(np.log1p(np.minimum(bets, STAKE / m) * (x - m)))
    return bool(capital.max() >= -math.log(alpha))


def _plug_in_bets(x: Array, alpha: float) -> Array:
    """Return the bet before every value, from the running variance of those before it; (n,)."""
    n = np.arange(1, len(x) + 1)
    means = (0.5 + np.cumsum(x)) / (n + 1)
    variances = (0.25 + np.cumsum((x - means) ** 2)) / (n + 1)
    before = np.concatenate(([0.25], variances[:-1]))
    bets: Array = np.sqrt(-2 * math.log(alpha) / (before * n * np.log1p(n)))
    return bets
