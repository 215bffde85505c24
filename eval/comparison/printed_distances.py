"""The distances of two sets of features that reports and commands print, under the names they print them."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from diffaccel.eval.metrics import frechet, manifold, mmd
from diffaccel.eval.metrics.frechet import Moments
from diffaccel.eval.networks.extractors.base import Extractor

FD = "fd"
BETTER: dict[str, Literal["lower", "higher"]] = {
    FD: "lower",
    "kid": "lower",
    "precision": "higher",
    "recall": "higher",
    "density": "higher",
    "coverage": "higher",
}


# as keys print them; others by their own name
_PRINTED = {
    "kid": ("KID", " x1000"),
    "kid_subsets": ("KID (subsets)", " x1000"),
    "cmmd": ("CMMD", " x1000"),
    "cmmd_unbiased": ("CMMD (unbiased)", " x1000"),
    "is": ("IS", ""),
    "mind": ("MIND", ""),
    "fd_infinity": ("FD-infinity", ""),
}


def key(metric: str, extractor: Extractor) -> str:
    """A metric's full name, with the network whose features it compares and their protocol.

    As in the extractor's own key, a name without a network stands for Inception of verified weights: ``KID[tf-fid]``.
    """
    if metric == FD:
        return extractor.key
    name, unit = _PRINTED.get(metric, (metric, ""))
    if extractor.key.startswith("FID"):
        name = "FID-infinity" if metric == "fd_infinity" else name
        return f"{name}{extractor.key.removeprefix('FID')}{unit}"
    if metric.startswith("cmmd") and extractor.key.startswith("FD-clip["):  # CMMD is of a CLIP by its name
        return f"{name}{extractor.key.removeprefix('FD-clip')}{unit}"
    return f"{name}-{extractor.key.removeprefix('FD-')}{unit}"


def fid(samples: Tensor | Moments, reference: Tensor | Moments) -> dict[str, float]:
    """Fréchet distance of features, or of moments on either side."""
    if isinstance(samples, Moments) or isinstance(reference, Moments):
        return {FD: frechet.between(frechet.gaussian(samples), frechet.gaussian(reference))}
    return {FD: frechet.distance_of_features(samples, reference)}


def kid(samples: Tensor, reference: Tensor) -> dict[str, float]:
    """Kernel distance, times 1000."""
    return {"kid": 1000 * mmd.kid(samples, reference)}


def prdc(samples: Tensor, reference: Tensor) -> dict[str, float]:
    """Precision, recall, density and coverage."""
    precision, recall = manifold.precision_recall(reference, samples)
    density, coverage = manifold.density_coverage(reference, samples)
    return {"precision": precision, "recall": recall, "density": density, "coverage": coverage}
