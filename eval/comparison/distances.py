"""Distances of two sets of features with their intervals and notes: what rows of distributions are made from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from torch import Tensor

from diffaccel.eval.comparison import printed_distances
from diffaccel.eval.comparison.printed_distances import FD, thousandfold
from diffaccel.eval.comparison.row import Estimate
from diffaccel.eval.metrics import frechet_intervals, manifold_intervals, mind, mmd, mmd_intervals
from diffaccel.eval.metrics.manifold_intervals import CoveredShare
from diffaccel.eval.metrics.mmd import RowPairs
from diffaccel.eval.networks import protocols
from diffaccel.eval.networks.extractors.base import Extractor
from diffaccel.eval.networks.extractors.clip import ClipExtractor
from diffaccel.eval.uncertainty.intervals import Interval

FEWEST_INFINITY = 500  # pictures; the smallest subsets of the extrapolation then have fifty
KID, CMMD, MIND, INFINITY = "kid", "cmmd", "mind", "fd_infinity"
PUBLISHED_CLIP = f"{protocols.CMMD_NETWORK}/openai"


DistanceFunction = Callable[[Tensor, Tensor], dict[str, Estimate]]


def distance_functions(
    extractor: Extractor, count: int, *, independent: bool, pairs: RowPairs = ()
) -> Iterator[DistanceFunction]:
    """Yield functions of two sets of features ``(n, d)``, each of which returns its distances by metric.

    Precision, recall, density and coverage are measured of independent sets alone: against a baseline's own pictures
    of the same prompts they are 1, or near it, whatever a run did.

    Args:
        extractor: network of the features; CMMD is defined for CLIPs only.
        count: pictures of the smallest run; the extrapolation to infinite n needs 500.
        independent: whether the sets are of different seeds. The extrapolation needs that: as a subset grows towards
            all pictures that the other set was paired with, the distance falls faster than 1/n.
        pairs: rows of both sets that are of one prompt and seed.
    """
    yield lambda x, y: _frechet(x, y, pairs)
    if independent and count >= FEWEST_INFINITY:
        yield _infinity
    yield lambda x, y: _kid(x, y, pairs)
    if isinstance(extractor, ClipExtractor):
        is_published = extractor.name == PUBLISHED_CLIP and extractor.protocol == "cmmd"
        note = "" if is_published else f"not the published {protocols.CMMD_NETWORK} with its preprocessing"
        yield lambda x, y: {CMMD: _cmmd(x, y, note, pairs)}
    yield lambda x, y: {MIND: _estimate(mind.mind_interval(x, y, pairs=pairs))}
    if independent:
        yield _precision_recall
        yield _density_coverage


def difference_intervals(metrics: Iterable[str], a: Tensor, b: Tensor, reference: Tensor) -> dict[str, Interval | None]:
    """Return by metric the interval of the distance of ``a`` minus that of ``b``; None for a metric without one.

    Rows of ``a`` and ``b`` are paired, and the reference is held fixed.
    """
    intervals: dict[str, Interval | None] = {}
    for metric in metrics:
        if metric not in intervals:
            intervals |= _DIFFERENCES[metric](a, b, reference)
    return intervals


def _precision_recall_differences(a: Tensor, b: Tensor, reference: Tensor) -> dict[str, Interval | None]:
    precision, recall = manifold_intervals.precision_recall_differences(reference, a, b)
    return {"precision": precision, "recall": recall.interval}


def _density_coverage_differences(a: Tensor, b: Tensor, reference: Tensor) -> dict[str, Interval | None]:
    density, coverage = manifold_intervals.density_coverage_differences(reference, a, b)
    return {"density": density, "coverage": coverage.interval}


_DIFFERENCES: dict[str, Callable[[Tensor, Tensor, Tensor], dict[str, Interval | None]]] = {
    FD: lambda a, b, reference: {FD: frechet_intervals.difference(a, b, reference)},
    INFINITY: lambda a, b, reference: {INFINITY: frechet_intervals.infinity_difference(a, b, reference)},
    KID: lambda a, b, reference: {KID: thousandfold(mmd_intervals.kid_difference(a, b, reference))},
    CMMD: lambda a, b, reference: {CMMD: mmd_intervals.cmmd_difference(a, b, reference)},
    MIND: lambda a, b, reference: {MIND: mind.mind_difference(a, b, reference)},
    **dict.fromkeys(("precision", "recall"), _precision_recall_differences),
    **dict.fromkeys(("density", "coverage"), _density_coverage_differences),
}


def _estimate(interval: Interval) -> Estimate:
    return Estimate(interval.value, interval)


def _frechet(x: Tensor, y: Tensor, pairs: RowPairs) -> dict[str, Estimate]:
    return {FD: Estimate(printed_distances.fid(x, y)[FD], frechet_intervals.distance_interval(x, y, pairs=pairs))}


def _cmmd(x: Tensor, y: Tensor, note: str, pairs: RowPairs) -> Estimate:
    interval = mmd_intervals.cmmd_interval(x, y, pairs=pairs)
    return Estimate(interval.value, interval, note, {"unbiased": mmd.cmmd_unbiased(x, y, pairs=pairs)})


def _infinity(x: Tensor, y: Tensor) -> dict[str, Estimate]:
    limit = frechet_intervals.infinity(x, y)
    detail = {name: getattr(limit, name) for name in ("r2", "slope", "fit", "sizes", "values", "warning")}
    note = f"{limit.fit} in 1/n, R² {limit.r2:.3f}"
    return {INFINITY: Estimate(limit.value, limit.interval, note, detail)}


def _kid(x: Tensor, y: Tensor, pairs: RowPairs) -> dict[str, Estimate]:
    return {KID: _estimate(thousandfold(mmd_intervals.kid_interval(x, y, pairs=pairs)))}


def _precision_recall(x: Tensor, y: Tensor) -> dict[str, Estimate]:
    precision, recall = manifold_intervals.precision_recall_intervals(y, x)
    return {"precision": _estimate(precision), "recall": covered_estimate(recall)}


def _density_coverage(x: Tensor, y: Tensor) -> dict[str, Estimate]:
    density, coverage = manifold_intervals.density_coverage_intervals(y, x)
    return {"density": _estimate(density), "coverage": covered_estimate(coverage)}


def covered_estimate(share: CoveredShare) -> Estimate:
    """Return a recall or a coverage as an estimate, with the reason where it has no interval."""
    return Estimate(share.value, share.interval, share.why)
