"""The budget of a search by drafts: seconds of the whole call, or predictions of each picture."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from diffaccel.samplers.search.chains import Search


def now() -> float:
    """Return the time in seconds, from any beginning."""
    return time.perf_counter()


@dataclass(eq=False)
class Spending:
    """What rounds of drafts and their finish cost, and how much of it is left.

    Args:
        searches: one for each picture of the call.
        seconds: of all pictures together; 0 where the budget is in predictions.
        round: cost of a round, the largest so far, and ``finish`` that of finishing the best; seconds or predictions.
        latest: the largest of the rounds of this call alone.
    """

    searches: Sequence[Search]
    seconds: float = 0.0
    round: float = 0.0
    finish: float = 0.0
    latest: float = 0.0
    _start: float = field(default_factory=now)

    @property
    def spent(self) -> float:
        """Seconds since the start, or predictions of the picture that had the most."""
        return now() - self._start if self.seconds else float(max(search.ledger.nfe for search in self.searches))

    @property
    def limit(self) -> float:
        """The budget, in the unit of :attr:`spent`."""
        return self.seconds or float(self.searches[0].budget)

    @property
    def unit(self) -> str:
        """Unit of all costs."""
        return "s" if self.seconds else "NFE"

    def begin(self, spent: float = 0.0) -> None:
        """Start the clock, as if ``spent`` seconds had passed."""
        self._start = now() - spent

    def took(self, cost: float) -> None:
        """Note what a round cost."""
        self.latest, self.round = max(self.latest, cost), max(self.round, cost)

    def pays_for_round(self) -> bool:
        """Return whether one more round and the finish fit into what is left."""
        return self.spent + self.round + self.finish <= self.limit
