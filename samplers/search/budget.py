"""Budget rules: how many children a stage may try, and which child ends it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol


class BudgetPolicy(Protocol):
    """A budget rule for one chain. A new one is a class with these three methods and an entry in :data:`RULES`."""

    def quota(self, stage: int) -> int:
        """Return the maximum number of children of the transition from ``stage``."""
        ...

    def accepts(self, reward: float, best: float) -> bool:
        """Return whether a child of that reward ends the stage; ``best`` is the chain's highest reward so far."""
        ...

    def close(self, stage: int, unspent: int) -> None:
        """Take note that the stage ended with ``unspent`` tries of its quota."""
        ...


@dataclass
class Rollover:
    """Rollover Budget Forcing (Kim et al., arXiv 2503.19385): accept the first child that beats the best so far, and
    carry the rest of the quota over.

    Args:
        base_quota: quota of every stage, before what is carried over.
        stages: number of transitions.
        leftover: "next": all unspent tries go to the next stage; "spread": in equal parts to the remaining ones.
        cap: maximum number of tries carried over to one stage; -1 for no limit.
    """

    base_quota: int
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
        return self.base_quota + share

    def accepts(self, reward: float, best: float) -> bool:
        return reward > best

    def close(self, stage: int, unspent: int) -> None:
        self.carried += unspent


@dataclass
class Threshold:
    """A verifier's threshold (after arXiv 2512.08985): accept the first child whose reward reaches it, whatever came
    before; unspent tries are dropped.

    Args:
        base_quota: quota of every stage.
        threshold: the reward that is good enough.
    """

    base_quota: int
    threshold: float

    def quota(self, stage: int) -> int:
        return self.base_quota

    def accepts(self, reward: float, best: float) -> bool:
        return reward >= self.threshold

    def close(self, stage: int, unspent: int) -> None:
        """Carry nothing over."""


RULES: dict[str, Callable[..., BudgetPolicy]] = {
    "rollover": lambda config, base_quota, stages: Rollover(base_quota, stages, config.leftover, config.cap),
    "threshold": lambda config, base_quota, stages: Threshold(base_quota, config.threshold),
}


def shares(total: int, chains: int, rounds: int) -> list[list[int]]:
    """Split tries among the rounds of chains, the first axis: evenly, what does not divide spread over the rounds."""
    each, rest = divmod(total, chains * rounds)
    extra = [rest // chains + (chain < rest % chains) for chain in range(chains)]
    return [[each + (k + 1) * more // rounds - k * more // rounds for k in range(rounds)] for more in extra]
