"""Distances of two sets of features as reports and commands print them: one table of measures, and one row of each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from diffaccel.eval.comparison.row import Better, Estimate, Row
from diffaccel.eval.metrics import frechet, mmd
from diffaccel.eval.metrics.frechet import Moments
from diffaccel.eval.networks.extractors.base import Extractor
from diffaccel.eval.uncertainty.intervals import Interval

FD = "fd"
THOUSAND = 1000  # the factor by which kernel distances are printed


@dataclass(frozen=True)
class FeatureMeasure:
    """What is printed of a number of two sets of features: name ("" for the network's own), unit and direction."""

    name: str
    unit: str = ""
    better: Better = "lower"


MEASURES = {
    FD: FeatureMeasure(""),
    "sfid": FeatureMeasure("sfid"),
    "fd_infinity": FeatureMeasure("FD-infinity"),
    "kid": FeatureMeasure("KID", " x1000"),
    "kid_subsets": FeatureMeasure("KID (subsets)", " x1000"),
    "cmmd": FeatureMeasure("CMMD", " x1000"),
    "cmmd_unbiased": FeatureMeasure("CMMD (unbiased)", " x1000"),
    "mind": FeatureMeasure("MIND"),
    "is": FeatureMeasure("IS", better="higher"),
    **{name: FeatureMeasure(name, better="higher") for name in ("precision", "recall", "density", "coverage")},
}


def feature_row(
    metric: str, run: str, estimate: Estimate, extractor: Extractor, *, n: int | None, m: int | None,
    detail: Mapping[str, Any],
) -> Row:  # fmt: skip
    """Return the row of a measure of :data:`MEASURES`, with the network that its features are of.

    Args:
        metric: its short name.
        run: name of the run or set.
        estimate: the number with its interval, and what belongs to it.
        extractor: network of the features.
        n, m: pictures of the run and of the reference.
        detail: of the comparison.
    """
    row = Row(
        metric=metric, key=printed_key(metric, extractor), family="distribution", run=run,
        better=MEASURES[metric].better, value=estimate.value, n=n, m=m,
        detail={
            "extractor": extractor.name, "weights_sha256": extractor.weights_sha256, **estimate.detail, **detail,
        },
    )  # fmt: skip
    row.set_interval("interval", estimate.interval)
    return row


def printed_key(metric: str, extractor: Extractor) -> str:
    """Return a metric's full name, with the network whose features it compares and their protocol.

    As in the extractor's own key, a name without a network stands for Inception of verified weights: ``KID[tf-fid]``.
    """
    if metric == FD:
        return extractor.key
    name, unit = MEASURES[metric].name, MEASURES[metric].unit
    if extractor.key.startswith("FID"):
        name = "FID-infinity" if metric == "fd_infinity" else name
        return f"{name}{extractor.key.removeprefix('FID')}{unit}"
    if metric.startswith("cmmd") and extractor.key.startswith("FD-clip["):  # CMMD implies the features of a CLIP
        return f"{name}{extractor.key.removeprefix('FD-clip')}{unit}"
    return f"{name}-{extractor.key.removeprefix('FD-')}{unit}"


def fid(samples: Tensor | Moments, reference: Tensor | Moments) -> dict[str, float]:
    """Compute the Fréchet distance between features, or between moments on either side."""
    if isinstance(samples, Moments) or isinstance(reference, Moments):
        return {FD: frechet.between(frechet.gaussian(samples), frechet.gaussian(reference))}
    return {FD: frechet.distance_of_features(samples, reference)}


def kid(samples: Tensor, reference: Tensor) -> dict[str, float]:
    """Compute the kernel distance, times 1000."""
    return {"kid": THOUSAND * mmd.kid(samples, reference)}


def thousandfold(interval: Interval) -> Interval:
    """Return the interval of a kernel distance as it is printed, times 1000."""
    ends = {name: THOUSAND * getattr(interval, name) for name in ("value", "low", "high")}
    return replace(interval, **ends)
