"""The choice of bits: budgets of both groups, the program of each, and the candidate whose pictures are nearest.

The groups' averages follow from the total and their ratio. Every ratio and total that is tried gives a candidate by two
programs; its pictures are drawn, and the one with the lowest squared error to the plain network's is kept: first of
weights, then of activations beside them (arXiv 2405.17873, section 4.3).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from diffaccel.errors import DiffAccelError
from diffaccel.quant.mixdq.allocate import BitPlan, LayerChoices, allocate, allocate_exactly, group_budgets

_WEIGHT_RATIOS, _ACTIVATION_RATIOS = (0.46, 1.36), (0.94, 1.09)
_BELOW = 0.3  # bits below the target, from which averages are tried
Order = Literal["weight", "activation"]


@dataclass(frozen=True)
class Choice:
    """The chosen bits, and how they were chosen.

    Attributes:
        bits: by layer.
        average: mean bits, each layer counted by its size.
        results: objective, bound and gap of each group, averages, ratio and error; JSON-ready.
    """

    bits: dict[str, int]
    average: float
    results: dict[str, Any]


@dataclass(frozen=True)
class Choosing:
    """What bits are chosen among.

    Attributes:
        sizes: what each bit of a layer costs: number of its weights, or of the numbers of its input.
        values: sensitivity of each choice.
        groups: names of the layers of each group that is programmed by itself.
        costs: of each choice instead of bits, such as milliseconds; with ``share`` of the span that may be used.
        exact: solve the programs by scipy.
    """

    sizes: dict[str, int]
    values: dict[str, dict[int, float]]
    groups: Sequence[Sequence[str]]
    costs: dict[str, dict[int, float]] | None = None
    share: float = 0.0
    exact: bool = False

    def average(self, bits: dict[str, int]) -> float:
        """Return the mean bits of a choice."""
        return sum(self.sizes[name] * bits[name] for name in bits) / sum(self.sizes[name] for name in bits)

    def size(self, names: Sequence[str]) -> int:
        """Return the size of some layers together."""
        return sum(self.sizes[name] for name in names)

    def choices(self, names: Sequence[str]) -> list[LayerChoices]:
        """Return the choices of some layers with their costs."""
        costs = self.costs or {
            name: {bits: float(bits * self.sizes[name]) for bits in self.values[name]} for name in names
        }
        return [LayerChoices(name, costs[name], self.values[name]) for name in names]


def choose(
    what: Choosing, target: float, kind: Order, ratios: int, averages: int, error: Callable[[dict[str, int]], float]
) -> Choice:
    """Return the best candidate by the error of its pictures.

    Args:
        target: mean bits that no candidate exceeds.
        ratios, averages: how many of each are tried.
        error: of the pictures under a choice; it is not asked where there is one candidate.

    Raises:
        DiffAccelError: where no candidate keeps the target.
    """
    plans: dict[tuple[tuple[str, int], ...], dict[str, Any]] = {}
    for average, ratio, budgets in candidate_budgets(what, target, kind, ratios, averages):
        solved = _solved(what, budgets)
        bits = {name: b for plan in solved for name, b in plan.bits.items()}
        plans.setdefault(tuple(bits.items()), {"average": average, "ratio": ratio, "plans": solved})
    measured = {bits: error(dict(bits)) if len(plans) > 1 else math.nan for bits in plans}
    best = min(plans, key=lambda bits: (measured[bits], bits)) if len(plans) > 1 else next(iter(plans))
    chosen = plans[best]
    results = {
        "average": what.average(dict(best)), "asked": target, "ratio": chosen["ratio"], "candidates": len(plans),
        "squared_error": None if math.isnan(measured[best]) else measured[best],
        "programs": [_told(plan) for plan in chosen["plans"]],
    }  # fmt: skip
    return Choice(dict(best), what.average(dict(best)), results)


def _told(plan: BitPlan) -> dict[str, float]:
    return {"layers": len(plan.bits), "objective": plan.objective, "bound": plan.bound, "gap": plan.gap}


def _tries(kind: Order, target: float, ratios: int, averages: int, groups: int) -> list[tuple[float, float]]:
    low, high = _WEIGHT_RATIOS if kind == "weight" else _ACTIVATION_RATIOS
    several = _between(low, high, ratios) if groups > 1 and ratios > 1 else [1.0]
    return [(average, ratio) for average in _between(target - _BELOW, target, averages) for ratio in several]


def _between(low: float, high: float, count: int) -> list[float]:
    """Return values at equal steps, the highest first; the highest alone for one."""
    if count == 1:
        return [high]
    return [high - (high - low) * i / (count - 1) for i in range(count)]


def candidate_budgets(
    what: Choosing, target: float, kind: Order, ratios: int, averages: int
) -> list[tuple[float, float, list[float]]]:
    """Return average, ratio and the groups' budgets of each candidate; they follow from sizes alone.

    Where no ratio that is tried gives both groups what they need, their budgets lie amid what they may be.

    Raises:
        DiffAccelError: where no candidate keeps the target.
    """
    if what.costs is not None:
        layers = [choices for names in what.groups for choices in what.choices(names)]
        low = sum(min(layer.cost.values()) for layer in layers)
        high = sum(max(layer.cost.values()) for layer in layers)
        return [(target, 1.0, [low + what.share * (high - low)])]
    tries = _tries(kind, target, ratios, averages, len(what.groups))
    found = [(average, ratio, _budgets(what, average, ratio)) for average, ratio in tries]
    kept = [(average, ratio, budgets) for average, ratio, budgets in found if budgets is not None]
    if not kept and (ratio := _middle(what, target)) is not None:
        kept = [(target, ratio, budgets)] if (budgets := _budgets(what, target, ratio)) is not None else []
    if not kept:
        low, high = _span(what)
        raise DiffAccelError(
            f"No plan has {target:g} bits {'a weight' if kind == 'weight' else 'an activation'} on average; the layers "
            f"allow from {low:.2f} to {high:.2f}. Ask for more, or leave fewer layers alone."
        )
    return kept


def _budgets(what: Choosing, average: float, ratio: float) -> list[float] | None:
    """Return the budget of each group for a total average and a ratio; None where a group cannot have its own."""
    sizes = [what.size(names) for names in what.groups]
    averages = [average] if len(sizes) == 1 else group_budgets(average, ratio, float(sizes[0]), float(sizes[1]))
    for names, own in zip(what.groups, averages, strict=True):
        least, most = _ends(what, names)
        if own < least - 1e-9 or (own > most + 1e-9 and average < most - 1e-9):
            return None
    return [own * size for own, size in zip(averages, sizes, strict=True)]


def _middle(what: Choosing, average: float) -> float | None:
    """Return the ratio at which both groups are as far from their ends as may be; None for one group or no room."""
    if len(what.groups) != 2:
        return None
    first, second = (_ends(what, names) for names in what.groups)
    one, other = (what.size(names) for names in what.groups)
    total = average * (one + other)
    low, high = max(first[0], (total - other * second[1]) / one), min(first[1], (total - other * second[0]) / one)
    if low > high + 1e-9:
        return None
    budget = (low + high) / 2
    return budget * other / (total - budget * one)


def _solved(what: Choosing, budgets: Sequence[float]) -> list[BitPlan]:
    """Return the plan of each group, or that of all together where their costs are not bits."""
    solve = allocate_exactly if what.exact else allocate
    groups = what.groups if what.costs is None else [[name for names in what.groups for name in names]]
    return [solve(what.choices(names), budget) for names, budget in zip(groups, budgets, strict=True)]


def _ends(what: Choosing, names: Sequence[str]) -> tuple[float, float]:
    """Return the least and the largest mean bits that some layers may have."""
    low, high = (what.average({name: end(what.values[name]) for name in names}) for end in (min, max))
    return low, high


def _span(what: Choosing) -> tuple[float, float]:
    return _ends(what, [name for group in what.groups for name in group])


def uniform(names: Sequence[str], sizes: dict[str, int], allowed: Sequence[int], target: float) -> dict[str, int]:
    """Return the same bits for all layers; where the target lies between two, the first ones have more."""
    low = max((bits for bits in allowed if bits <= target), default=min(allowed))
    bits = dict.fromkeys(names, low)
    higher = [more for more in allowed if more > low]
    room = (target - low) * sum(sizes[name] for name in names)
    for name in names if higher else ():
        cost = (higher[0] - low) * sizes[name]
        if cost <= room + 1e-9:
            bits[name], room = higher[0], room - cost
    return bits
