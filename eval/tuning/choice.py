"""Which plans of a search are certified: the fastest that keeps the promise, and slower ones that are nearer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffaccel.eval.tuning.bed import Part
from diffaccel.eval.tuning.halving import PlanEntry, TuningSearch
from diffaccel.eval.tuning.journal_shapes import TURNS
from diffaccel.eval.tuning.rule import with_timing
from diffaccel.eval.uncertainty.intervals import LEAST_TURNS

FAST, BALANCED, QUALITY = "fast", "balanced", "quality"
NAMES = (QUALITY, BALANCED, FAST)  # in the order of the certificate's tests: the safest first
_SHORTLIST = 3
_TRIES = 8  # as many plans' tuning prompts may be drawn to find those that keep the promise
_CLIMBS = 3
_TURNS = 4


def choose(search: TuningSearch, *, best_within_time: bool = False) -> dict[str, PlanEntry]:
    """Choose up to three plans by the tuning prompts alone, the safest first; the last is the one that is aimed at.

    "fast" is the fastest plan that keeps the promise with its whole interval; "balanced" and "quality" are at least as
    fast as two thirds and a third of its speed-up (of the logarithm), and nearer to the baseline.

    With ``best_within_time`` the aim is "quality": the plan nearest to the baseline that keeps the promise, its seconds
    with their interval; those before it have more room to the limits. A single one is "fast" either way.
    """
    shortlist = _keepers(search, best_within_time)
    if not shortlist:
        return {}
    chosen = _within_time(search, shortlist) if best_within_time else _safest_first(search, shortlist)
    search.journal.once("chosen", lambda: {name: entry.name for name, entry in chosen.items()})
    return chosen


def _safest_first(search: TuningSearch, shortlist: Sequence[PlanEntry]) -> dict[str, PlanEntry]:
    """Return the fastest plan, and before it slower ones that are nearer to the baseline."""
    fast = _fastest(search, shortlist)
    chosen = {FAST: fast}
    for name, power in ((BALANCED, 2 / 3), (QUALITY, 1 / 3)):
        safer = _safer(search, fast, fast.ratio**power, list(chosen.values()))
        if safer is not None:
            chosen[name] = safer
    return {name: chosen[name] for name in sorted(chosen, key=NAMES.index)}


def _fastest(search: TuningSearch, shortlist: Sequence[PlanEntry]) -> PlanEntry:
    """Return the plan with the greatest speed-up in turns with the baseline."""
    if len(shortlist) == 1:
        return shortlist[0]
    plans = turns_of(search, shortlist, _TURNS, "shortlist")["plans"]
    return max(shortlist, key=lambda entry: plans[entry.name]["ratio"]["value"])


def _within_time(search: TuningSearch, shortlist: Sequence[PlanEntry]) -> dict[str, PlanEntry]:
    """Return the first plan that keeps the promise with its whole interval of seconds, and safer ones before it."""
    timing = turns_of(search, shortlist, LEAST_TURNS, "shortlist")
    judged = {}
    for entry in shortlist:
        time = {**timing["plans"][entry.name], "baseline_seconds": timing["baseline"]}
        judged[entry.name] = search.promise.judge(with_timing(search.samples(entry), time), seed=search.seed)
    keepers = [entry for entry in shortlist if judged[entry.name].keeps]
    if not keepers:
        return {FAST: max(shortlist, key=lambda entry: judged[entry.name].safe)}
    front: list[PlanEntry] = []
    for entry in sorted(keepers, key=lambda entry: -judged[entry.name].safe):
        if not front or keepers.index(entry) < keepers.index(front[-1]):  # nearer to the baseline
            front.append(entry)
    plans = [front[place] for place in sorted({0, len(front) // 2, len(front) - 1})]
    names = {1: (FAST,), 2: (FAST, QUALITY), 3: (FAST, BALANCED, QUALITY)}[len(plans)]
    return dict(zip(names, plans, strict=True))


def turns_of(search: TuningSearch, entries: Sequence[PlanEntry], turns: int, key: str) -> dict[str, Any]:
    """Return the timing of plans in turns with the baseline, measured once under a key."""
    search.progress(f"timing of the {key}")
    part = Part("tuning", 0, search.sizes.rungs[0])
    variants = [entry.variant for entry in entries]
    timing = search.journal.once(f"{TURNS}{key}", lambda: search.bed.take_turns(variants, turns, part))
    if missing := next((entry.name for entry in entries if entry.name not in timing["plans"]), None):
        raise search.journal.damaged(f"{TURNS}{key}.plans.{missing}")
    return timing


def _keepers(search: TuningSearch, best_within_time: bool) -> list[PlanEntry]:
    """Return up to three plans that keep the promise on all tuning prompts, the best first."""
    likely = [entry for entry in search.faster() if search.judge(entry).margin >= 0]
    if best_within_time:
        likely.sort(key=lambda entry: -search.quality_of(entry).margin)
    keepers: list[PlanEntry] = []
    most = 2 * _SHORTLIST if best_within_time else _SHORTLIST
    rungs, left = search.sizes.rungs, _TRIES * search.sizes.rungs[-1]
    for entry in likely:
        for rung in rungs:
            left -= max(0, rung - entry.count)
            if left < 0 or not search.measure(entry, rung) or search.judge(entry).margin < 0:
                break
        else:
            if search.judge(entry).keeps:
                keepers.append(entry)
        if len(keepers) == most or left < 0:
            break
    if not keepers:  # too few prompts to be sure: the held-out ones, which are more, may tell
        likely = [entry for entry in search.faster() if search.judge(entry).margin >= 0]
        return sorted(likely, key=lambda entry: -search.judge(entry).safe)[:1]
    return keepers if best_within_time else _climb(search, keepers)


def _climb(search: TuningSearch, keepers: list[PlanEntry]) -> list[PlanEntry]:
    """Go from the fastest keeper to a faster one that is one value away and keeps the promise too, until none does."""
    keepers = sorted(keepers, key=lambda entry: entry.cost)[:_SHORTLIST]
    for _ in range(_CLIMBS if keepers else 0):
        best = keepers[0]
        for entry in search.beside(best):
            if entry.name == search.bed.baseline().name:
                continue
            if _keeps_to_the_end(search, entry, best.cost):
                keepers = [entry, *keepers][:_SHORTLIST]
                break
        else:
            break
    return keepers


def _keeps_to_the_end(search: TuningSearch, entry: PlanEntry, most: float) -> bool:
    """Return whether a plan costs less than ``most`` and keeps the promise on all tuning prompts."""
    for rung in search.sizes.rungs:
        if not search.measure(entry, rung) or search.judge(entry).margin < 0 or entry.cost >= most:
            return False
    return search.judge(entry).keeps


def _safer(search: TuningSearch, fast: PlanEntry, least_ratio: float, others: Sequence[PlanEntry]) -> PlanEntry | None:
    """Return the plan nearest to the baseline among those at least so fast; None where no such plan is nearer.

    Methods on the weights are those of the fast plan, so that quality can be switched without converting weights.
    """
    nearest = max(search.quality_of(entry).safe for entry in others)
    for _ in range(2):  # a second time where it turns out worse on all prompts
        candidates = [
            entry
            for entry in search.faster()
            if least_ratio <= entry.ratio < fast.ratio and weights(entry) == weights(fast) and entry not in others
        ]
        if not candidates:
            return None
        best = max(candidates, key=lambda entry: (search.quality_of(entry).margin, entry.ratio))
        search.measure(best, search.sizes.rungs[-1])
        if not best.refused and search.judge(best).keeps and search.quality_of(best).safe > nearest:
            return best
    return None


def weights(entry: PlanEntry) -> list[dict[str, Any]]:
    """Return the options of a plan's methods on the weights."""
    return [config.to_dict() for config in entry.variant.methods if config.touches == "weights"]
