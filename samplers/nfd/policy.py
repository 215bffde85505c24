"""How many frames to draft: what a round of N frames brings, what it costs, and how often actions are held.

Where an action repeats with probability p, a round of N drafts keeps ``E = (1 - p^N) / (1 - p)`` frames on average;
with the cost ``c(N)`` relative to a round of one, the speed-up is ``E / c(N)``. At most it is ``1 / (1 - p)``.
"""

from __future__ import annotations

from collections.abc import Mapping

FIRST_GUESS, MEMORY = 0.8, 32  # of the repeat probability, and over how many frames it is averaged


def expected_kept(drafts: int, repeats: float) -> float:
    """Return the mean number of kept frames of a round: ``1 + p + ... + p^(N-1)``."""
    return sum(repeats**j for j in range(drafts))


def speedup(drafts: int, repeats: float, cost: float) -> float:
    """Return frames a time relative to rounds of one, where a round of ``drafts`` costs ``cost`` rounds of one."""
    return expected_kept(drafts, repeats) / cost


def longest_delay(steps: int, seconds_per_step: float) -> float:
    """Return the longest time from an action to its frame: the running step, then a round of ``steps`` steps."""
    return (steps + 1) * seconds_per_step


def best_drafts(seconds: Mapping[int, float], repeats: float, steps: int, latency: float | None) -> int:
    """Return the number of drafts with the most frames a second.

    Args:
        seconds: time of one step with each possible number of drafts.
        repeats: probability that the next action is the present one.
        steps: steps of a round.
        latency: longest allowed time in seconds from an action to its frame; None for no limit. Where even one draft
            takes longer, it is one.
    """
    allowed = [n for n, time in seconds.items() if latency is None or longest_delay(steps, time) <= latency]
    return max(allowed, key=lambda n: expected_kept(n, repeats) / seconds[n], default=min(seconds))


class HeldActions:
    """Running estimate of the probability that an action repeats."""

    def __init__(self) -> None:
        self.repeats, self.seen = FIRST_GUESS, 1

    def note(self, is_repeated: bool) -> None:
        """Take one more frame's action into account."""
        self.seen = min(self.seen + 1, MEMORY)
        self.repeats += (is_repeated - self.repeats) / self.seen
