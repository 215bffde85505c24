"""The integer program of bits: one choice for each layer, the largest sum of values within a budget.

    max sum_i S_i(b_i)   subject to   sum_i c_i(b_i) <= B

A knapsack of multiple choices (arXiv 2405.17873, section 4.3). Each layer's upper concave hull of (cost, value) gives
steps of falling slope; the steps of all layers are taken by slope until the budget is used, single swaps mend what is
left, and the relaxed program bounds the optimum from above.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from diffaccel.errors import DiffAccelError

_SWAPS = 200  # rounds of mending
_SLACK = 1e-9  # of the budget, for sums of floats


@dataclass(frozen=True)
class LayerChoices:
    """A layer's choices: cost and value of each number of bits."""

    name: str
    cost: dict[int, float]
    value: dict[int, float]

    def useful(self) -> list[int]:
        """Return the bits that are worth more than every cheaper choice, by growing cost."""
        kept: list[int] = []
        for bits in sorted(self.cost, key=lambda bits: (self.cost[bits], -self.value[bits], bits)):
            if not kept or self.value[bits] > self.value[kept[-1]]:
                kept.append(bits)
        return kept

    def hull(self) -> list[int]:
        """Return the useful bits on the upper concave hull."""
        hull: list[int] = []
        for bits in self.useful():
            while len(hull) > 1 and self._slope(hull[-2], hull[-1]) <= self._slope(hull[-1], bits):
                hull.pop()
            hull.append(bits)
        return hull

    def _slope(self, low: int, high: int) -> float:
        return (self.value[high] - self.value[low]) / (self.cost[high] - self.cost[low])


@dataclass(frozen=True)
class BitPlan:
    """The bits of each layer.

    Attributes:
        bits: of each layer by its name.
        objective: sum of their values.
        bound: of the relaxed program, which no plan within the budget exceeds.
        cost: sum of their costs.
        budget: that it had to keep.
    """

    bits: dict[str, int]
    objective: float
    bound: float
    cost: float
    budget: float

    @property
    def gap(self) -> float:
        """How far the objective may be from the best one, as a share of the bound."""
        return max(0.0, self.bound - self.objective) / max(abs(self.bound), 1e-12)


def allocate(layers: Sequence[LayerChoices], budget: float) -> BitPlan:
    """Choose the bits of each layer by slopes and swaps.

    Raises:
        DiffAccelError: for a budget below the cheapest plan.
    """
    budget = _checked(layers, budget)
    hulls = [layer.hull() for layer in layers]
    chosen = [hull[0] for hull in hulls]
    used = sum(layer.cost[bits] for layer, bits in zip(layers, chosen, strict=True))
    steps = []
    for number, (layer, hull) in enumerate(zip(layers, hulls, strict=True)):
        for low, high in itertools.pairwise(hull):
            cost, value = layer.cost[high] - layer.cost[low], layer.value[high] - layer.value[low]
            steps.append((-value / cost, cost, layer.name, number, high, value))
    value = sum(layer.value[bits] for layer, bits in zip(layers, chosen, strict=True))
    bound, blocked = None, set()
    for slope, cost, _, number, bits, gain in sorted(steps):
        if number in blocked:
            continue
        if used + cost <= budget:
            chosen[number], used, value = bits, used + cost, value + gain
        else:
            bound = value - slope * (budget - used) if bound is None else bound
            blocked.add(number)
    chosen = _mended(layers, chosen, budget)
    return _plan(layers, chosen, budget, value if bound is None else bound)


def allocate_exactly(layers: Sequence[LayerChoices], budget: float) -> BitPlan:
    """Solve the program by the mixed-integer solver of scipy (HiGHS).

    Raises:
        DiffAccelError: for a budget below the cheapest plan, and where scipy is not installed.
    """
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array
    except ImportError as error:
        raise DiffAccelError(
            "The exact program needs scipy, which is not installed. pip install 'diffaccel[exact]', or leave it out."
        ) from error
    budget = _checked(layers, budget)
    choices = [(number, bits) for number, layer in enumerate(layers) for bits in layer.useful()]
    cost = np.array([layers[number].cost[bits] for number, bits in choices])
    value = np.array([layers[number].value[bits] for number, bits in choices])
    ones = csr_array((np.ones(len(choices)), ([number for number, _ in choices], range(len(choices)))))
    result = milp(
        -value, integrality=np.ones(len(choices)), bounds=Bounds(0, 1), options={"mip_rel_gap": 0.0},
        constraints=[LinearConstraint(ones, 1, 1), LinearConstraint(cost[None], -np.inf, budget)],
    )  # fmt: skip
    if result.x is None:
        raise DiffAccelError(f"scipy found no plan ({result.message}). Leave exact out.")
    chosen = [0] * len(layers)
    for taken, (number, bits) in zip(result.x > 0.5, choices, strict=True):
        if taken:
            chosen[number] = bits
    return _plan(layers, chosen, budget, allocate(layers, budget).bound)


def group_budgets(average: float, ratio: float, first: float, second: float) -> tuple[float, float]:
    """Return the averages of two groups of sizes ``first`` and ``second``, the first ``ratio`` times the second.

    Both together have ``average``: ``P_1 b_1 + P_2 b_2 = average (P_1 + P_2)`` with ``b_1 = ratio b_2``.
    """
    other = average * (first + second) / (ratio * first + second)
    return ratio * other, other


def _checked(layers: Sequence[LayerChoices], budget: float) -> float:
    least = sum(min(layer.cost.values()) for layer in layers)
    most = sum(max(layer.cost.values()) for layer in layers)
    if budget < least * (1 - _SLACK):
        raise DiffAccelError(f"The budget is {budget:.6g}; plans cost from {least:.6g} to {most:.6g}. Allow more.")
    return budget + _SLACK * abs(budget)


def _plan(layers: Sequence[LayerChoices], chosen: Sequence[int], budget: float, bound: float) -> BitPlan:
    pairs = list(zip(layers, chosen, strict=True))
    objective = sum(layer.value[bits] for layer, bits in pairs)
    cost = sum(layer.cost[bits] for layer, bits in pairs)
    return BitPlan({layer.name: bits for layer, bits in pairs}, objective, max(bound, objective), cost, budget)


def _mended(layers: Sequence[LayerChoices], chosen: Sequence[int], budget: float) -> list[int]:
    """Return a plan that no change of one layer, or of one up and one down, makes better."""
    best = list(chosen)
    for _ in range(_SWAPS):
        used = sum(layer.cost[bits] for layer, bits in zip(layers, best, strict=True))
        moves = [
            (number, bits, layer.value[bits] - layer.value[best[number]], layer.cost[bits] - layer.cost[best[number]])
            for number, layer in enumerate(layers)
            for bits in layer.useful()
            if bits != best[number]
        ]
        ups = [move for move in moves if move[2] > 0]
        downs = [(-1, 0, 0.0, 0.0), *(move for move in moves if move[2] <= 0 and move[3] < 0)]
        if not ups:
            break
        gain = np.add.outer([move[2] for move in ups], [move[2] for move in downs])
        cost = np.add.outer([move[3] for move in ups], [move[3] for move in downs])
        same = np.equal.outer([move[0] for move in ups], [move[0] for move in downs])
        gain[(cost > budget - used) | same] = -np.inf
        up, down = np.unravel_index(int(gain.argmax()), gain.shape)
        if gain[up, down] <= 1e-12:
            break
        best[ups[up][0]] = ups[up][1]
        if downs[down][0] >= 0:
            best[downs[down][0]] = downs[down][1]
    return best
