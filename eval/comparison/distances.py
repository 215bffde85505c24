"""Distances of two sets of features with what can be said of their error: what a row of distributions is made from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from torch import Tensor

from diffaccel.eval.comparison import printed_distances as distances
from diffaccel.eval.comparison.row import Better
from diffaccel.eval.metrics import frechet_intervals, mind, mmd
from diffaccel.eval.networks import protocols
from diffaccel.eval.networks.extractors.base import Extractor
from diffaccel.eval.networks.extractors.clip import ClipExtractor
from diffaccel.eval.uncertainty.intervals import Interval

FEWEST_INFINITY = 500  # pictures; the smallest subsets of the extrapolation then have fifty
KID, CMMD, MIND, INFINITY = "kid", "cmmd", "mind", "fd_infinity"
BETTER: dict[str, Better] = {**distances.BETTER, MIND: "lower", CMMD: "lower", INFINITY: "lower"}
THOUSAND = 1000
CMMD_PAPER = f"{protocols.CMMD_NETWORK}/openai"


@dataclass(frozen=True)
class Number:
    """A distance, its 95 % interval if it has one, and what a reader must know."""

    value: float
    interval: Interval | None = None
    note: str = ""
    detail: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


Measure = Callable[[Tensor, Tensor], dict[str, Number]]


def measures(extractor: Extractor, count: int, *, independent: bool) -> Iterator[Measure]:
    """What is measured of ``count`` pictures against a set, by one network's features ``(n, d)``.

    Args:
        extractor: CMMD is of CLIPs only.
        count: of the smallest run; the extrapolation to infinite n needs 500.
        independent: the set is not of the same seeds. The extrapolation is of independent sets: as a subset grows
            towards all pictures that the set was paired with, the distance falls faster than 1/n.
    """
    yield _frechet
    if independent and count >= FEWEST_INFINITY:
        yield _infinity
    yield _kid
    if isinstance(extractor, ClipExtractor):
        papers = extractor.name == CMMD_PAPER and extractor.protocol == "cmmd"
        note = "" if papers else f"not the published {protocols.CMMD_NETWORK} with its preprocessing"
        yield lambda x, y: {CMMD: Number(mmd.cmmd(x, y), None, note, {"unbiased": mmd.cmmd_unbiased(x, y)})}
    yield lambda x, y: {MIND: Number(mind.mind(x, y))}
    yield lambda x, y: {metric: Number(value) for metric, value in distances.prdc(x, y).items()}


def difference(metric: str, a: Tensor, b: Tensor, reference: Tensor) -> Interval | None:
    """Of ``a`` minus ``b``, row by row the same ids, to a reference held fixed; None where no interval is known."""
    if metric == distances.FD:
        return frechet_intervals.difference(a, b, reference)
    return _thousand(mmd.kid_difference(a, b, reference)) if metric == KID else None


def _frechet(x: Tensor, y: Tensor) -> dict[str, Number]:
    return {distances.FD: Number(distances.fid(x, y)[distances.FD], frechet_intervals.distance_interval(x, y))}


def _infinity(x: Tensor, y: Tensor) -> dict[str, Number]:
    found = frechet_intervals.infinity(x, y)
    detail = {name: getattr(found, name) for name in ("r2", "slope", "fit", "sizes", "values", "warning")}
    note = f"{found.fit} in 1/n, R² {found.r2:.3f}"
    return {INFINITY: Number(found.value, found.interval, note, detail)}


def _kid(x: Tensor, y: Tensor) -> dict[str, Number]:
    interval = _thousand(mmd.kid_interval(x, y))
    return {KID: Number(interval.value, interval)}


def _thousand(interval: Interval) -> Interval:
    ends = {name: THOUSAND * getattr(interval, name) for name in ("value", "low", "high")}
    return replace(interval, **ends)
