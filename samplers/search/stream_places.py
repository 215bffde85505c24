"""Which requests of a search are the same rows, step by step, for caches that keep what each row computed."""

from __future__ import annotations

from collections.abc import Sequence

from diffaccel.errors import DiffAccelError
from diffaccel.samplers.search.chains import Search
from diffaccel.samplers.search.particles import Transition
from diffaccel.session import StreamPlace

Row = tuple[Search, Transition]
Samples = tuple[tuple[int, int, int], ...]  # of every row the call's row, the chain and the attempt


class StreamPlaces:
    """Names the rows of network calls that follow the same samples from noise to their end.

    Names of rows that have ended are used again, so that a cache keeps no more than the rows that are on their way.
    """

    def __init__(self) -> None:
        self._names: dict[Samples, int] = {}
        self._next: dict[Samples, int] = {}

    def of(self, rows: Sequence[Row]) -> StreamPlace:
        """Return the place of the rows of one network call.

        Raises:
            DiffAccelError: for rows that did not come here together, one step after the other.
        """
        samples = tuple((search.row, transition.key.chain, transition.key.attempt) for search, transition in rows)
        search, first = rows[0]
        steps = search.plan.stages + search.plan.tail_nfe
        if first.parent is None:
            taken = set(self._names.values())
            self._names[samples] = next(name for name in range(len(taken) + 1) if name not in taken)
            self._next[samples] = 0
        step = self._next.get(samples)
        if step is None or any(transition.stage != step for _, transition in rows):
            raise DiffAccelError(
                "A cache cannot follow this search: the rows of a network call are not those of the step before. "
                "Use the search without a cache."
            )
        place = StreamPlace(str(self._names[samples]), step, steps)
        self._next[samples] = step + 1
        if step + 1 == steps:
            del self._names[samples], self._next[samples]
        return place
