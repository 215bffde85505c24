"""Successive halving over prompts: brackets of plans, of which the better half goes on to twice as many prompts.

A plan leaves a bracket when it surely breaks the promise, when another one that is no slower is surely closer to the
baseline on the same prompts, or when the others are the better half.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from diffaccel.errors import DiffAccelError
from diffaccel.eval.comparison.gate import Clause, Condition
from diffaccel.eval.tuning.bed import Part, Refused, Set, TuningBed
from diffaccel.eval.tuning.journal import Journal
from diffaccel.eval.tuning.rule import COST, Judgement, Promise, Samples
from diffaccel.eval.tuning.space import Params, TuningSpace
from diffaccel.eval.uncertainty.intervals import paired_difference
from diffaccel.runs.variant import Variant

_IDLE = 4  # brackets without a new plan, after which nothing new is expected
_BROKEN = 2  # refused plans of a method that never ran, after which it is left out
REFUSED = "refused"


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        rungs: numbers of tuning prompts, growing; a plan of the last rung has seen all of them.
        bracket: plans that begin together.
        held_out: prompts of the certificate.
        search: seconds of the search.
        turns: timed calls of each plan of the certificate.
    """

    rungs: tuple[int, ...]
    bracket: int
    held_out: int
    search: float
    turns: int = 8


@dataclass
class PlanEntry:
    """A plan and what is known of it on the tuning prompts."""

    params: Params
    variant: Variant
    parts: list[dict[str, Any]] = field(default_factory=list)
    refused: str = ""

    @property
    def name(self) -> str:
        """Its variant's word."""
        return self.variant.name

    @property
    def ratio(self) -> float:
        """The baseline's seconds over its own: median over parts."""
        return median(part["ratio"] for part in self.parts)

    @property
    def cost(self) -> float:
        """Its seconds over the baseline's."""
        return 1 / self.ratio

    @property
    def count(self) -> int:
        """Number of tuning prompts that it was drawn on."""
        return sum(part["count"] for part in self.parts)


@dataclass(eq=False)
class TuningSearch:
    """The search for plans, in a journal that it goes on from.

    Attributes:
        promise: what plans must keep.
        quality: the promise without seconds and the like, for the order of plans.
        entries: every plan that was tried, by name.
    """

    space: TuningSpace
    bed: TuningBed
    promise: Promise
    quality: Promise
    journal: Journal
    sizes: Sizes
    seed: int = 0
    progress: Callable[[str], None] = lambda text: None
    entries: dict[str, PlanEntry] = field(default_factory=dict)
    _judged: dict[tuple[str, int, bool], Judgement] = field(default_factory=dict)

    def run(self) -> None:
        """Try brackets until the seconds of the search are spent, or nothing new is found."""
        bracket = idle = 0
        while self.journal.begun(bracket) or not self._is_over(idle):
            known = len(self.entries)
            self._try_bracket(bracket)
            idle = idle + 1 if len(self.entries) == known else 0
            bracket += 1
        self.journal.once("brackets", lambda: bracket)

    def _is_over(self, idle: int) -> bool:
        ended = self.journal.get("brackets") is not None
        return ended or idle >= _IDLE or self.journal.spent() >= self.sizes.search

    def samples(self, entry: PlanEntry, count: int | None = None) -> Samples:
        """Return what was measured of a plan on the first ``count`` tuning prompts, or all that it has seen."""
        values = {
            metric: [number for part in entry.parts for number in part["values"][metric]][:count]
            for metric in entry.parts[0]["values"]
        }
        seconds = self.bed.baseline_values()["seconds"] * entry.cost
        return Samples(values, {**entry.parts[-1]["cost"], "seconds": seconds, "speedup": entry.ratio})

    def judge(self, entry: PlanEntry) -> Judgement:
        """Return how a plan stands to the promise on all tuning prompts that it has seen."""
        return self._judge(entry, self.promise)

    def quality_of(self, entry: PlanEntry) -> Judgement:
        """Return how near a plan's pictures are to the baseline's, in the gate's tolerance."""
        return self._judge(entry, self.quality)

    def _judge(self, entry: PlanEntry, promise: Promise) -> Judgement:
        key = (entry.name, entry.count, promise is self.quality)
        if key not in self._judged:
            self._judged[key] = promise.judge(self.samples(entry), seed=self.seed)
        return self._judged[key]

    def measured(self) -> list[PlanEntry]:
        """Return the plans that run here, the fastest first."""
        return sorted((e for e in self.entries.values() if e.parts and not e.refused), key=lambda e: (e.cost, e.name))

    def faster(self) -> list[PlanEntry]:
        """Return the plans that seem faster than the baseline, itself left out, the fastest first."""
        own = self.bed.baseline().name
        return [entry for entry in self.measured() if entry.cost < 1 and entry.name != own]

    def front(self) -> list[PlanEntry]:
        """Return the plans that no other one beats in both seconds and closeness, the fastest first."""
        best, front = -math.inf, []
        for entry in self.measured():
            margin = self.quality_of(entry).margin
            if margin > best:
                best = margin
                front.append(entry)
        return front

    def beside(self, entry: PlanEntry) -> list[PlanEntry]:
        """Return the plans one value away from another, measured or not."""
        broken, plans = self._broken(), []
        for params in self.space.neighbours(entry.params):
            try:
                variant = self.space.variant(params, broken)
            except DiffAccelError:
                continue  # options that do not fit together
            plans.append(self.entries.setdefault(variant.name, PlanEntry(params, variant)))
        return plans

    # -- one bracket --------------------------------------------------------------------------------------------------

    def _try_bracket(self, bracket: int) -> None:
        distributions = self.space.distributions()
        broken = self._broken()
        queue = self._queue(bracket, broken)  # the same after a stop
        trials = self.journal.ask(bracket, self.sizes.bracket, distributions, queue, self.seed)
        plans: dict[int, PlanEntry] = {}
        for number, params in trials:
            try:
                variant = self.space.variant(params, broken)
            except DiffAccelError:
                continue  # options that do not fit together
            plans[number] = self.entries.setdefault(variant.name, PlanEntry(params, variant))
        self._halve(list({entry.name: entry for entry in plans.values()}.values()))
        for number, _ in trials:
            entry = plans.get(number)
            if entry is None or entry.refused:
                self.journal.tell(number, None)
            else:
                self.journal.tell(number, entry.cost, 1 - self.quality_of(entry).margin, -self.judge(entry).margin)

    def _queue(self, bracket: int, broken: Sequence[str]) -> list[Params]:
        """Return points to try before the sampler is asked: the start's, later untried ones beside the best so far."""
        size, starts = self.sizes.bracket, self.space.starts()
        first = starts[bracket * size : (bracket + 1) * size]
        if first:
            return first
        untried: dict[str, Params] = {}
        keeping = [entry for entry in self.measured() if self.judge(entry).margin >= 0]
        for entry in keeping[:3]:
            for params in (*self.space.neighbours(entry.params), *self.space.exchanges(entry.params)):
                try:
                    name = self.space.variant(params, broken).name
                except DiffAccelError:
                    continue
                if name not in self.entries:
                    untried.setdefault(name, params)
        return list(untried.values())[: size // 2]

    def _broken(self) -> list[str]:
        """Return the methods that never ran, and were refused more than once."""
        counts: dict[str, int] = {}
        ran = {config.name for entry in self.measured() for config in entry.variant.methods}
        for entry in self.entries.values():
            for config in entry.variant.methods if entry.refused else ():
                counts[config.name] = counts.get(config.name, 0) + 1
        return [name for name, count in counts.items() if count >= _BROKEN and name not in ran]

    def _halve(self, alive: list[PlanEntry]) -> None:
        for count in self.sizes.rungs:
            for entry in alive:
                self.measure(entry, count)
            alive = self._survivors([entry for entry in alive if not entry.refused], count)

    def _survivors(self, alive: list[PlanEntry], count: int) -> list[PlanEntry]:
        """Return the better half of some plans that were all drawn on ``count`` prompts."""
        hopeful = [entry for entry in alive if self.judge(entry).hopeful >= 0]
        rivals = [entry for entry in self.front() if entry.count >= count]
        unbeaten = [e for e in hopeful if not any(self._beats(rival, e, count) for rival in rivals if rival is not e)]
        margins = {entry.name: self.quality_of(entry).margin for entry in unbeaten}
        ranks = {
            entry.name: sum(o.cost <= entry.cost and margins[o.name] > margins[entry.name] for o in unbeaten)
            for entry in unbeaten
        }
        unbeaten.sort(key=lambda entry: (ranks[entry.name], entry.cost))
        return unbeaten[: max(1, math.ceil(len(alive) / 2))]

    def _beats(self, first: PlanEntry, second: PlanEntry, count: int) -> bool:
        """Return whether one plan is no slower than another and surely closer to the baseline on the same prompts."""
        if first.cost > second.cost:
            return False
        a, b = self.samples(first, count).values, self.samples(second, count).values
        for clause in clauses(self.quality.gate.condition):
            pairs = [
                pair for pair in zip(a[clause.metric], b[clause.metric], strict=True) if all(map(math.isfinite, pair))
            ]
            if len(pairs) < 2:
                return False
            sign = 1 if clause.op[0] == "<" else -1
            x, y = ([sign * value for value in values] for values in zip(*pairs, strict=True))
            if sum(x) <= sum(y) or paired_difference(x, y, seed=self.seed).interval.low <= 0:
                return False
        return True

    # -- measuring ----------------------------------------------------------------------------------------------------

    def measure(self, entry: PlanEntry, count: int) -> bool:
        """Draw a plan on tuning prompts up to ``count``; return whether it runs here."""
        for stop in self.sizes.rungs:
            if not entry.refused and entry.count < stop <= count:
                part = Part("tuning", entry.count, stop)
                self.progress(f"{entry.name} on {part.name}")
                result = self.evaluate(entry.variant, part)
                entry.refused = result.get(REFUSED, "")
                if not entry.refused:
                    entry.parts.append({**result, "count": stop - part.start})
        return not entry.refused

    def evaluate(self, variant: Variant, part: Part) -> dict[str, Any]:
        """Return what the bed measures of a plan on a part, once; or why it refuses."""

        def draw() -> dict[str, Any]:
            try:
                return self.bed.evaluate(variant, part)
            except Refused as error:
                return {REFUSED: str(error), "spent": 0.0}

        return self.journal.once(f"{variant.name} on {part.name}", draw)

    def held_out(self, entry: PlanEntry, block: int = 16) -> Samples | None:
        """Draw a plan on the held-out prompts, a block after the other; None where it is refused there."""
        parts = _blocks("held-out", self.sizes.held_out, block)
        results = []
        for part in parts:
            self.progress(f"{entry.name} on {part.name}")
            results.append(self.evaluate(entry.variant, part))
            if results[-1].get(REFUSED):
                return None
        values = {
            metric: [n for result in results for n in result["values"][metric]] for metric in results[0]["values"]
        }
        return Samples(values, dict(results[-1]["cost"]))


def clauses(condition: Condition) -> list[Clause]:
    """Return the clauses of a condition about metrics of prompts."""
    if isinstance(condition, Clause):
        return [] if condition.metric in COST else [condition]
    return [clause for part in condition.parts for clause in clauses(part)]


def _blocks(prompts: Set, count: int, block: int) -> list[Part]:
    return [Part(prompts, start, min(start + block, count)) for start in range(0, count, block)]
