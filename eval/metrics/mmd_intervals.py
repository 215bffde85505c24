"""Sampling error of kernel distances: intervals of KID and CMMD, and of their differences between two runs.

The reference is held fixed, or moves with the samples where its rows are paired with theirs. Intervals are of the
influences of rows (:mod:`diffaccel.eval.uncertainty.influence`), which the kernel's row sums give at no extra cost:
``psi_i = 2 (mean_j k(x_i, x_j) - mean_j k(x_i, y_j))`` around its mean.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from diffaccel.eval.metrics.feature_matrix import checked_pair, paired
from diffaccel.eval.metrics.mmd import (
    Kernel,
    RowPairs,
    cubic,
    gaussian,
    own_sums,
    pair_products,
    row_sums,
    statistics,
    unit_rows,
)
from diffaccel.eval.metrics.partners import Partners
from diffaccel.eval.uncertainty.influence import influence_interval
from diffaccel.eval.uncertainty.intervals import Interval

_NAMES = ("a", "reference")
_LEAST = 4  # rows; their halves have two


def kid_interval(a: Tensor, reference: Tensor, *, level: float = 0.95, pairs: RowPairs = ()) -> Interval:
    """Compute KID with an interval over the rows of ``a``, the reference held fixed.

    With ``pairs``, the products of paired rows are left out, and a row moves together with its partner. KID can be
    negative: its interval is symmetric in the logarithm of the V-statistic, which is positive and a constant above it.
    """
    a, reference = checked_pair(a, reference, _NAMES, least=_LEAST)
    value, positive = statistics(a, reference, cubic, pairs)
    return _interval(value, positive, a, reference, cubic, level, pairs)


def kid_difference(a: Tensor, b: Tensor, reference: Tensor, *, level: float = 0.95) -> Interval:
    """Compute ``KID(a, reference) - KID(b, reference)`` of runs of the same ids, paired row by row.

    An id moves in both runs together; the reference is held fixed.
    """
    paired(a, b)
    a, reference = checked_pair(a, reference, _NAMES, least=_LEAST)
    return _difference(a, b.to(a.device), reference, cubic, level, place=0)


def cmmd_interval(
    a: Tensor, reference: Tensor, *, sigma: float = 10.0, scale: float = 1000.0, level: float = 0.95,
    pairs: RowPairs = (),
) -> Interval:  # fmt: skip
    """Compute CMMD (:func:`diffaccel.eval.metrics.mmd.cmmd`) with an interval over the rows of ``a``."""
    a, reference = checked_pair(a, reference, _NAMES, least=_LEAST)
    a, reference = unit_rows(a, "a"), unit_rows(reference, "reference")
    kernel = gaussian(a, sigma)
    value = statistics(a, reference, kernel)[1]
    return _scaled(_interval(value, value, a, reference, kernel, level, pairs), scale)


def cmmd_difference(
    a: Tensor, b: Tensor, reference: Tensor, *, sigma: float = 10.0, scale: float = 1000.0, level: float = 0.95
) -> Interval:
    """Compute ``CMMD(a, reference) - CMMD(b, reference)`` of runs of the same ids, paired row by row."""
    paired(a, b)
    a, reference = checked_pair(a, reference, _NAMES, least=_LEAST)
    a, b, reference = unit_rows(a, "a"), unit_rows(b.to(a.device), "b"), unit_rows(reference, "reference")
    return _scaled(_difference(a, b, reference, gaussian(a, sigma), level, place=1), scale)


def _interval(
    value: float, positive: float, a: Tensor, reference: Tensor, kernel: Kernel, level: float, pairs: RowPairs
) -> Interval:
    partners = Partners.of(pairs, len(a), len(reference))
    held = "both sides paired" if pairs else "reference fixed"

    def influences(rows: Tensor) -> Tensor:
        return _influences(a, reference, kernel, rows, partners)

    interval = influence_interval(value, influences, len(a), held=held, positive=positive, level=level)
    if not len(pairs) == len(a) == len(reference):
        return interval
    # a row that is equal to its partner moves nothing, and one alone that is not has no other to be told apart from
    moving = sum(not torch.equal(a[i], reference[j]) for i, j in pairs)
    few = min(interval.carriers or moving, moving)
    return replace(interval, carriers=float(few)) if moving else interval


def _difference(a: Tensor, b: Tensor, reference: Tensor, kernel: Kernel, level: float, *, place: int) -> Interval:
    """Return the interval of the difference of both runs' statistics, of which ``place`` is the one that is printed."""
    alone = Partners.of((), len(a), len(reference))

    def influences(rows: Tensor) -> Tensor:
        of_a, of_b = (_influences(run, reference, kernel, rows, alone) for run in (a, b))
        return of_a - of_b

    value = statistics(a, reference, kernel)[place] - statistics(b, reference, kernel)[place]
    return influence_interval(value, influences, len(a), held="reference fixed", level=level)


def _influences(a: Tensor, reference: Tensor, kernel: Kernel, rows: Tensor, partners: Partners) -> Tensor:
    """Return the influence of rows of ``a``, with that of their partners in the reference, (k,) around 0.

    Products of a row with itself and with its partner are left out of the means.
    """
    places, kept = (index.to(a.device) for index in partners.with_rows(rows))
    x, y, count = a[rows.to(a.device)], reference[kept], len(places)
    cross, counts = row_sums(x, y, kernel), torch.full((len(x),), float(len(y)), device=a.device)
    products = pair_products(x, y, list(zip(places.tolist(), range(count), strict=True)), kernel)
    cross[places] -= products
    counts[places] -= 1
    influences = 2 * (own_sums(x, kernel)[0] / (len(x) - 1) - cross / counts)
    if count:
        back = row_sums(y[:count], x, kernel) - products
        theirs = 2 * (own_sums(y, kernel)[0][:count] / (len(y) - 1) - back / (len(x) - 1))
        influences[places] += theirs * (len(x) / len(y))
    return influences - influences.mean()


def _scaled(interval: Interval, scale: float) -> Interval:
    ends = {name: scale * getattr(interval, name) for name in ("value", "low", "high")}
    return replace(interval, **ends)
