"""Sampling error of precision, recall, density and coverage, the reference held fixed.

Precision and density are means over samples, with the intervals of means. Recall and coverage jump as single samples
come and go: neither the bootstrap, which repeats samples, nor an influence is right for them. Their variance is that of
disjoint random parts of the samples, taken to all of them:

- coverage: ``v_2, v_4, v_8`` of halves, quarters and eighths follow a parabola in the logarithm of the number of
  samples, and ``log v_1 = 3 log v_2 - 3 log v_4 + log v_8``;
- recall: ``v_1 = (v_2 / 2)^(2/3) j^(1/3)`` with the jackknife's variance ``j``, since halves alone give too little and
  the jackknife too much. The exponents come from simulation: ``python -m scripts.bench_coverage --part shares``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from diffaccel.eval.metrics.feature_matrix import paired
from diffaccel.eval.metrics.manifold import Boundary, ball_counts, memberships
from diffaccel.eval.uncertainty.intervals import Interval, bootstrap_mean, paired_difference, wilson
from diffaccel.eval.uncertainty.student import student_quantile

LEAST = 100  # samples
MOST = 25_000_000  # products of both numbers: 200 MB of distances
_SPLITS = 100  # random ones into parts
_DEGREES = 20  # of freedom of such a variance
_NEAR = 64  # neighbours kept of every sample
Shares = Callable[[Tensor], Tensor]  # parts (n, t) of zeros and ones to the share that each covers, (t,)


@dataclass(frozen=True)
class CoveredShare:
    """A recall or a coverage, or a difference of two.

    Attributes:
        value: the number.
        interval: its 95 % interval, or None.
        why: reason for which there is no interval; "" where there is one.
    """

    value: float
    interval: Interval | None
    why: str = ""


def precision_recall_intervals(
    reference: Tensor, samples: Tensor, *, k: int = 3, boundary: Boundary = "<="
) -> tuple[Interval, CoveredShare]:
    """Compute precision and recall with 95 % intervals.

    Args: as :func:`diffaccel.eval.metrics.manifold.precision_recall`.
    """
    inside, covered = memberships(reference, samples, k=k, boundary=boundary)
    precision = replace(wilson(int(inside.sum()), len(inside)), null=None)

    def variance() -> float:
        recall = _Recall(reference, samples, k, boundary)
        return recall_variance(recall.shares, recall.influences(), len(samples))

    return precision, _covered_share(int(covered.sum()) / len(covered), variance, len(samples), len(reference))


def density_coverage_intervals(
    reference: Tensor, samples: Tensor, *, k: int = 5, boundary: Boundary = "<"
) -> tuple[Interval, CoveredShare]:
    """Compute density and coverage with 95 % intervals.

    Args: as :func:`diffaccel.eval.metrics.manifold.density_coverage`.
    """
    balls, covered = ball_counts(reference, samples, k=k, boundary=boundary)
    density = bootstrap_mean(balls.double() / k)

    def variance() -> float:
        return coverage_variance(_covered_shares(reference, samples, k, boundary), len(samples))

    return density, _covered_share(int(covered.sum()) / len(covered), variance, len(samples), len(reference))


def precision_recall_differences(
    reference: Tensor, a: Tensor, b: Tensor, *, k: int = 3, boundary: Boundary = "<="
) -> tuple[Interval, CoveredShare]:
    """Compute precision and recall of ``a`` minus those of ``b``, runs of the same ids row by row, with intervals."""
    paired(a, b)
    (inside_a, covered_a), (inside_b, covered_b) = (
        memberships(reference, run, k=k, boundary=boundary) for run in (a, b)
    )
    precision = paired_difference(inside_a.double(), inside_b.double()).interval

    def variance() -> float:
        of_a, of_b = (_Recall(reference, run, k, boundary) for run in (a, b))
        influences = of_a.influences() - of_b.influences()
        return recall_variance(lambda parts: of_a.shares(parts) - of_b.shares(parts), influences, len(a))

    value = _mean_difference(covered_a, covered_b)
    return precision, _covered_share(value, variance, len(a), len(reference), is_difference=True)


def density_coverage_differences(
    reference: Tensor, a: Tensor, b: Tensor, *, k: int = 5, boundary: Boundary = "<"
) -> tuple[Interval, CoveredShare]:
    """Compute density and coverage of ``a`` minus those of ``b``, runs of the same ids row by row, with intervals."""
    paired(a, b)
    (balls_a, covered_a), (balls_b, covered_b) = (ball_counts(reference, run, k=k, boundary=boundary) for run in (a, b))
    density = paired_difference(balls_a.double() / k, balls_b.double() / k).interval

    def variance() -> float:
        of_a, of_b = (_covered_shares(reference, run, k, boundary) for run in (a, b))
        return coverage_variance(lambda parts: of_a(parts) - of_b(parts), len(a))

    value = _mean_difference(covered_a, covered_b)
    return density, _covered_share(value, variance, len(a), len(reference), is_difference=True)


def coverage_variance(shares: Shares, n: int) -> float:
    """Return the variance of a share that ``n`` samples cover, extrapolated from that of their disjoint parts."""
    halves, quarters, eighths = (split_variance(shares, n, parts) for parts in (2, 4, 8))
    return halves**3 * eighths / quarters**3 if min(halves, quarters, eighths) > 0 else 0.0


def recall_variance(shares: Shares, influences: Tensor, n: int) -> float:
    """Return the variance of a recall, between those of disjoint halves and of the jackknife."""
    return (split_variance(shares, n, 2, _SPLITS // 2) / 2) ** (2 / 3) * (float(influences.var()) / n) ** (1 / 3)


def split_variance(shares: Shares, n: int, parts: int, splits: int = _SPLITS) -> float:
    """Return the mean variance between the shares of disjoint random parts of ``n`` samples."""
    generator, labels = torch.Generator().manual_seed(parts), torch.arange(n) * parts // n
    masks = [one_hot(labels[torch.randperm(n, generator=generator)], parts) for _ in range(splits)]
    return float(shares(torch.cat(masks, 1)).view(-1, parts).var(1).mean())


def _covered_share(
    value: float, variance: Callable[[], float], n: int, m: int, *, is_difference: bool = False
) -> CoveredShare:
    """Return a share of ``m`` points that ``n`` samples cover: its interval is symmetric in its log odds.

    That of a difference is symmetric in itself.
    """
    if n < LEAST:
        return CoveredShare(value, None, f"an interval needs {LEAST} pictures")
    if n * m > MOST:
        return CoveredShare(value, None, f"no interval: {n} x {m} distances are more than {MOST:,}")
    half = student_quantile(0.975, _DEGREES) * math.sqrt(variance())
    if half == 0 or (not is_difference and not 0 < value < 1):
        return CoveredShare(value, None, "no interval: parts of the pictures show no spread")
    if is_difference:
        low, high = value - half, value + half
    else:
        odds, half = math.log(value / (1 - value)), half / (value * (1 - value))
        low, high = (1 / (1 + math.exp(-end)) for end in (odds - half, odds + half))
    null = 0.0 if is_difference else None
    interval = Interval(value, low, high, 0.95, "variance of disjoint parts, reference fixed", null, units=n)
    return CoveredShare(value, interval)


def _mean_difference(a: Tensor, b: Tensor) -> float:
    return (int(a.sum()) - int(b.sum())) / len(a)


def _closer(distances: Tensor, radii: Tensor, boundary: str) -> Tensor:
    return distances <= radii if boundary == "<=" else distances < radii


def _covered_shares(reference: Tensor, samples: Tensor, k: int, boundary: str) -> Shares:
    """Return the function from parts of the samples to the share of the reference's balls that they reach."""
    x = reference.double()
    radii = _distances(x, x).fill_diagonal_(math.inf).kthvalue(k, dim=1, keepdim=True).values
    inside = _closer(_distances(x, samples.double()), radii, boundary).float()
    return lambda parts: (inside @ parts.to(inside) > 0).double().mean(0)


class _Recall:
    """Recall of parts of the samples, from distances that are computed once."""

    def __init__(self, reference: Tensor, samples: Tensor, k: int, boundary: str) -> None:
        y = samples.double()
        self.k, self.boundary = k, boundary
        self.own = _distances(y, y).fill_diagonal_(math.inf)
        self.near, self.neighbours = self.own.topk(min(_NEAR, len(y) - 1), largest=False)
        self.to_reference = _distances(y, reference.double())

    def shares(self, parts: Tensor) -> Tensor:
        """Return the recall of each part, (t,)."""
        return torch.stack([self._share(part) for part in parts.bool().to(self.own.device).T])

    def _share(self, part: Tensor) -> Tensor:
        rows = part.nonzero()[:, 0]
        count = part[self.neighbours[rows]].cumsum(1)
        place = (count >= self.k).int().argmax(1, keepdim=True)
        radii = self.near[rows].gather(1, place)
        far = (count[:, -1] < self.k).nonzero()[:, 0]  # whose k-th neighbour in the part is not among the near ones
        if len(far):
            radii[far] = self.own[rows[far]][:, rows].kthvalue(self.k, dim=1, keepdim=True).values
        return _closer(self.to_reference[rows], radii, self.boundary).any(0).double().mean()

    def influences(self) -> Tensor:
        """Return the jackknife's influences, (n,): what recall loses without each sample, times ``n - 1``.

        The sample's ball goes, and balls that it was the edge of, or inside of, grow to their next neighbour.
        """
        n, m = self.to_reference.shape
        inside = _closer(self.to_reference, self.near[:, self.k - 1 : self.k], self.boundary)
        grown = (_closer(self.to_reference, self.near[:, self.k : self.k + 1], self.boundary) & ~inside).float()
        reached = torch.zeros(n, m, device=inside.device)
        for place in range(self.k):
            reached.index_add_(0, self.neighbours[:, place], grown)
        count, regained = inside.sum(0), reached > 0
        lost = (inside & (count == 1) & ~regained).sum(1)
        gained = (regained & (count == 0)).sum(1)
        return (lost - gained).double() * (n - 1) / m


def _distances(x: Tensor, y: Tensor) -> Tensor:
    return torch.cdist(x - x.mean(0), y - x.mean(0))
