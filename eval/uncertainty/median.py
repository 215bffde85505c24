"""Interval of a median from order statistics (Hettmansperger & Sheather 1986), which holds for skewed values too.

The median of a population lies between the ``k``-th lowest and the ``k``-th highest of ``n`` values with the
probability ``c_k = 1 - 2 P(B < k)`` of a binomial ``B`` of ``n`` and 1/2, whatever the population. Between the two
``k`` whose ``c_k`` enclose the level, ends are interpolated.
"""

from __future__ import annotations

from itertools import accumulate
from math import comb

import numpy as np
from numpy.typing import NDArray


def median_ends(values: NDArray[np.float64], level: float = 0.95) -> tuple[float, float] | None:
    """Compute both ends of the interval of a median; None for too few values, fewer than 6 at 95 %.

    With ``I = (c_k - level) / (c_k - c_(k+1))`` the lower end is ``(1 - w) x_k + w x_(k+1)``, where
    ``w = (n - k) I / (k + (n - 2k) I)``.

    Args:
        values: (n,), in any order.
        level: probability that the interval holds the median.
    """
    x, n = np.sort(values), len(values)
    chances = [1 - 2 * below / 2**n for below in accumulate(comb(n, i) for i in range(n // 2 + 1))]  # of k = 1, 2, ...
    k = sum(chance >= level for chance in chances)
    if k == 0:
        return None
    inside, outside = chances[k - 1], max(chances[k], 0.0)
    part = (inside - level) / (inside - outside)
    weight = (n - k) * part / (k + (n - 2 * k) * part)
    low, high = x[k - 1] + weight * (x[k] - x[k - 1]), x[n - k] + weight * (x[n - k - 1] - x[n - k])
    return float(low), float(high)
