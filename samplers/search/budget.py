"""Rules of a stage's budget: how many children it may try, and when it has found what it looked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol


class BudgetPolicy(Protocol):
    """A rule for one chain. A new one is a class with these three methods and an entry in :data:`RULES`."""

    def quota(self, stage: int) -> int:
        """Most children of the move from ``stage``."""
        ...

    def accepts(self, reward: float, best: float) -> bool:
        """Whether a child of that reward ends the stage, ``best`` being the highest that the chain was at."""
        ...

    def close(self, stage: int, left: int) -> None:
        """The stage ended with ``left`` of its quota unspent."""
        ...


@dataclass
class Rollover:
    """Rollover Budget Forcing (Kim et al., arXiv 2503.19385): go on at the first child that beats all before it, and
    take what is left of the quota along.

    Args:
        each: the quota of every stage.
        stages: how many moves there are.
        leftover: "next": all of it goes to the next stage; "spread": in equal parts to those that remain.
        cap: most that a stage takes over; -1 for no limit.
    """

    each: int
    stages: int
    leftover: str = "next"
    cap: int = -1
    carried: int = field(default=0, init=False)

    def quota(self, stage: int) -> int:
        share = self.carried
        if self.leftover == "spread":
            share //= self.stages - stage
        if self.cap >= 0:
            share = min(share, self.cap)
        self.carried -= share
        return self.each + share

    def accepts(self, reward: float, best: float) -> bool:
        return reward > best

    def close(self, stage: int, left: int) -> None:
        self.carried += left


@dataclass
class Threshold:
    """A verifier's threshold (after arXiv 2512.08985): go on at the first child that is good enough, whatever was seen
    before; what a stage leaves is not spent.

    Args:
        each: the quota of every stage.
        threshold: the reward that is good enough.
    """

    each: int
    threshold: float

    def quota(self, stage: int) -> int:
        return self.each

    def accepts(self, reward: float, best: float) -> bool:
        return reward >= self.threshold

    def close(self, stage: int, left: int) -> None:
        """Nothing is carried over."""


RULES: dict[str, Callable[..., BudgetPolicy]] = {
    "rollover": lambda config, each, stages: Rollover(each, stages, config.leftover, config.cap),
    "threshold": lambda config, each, stages: Threshold(each, config.threshold),
}
