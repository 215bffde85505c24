"""MIND, the Monge Inception Distance (arXiv 2605.06797), on the same features as the Fréchet distance."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.eval.metrics.feature_matrix import checked, checked_pair, paired
from diffaccel.eval.metrics.partners import Partners
from diffaccel.eval.uncertainty.influence import influence_interval
from diffaccel.eval.uncertainty.intervals import Interval

LEAST = 4  # rows of an interval, whose halves have a spread
# chosen by simulation: without it 95 % intervals of skewed features cover 88 to 93 %, and all they miss is above them
_TAIL = 0.1
_TAIL_OF_DIFFERENCE = 0.2  # likewise: 90 to 97 % without, by the reference that was drawn
_CHUNK = 64  # directions projected and sorted at a time


def mind(x: Tensor, y: Tensor, *, projections: int = 1000, seed: int = 0) -> float:
    """Compute the sliced squared 2-Wasserstein distance ``3 d mean_u W_2^2(u.x, u.y)``, over random unit vectors ``u``.

    In one dimension ``W_2^2`` is the integral over ``q`` in [0, 1] of the squared difference of both quantile
    functions, computed exactly from sorted values for any ``n`` and ``m``; the paper draws ``min(n, m)`` rows instead.
    A shift by ``s`` gives ``3 |s|^2`` on average over directions. Sampling bias is positive and falls with ``n``:
    compare equal sizes only.

    Args:
        x: ``(n, d)``.
        y: ``(m, d)``.
        projections: number of directions, drawn from ``seed``.
    """
    x, y = checked_pair(x, y, ("x", "y"))
    if projections < 1:
        raise DiffAccelError(f"MIND needs at least one direction, got projections={projections}.")
    d = x.shape[1]
    # both quantile functions are steps at levels i/n and j/m; the integers m i and n j keep equal levels equal
    n, m = len(x), len(y)
    edges = torch.cat([torch.arange(0, n + 1) * m, torch.arange(0, m + 1) * n]).unique().to(x.device)
    weights = edges.diff().double() / (n * m)
    rank_x, rank_y = edges[:-1] // m, edges[:-1] // n
    x, y = x.double(), y.double()
    total = weights.new_zeros(())
    for u in _directions(projections, d, seed, x.device):
        gap = (x @ u.T).sort(dim=0).values[rank_x] - (y @ u.T).sort(dim=0).values[rank_y]
        total += weights @ gap.square().sum(1)
    return float(3 * d * total / projections)


def mind_interval(
    x: Tensor, y: Tensor, *, projections: int = 1000, seed: int = 0, pairs: Sequence[tuple[int, int]] = ()
) -> Interval:
    """Compute MIND with a 95 % interval over the rows of ``x``; directions are held fixed, and so is ``y``.

    With ``pairs``, the rows of ``y`` that belong to rows of ``x`` move with them. Influences grow with the square of a
    feature: where features are skewed, few rows carry the spread and the upper end lies further
    (:func:`diffaccel.eval.uncertainty.influence.influence_interval`).
    """
    checked(x, "x", least=LEAST)
    x, y = checked_pair(x, y, ("x", "y"))
    partners = Partners.of(pairs, len(x), len(y))

    def influences(rows: Tensor) -> Tensor:
        places, kept = (index.to(x.device) for index in partners.with_rows(rows))
        own, other = x[rows.to(x.device)], y[kept]
        values = _potentials(own, other, projections, seed)
        if len(places):
            theirs = _potentials(other, own, projections, seed)[: len(places)]
            values[places] += theirs * (len(own) / len(other))
        return values

    value = mind(x, y, projections=projections, seed=seed)
    held = "both sides paired" if pairs else "reference fixed"
    return influence_interval(value, influences, len(x), held=held, positive=value, tail=_TAIL)


def mind_difference(a: Tensor, b: Tensor, y: Tensor, *, projections: int = 1000, seed: int = 0) -> Interval:
    """Compute ``MIND(a, y) - MIND(b, y)`` of runs of the same ids, row by row, with a 95 % interval."""
    paired(a, b)
    checked(a, "a", least=LEAST)
    a, y = checked_pair(a, y, ("a", "y"))
    b = b.to(a.device)

    def influences(rows: Tensor) -> Tensor:
        rows = rows.to(a.device)
        return _potentials(a[rows], y, projections, seed) - _potentials(b[rows], y, projections, seed)

    value = mind(a, y, projections=projections, seed=seed) - mind(b, y, projections=projections, seed=seed)
    return influence_interval(value, influences, len(a), held="reference fixed", tail=_TAIL_OF_DIFFERENCE)


def _directions(projections: int, d: int, seed: int, device: torch.device) -> Iterator[Tensor]:
    """Yield random unit vectors, (chunk, d) each."""
    directions = torch.randn(projections, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    directions /= directions.norm(dim=1, keepdim=True)
    yield from directions.to(device).split(_CHUNK)


def _potentials(x: Tensor, y: Tensor, projections: int, seed: int) -> Tensor:
    """Return the derivative of MIND as each row of ``x`` gets more weight, (n,) around 0.

    In one dimension it is ``2 integral (t - T(t)) dt`` up to the row's value, with the monotone map ``T`` to ``y``: a
    Kantorovich potential. Between neighbours of ``x`` that map is constant.
    """
    n, m, d = len(x), len(y), x.shape[1]
    x, y = x.double(), y.double()
    levels = torch.arange(1, n, device=x.device) * m
    above, below = (levels // n).clamp(max=m - 1), (levels - 1) // n  # differ where y has a step at this level
    total = torch.zeros(n, dtype=torch.float64, device=x.device)
    for u in _directions(projections, d, seed, x.device):
        values, order = (x @ u.T).sort(dim=0)
        targets = (y @ u.T).sort(dim=0).values
        target = (targets[above] + targets[below]) / 2
        steps = (values[1:] - values[:-1]) * (values[1:] + values[:-1] - 2 * target)
        potential = torch.cat([steps.new_zeros(1, steps.shape[1]), steps.cumsum(0)])
        total += torch.empty_like(potential).scatter_(0, order, potential).sum(1)
    total *= 3 * d / projections
    return total - total.mean()
