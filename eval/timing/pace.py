"""How long turns take: what is left of them, and which calls are so slow on a CPU that fewer tell enough."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

LONG_CALL = 5.0  # seconds; on a CPU one such call warms up as much as three
SLOW_CALL = 20.0  # seconds; no shorter call is slow: other work on the machine makes short ones look so
SLOW, SLOW_TURNS = 5.0, 2  # a way that takes so many times as long as the first one is timed in so many turns
ANNOUNCED = 15.0  # seconds of a call that is announced by a line of its own


class Pace:
    """Times of the calls so far, by the name of their way.

    Args:
        names: of all ways, the baseline first.
        turns, warm_up: calls of each way, timed and before them.
        spares: leave out calls that tell little: on a CPU a second warm-up after a long call, and of a slow way all
            warm-ups and all turns but the first ones.
        expected: seconds of a call of some ways, as they were drawn.
    """

    def __init__(
        self, names: Sequence[str], turns: int, warm_up: int, *, spares: bool, expected: Mapping[str, float]
    ) -> None:
        self.names, self.turns, self.warm_up, self.spares, self.expected = names, turns, warm_up, spares, expected
        self._seconds: dict[str, list[float]] = {name: [] for name in names}

    def took(self, name: str, seconds: float) -> None:
        """Note a call."""
        self._seconds[name].append(seconds)

    def seconds(self, name: str) -> float | None:
        """Return what a call of a way takes; None where that is not known yet."""
        own = self._seconds[name]
        return median(own[-3:]) if own else self.expected.get(name)

    def is_due(self, name: str, turn: int) -> bool:
        """Return whether a way is called in a turn; those before turn 0 warm up."""
        own, known = self._seconds[name], self.seconds(name)
        if not self.spares or known is None:
            return True
        if turn < 0:
            return not self.is_slow(name) and (not own or own[-1] < LONG_CALL)
        return turn < SLOW_TURNS or not self.is_slow(name)

    def is_slow(self, name: str) -> bool:
        """Return whether a way is so much slower than the baseline that few turns tell so."""
        known, base = self.seconds(name), self.seconds(self.names[0])
        return self.spares and None not in (known, base) and known >= max(SLOW_CALL, SLOW * base)  # type: ignore[operator]

    def left(self, turn: int) -> float | None:
        """Return the seconds from a turn to the last one; None where a way was never called."""
        if any(self.seconds(name) is None for name in self.names):
            return None
        total = 0.0
        for name in self.names:
            is_slow = self.is_slow(name)
            warm = 1 if self.spares and (self.seconds(name) or 0.0) >= LONG_CALL else self.warm_up
            warm, timed = (0, min(SLOW_TURNS, self.turns)) if is_slow else (warm, self.turns)
            warm_left, timed_left = max(0, warm - (turn + self.warm_up)), timed - max(0, turn)
            total += (self.seconds(name) or 0.0) * (warm_left + max(0, timed_left))
        return total

    def text(self, turn: int) -> str:
        """Return which turn begins, and how long the rest takes where that is known and not short."""
        now = f"warm-up {turn + self.warm_up + 1} of {self.warm_up}" if turn < 0 else f"turn {turn + 1} of {self.turns}"
        left = self.left(turn)
        return now if left is None or left < ANNOUNCED else f"{now}, about {duration(left)} left"

    def announcement(self, name: str) -> str:
        """Return a line for a call that takes long; "" for another."""
        known = self.seconds(name)
        return f"  {name}, about {duration(known)}" if known is not None and known >= ANNOUNCED else ""


def duration(seconds: float) -> str:
    """Return a length of time in words: "40 s", "12 min", "3 h 20 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
