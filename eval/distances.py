"""The distances of two sets of features that reports and commands print, under the names they print them."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from diffaccel.eval import frechet, manifold, mmd
from diffaccel.eval.extractors.base import Extractor
from diffaccel.eval.frechet import Moments

FD = "fd"
BETTER: dict[str, Literal["lower", "higher"]] = {
    FD: "lower",
    "kid": "lower",
    "precision": "higher",
    "recall": "higher",
    "density": "higher",
    "coverage": "higher",
}


def key(metric: str, extractor: Extractor) -> str:
    """A metric's full name, with the network whose features it compares."""
    if metric == FD:
        return extractor.key
    name = f"{metric}-{extractor.key.removeprefix('FD-')}"
    return f"KID{name.removeprefix('kid')} x1000" if metric == "kid" else name


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
