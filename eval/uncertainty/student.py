"""Student's t distribution: its quantiles, for any number of degrees of freedom."""

from __future__ import annotations

import math
from statistics import NormalDist

_MANY = 60  # degrees of freedom from which on the expansion is exact to 1e-8


def student_quantile(p: float, df: int) -> float:
    """Compute the quantile ``t`` of a level ``p`` with ``df`` degrees of freedom.

    Few degrees: the root of the finite sum for ``P(T <= t)``, by bisection (Abramowitz & Stegun 26.7.3 and 26.7.4).
    Many: the expansion in ``1/df`` (26.7.5).
    """
    if p < 0.5:
        return -student_quantile(1 - p, df)
    if df >= _MANY:
        return _expansion(p, df)
    low, high = 0.0, 1.0
    while _probability(high, df) < p:
        low, high = high, 2 * high
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _probability(middle, df) < p else (low, middle)
    return (low + high) / 2


def _probability(t: float, df: int) -> float:
    """Compute ``P(T <= t)`` for ``t >= 0``."""
    angle = math.atan(t / math.sqrt(df))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = df % 2
    term, total = (cosine, cosine) if odd else (1.0, 1.0)
    for k in range(3 if odd else 2, df - 1, 2):
        term *= (k - 1) / k * cosine**2
        total += term
    if not odd:
        return 0.5 + sine * total / 2
    return 0.5 + (angle + (sine * total if df > 1 else 0.0)) / math.pi


def _expansion(p: float, df: int) -> float:
    z = NormalDist().inv_cdf(p)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / df ** (i + 1) for i, term in enumerate(terms))
