"""Distances of two sets of features as reports and commands print them: names with the network, units, directions."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from torch import Tensor

from diffaccel.eval.metrics import frechet, manifold, mmd
from diffaccel.eval.metrics.frechet import Moments
from diffaccel.eval.networks.extractors.base import Extractor
from diffaccel.eval.uncertainty.intervals import Interval

FD = "fd"
THOUSAND = 1000  # the factor by which kernel distances are printed
BETTER: dict[str, Literal["lower", "higher"]] = {
    FD: "lower",
    "kid": "lower",
    "precision": "higher",
    "recall": "higher",
    "density": "higher",
    "coverage": "higher",
}


# metric -> its printed name and unit; a metric that is not here has its own name and no unit
_NAMES_AND_UNITS = {
    "kid": ("KID", " x1000"),
    "kid_subsets": ("KID (subsets)", " x1000"),
    "cmmd": ("CMMD", " x1000"),
    "cmmd_unbiased": ("CMMD (unbiased)", " x1000"),
    "is": ("IS", ""),
    "mind": ("MIND", ""),
    "fd_infinity": ("FD-infinity", ""),
}


def printed_key(metric: str, extractor: Extractor) -> str:
    """Return a metric's full name, with the network whose features it compares and their protocol.

    As in the extractor's own key, a name without a network stands for Inception of verified weights: ``KID[tf-fid]``.
    """
    if metric == FD:
        return extractor.key
    name, unit = _NAMES_AND_UNITS.get(metric, (metric, ""))
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


def prdc(samples: Tensor, reference: Tensor) -> dict[str, float]:
    """Compute precision, recall, density and coverage."""
    precision, recall = manifold.precision_recall(reference, samples)
    density, coverage = manifold.density_coverage(reference, samples)
    return {"precision": precision, "recall": recall, "density": density, "coverage": coverage}
