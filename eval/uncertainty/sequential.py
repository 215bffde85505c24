"""Sequential equivalence test: stop sampling once two runs are proven equal within a tolerance, or different.

At each look (64, 128, 256, ... pairs) one interval of the mean difference is computed. It carries two one-sided tests
(Schuirmann 1987): inside ``(-tolerance, tolerance)`` the runs are equivalent, outside ``[-tolerance, tolerance]`` they
differ by more. Repeated looks would inflate the error rate, so the level is divided among them (Bonferroni): with ``K``
looks every one-sided test is at ``(1 - level) / K``, and the probability of ever calling runs equivalent that differ by
the tolerance or more is at most ``1 - level``.

That holds for differences with light tails. Paired metrics are skewed, so the interval is corrected for skewness
(Hall, J. R. Statist. Soc. B 54, 1992). No interval of a mean accounts for large differences that were not sampled yet:
where a method changes few images much, say one of 50, take the first look later than at 64 pairs.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import NormalDist
from typing import Literal

from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.eval.uncertainty.intervals import Array, Interval, Values, cluster_sums, finite, mean_variance

Verdict = Literal["equivalent", "different", "go on"]
LEAST_CLUSTERS = 16
UNSEEN = 0.01  # share of unequal clusters that would have shown before equal differences count as proof


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
    """

    tolerance: float
    looks: tuple[int, ...] = (64, 128, 256, 512, 1024)
    level: float = 0.95

    def __post_init__(self) -> None:
        if not (math.isfinite(self.tolerance) and self.tolerance > 0):
            raise DiffAccelError(f"The tolerance must be positive, got {self.tolerance}.")
        looks = self.looks
        if not looks or looks[0] < 2 or any(a >= b for a, b in pairwise(looks)):
            raise DiffAccelError(f"Looks are growing numbers of pairs from 2 on, such as (64, 128, 256); got {looks}.")
        if not 0.5 < self.level < 1:
            raise DiffAccelError(f"The level lies between 0.5 and 1, such as 0.95; got {self.level}.")

    def look(self, differences: Values, *, clusters: Sequence[Hashable] | Tensor | None = None) -> Verdict:
        """Return what the pairs so far prove.

        Args:
            differences: (n,) of paired values ``a - b`` in the order of sampling, n one of ``looks``.
            clusters: (n,) labels such as prompts, where one has several seeds; at least 16 different ones.

        Raises:
            DiffAccelError: for an n that is no look, fewer than 16 clusters, or values that are not finite.
        """
        interval = self.interval(differences, clusters=clusters)
        if -self.tolerance < interval.low and interval.high < self.tolerance:
            return "equivalent"
        if interval.low > self.tolerance or interval.high < -self.tolerance:
            return "different"
        return "go on"

    def interval(self, differences: Values, *, clusters: Sequence[Hashable] | Tensor | None = None) -> Interval:
        """Compute the interval of level ``1 - 2 (1 - level) / K`` that :meth:`look` tests; raises like :meth:`look`.

        With the standard error ``se`` of a mean of ``k`` independent clusters of any size, their skewness ``g`` and
        Student's ``t`` it goes from ``mean - se h(t)`` to ``mean - se h(-t)``, where ``r = g / sqrt(k)`` and
        ``h(y) = 3/r (cbrt(1 + r (y - r/6)) - 1)`` (Hall 1992). Differences that are all equal have no variance: the
        interval is infinite until there are so many that one unequal in 100 would have shown.
        """
        x = finite(differences, "differences")
        if len(x) not in self.looks:
            raise DiffAccelError(
                f"{len(x)} pairs are no look of this test; looks are at {', '.join(map(str, self.looks))}."
            )
        sums, counts = cluster_sums(x, range(len(x)) if clusters is None else clusters)
        if len(sums) < LEAST_CLUSTERS:
            raise DiffAccelError(
                f"An interval of few clusters cannot be trusted: {len(sums)} given, at least {LEAST_CLUSTERS} needed. "
                "Use more prompts."
            )
        alpha = (1 - self.level) / len(self.looks)
        mean = float(sums.sum() / counts.sum())
        low, high = _ends(sums, counts, alpha)
        method = f"Student's t, Hall's correction, {len(sums)} clusters, Bonferroni over {len(self.looks)} looks"
        return Interval(mean, mean + low, mean + high, 1 - 2 * alpha, method, null=0.0)

    def at_most(self, pairs: int) -> Sequential:
        """Return the same test for at most ``pairs``: later looks are left out, and the last is at ``pairs``."""
        return replace(self, looks=(*(n for n in self.looks if n < pairs), pairs))


def _ends(sums: Array, counts: Array, alpha: float) -> tuple[float, float]:
    """Compute both ends of Hall's interval, relative to the mean."""
    k = len(sums)
    residuals = sums - sums.sum() / counts.sum() * counts
    error = math.sqrt(mean_variance(sums, counts))
    if error <= 1e-12 * float(abs(sums).max()):
        enough = k >= math.log(alpha) / math.log1p(-UNSEEN)
        return (0.0, 0.0) if enough else (-math.inf, math.inf)
    r = float((residuals**3).mean() / residuals.std(ddof=1) ** 3) / math.sqrt(k)
    t = _student_quantile(1 - alpha, k - 1)

    def transformed(y: float) -> float:
        return y if abs(r) < 1e-9 else 3 / r * (math.cbrt(1 + r * (y - r / 6)) - 1)

    return -error * transformed(t), -error * transformed(-t)


def _student_quantile(p: float, df: int) -> float:
    """Compute a quantile of Student's t by its expansion in ``1/df`` (Abramowitz & Stegun 26.7.5)."""
    z = NormalDist().inv_cdf(p)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / df ** (i + 1) for i, term in enumerate(terms))
