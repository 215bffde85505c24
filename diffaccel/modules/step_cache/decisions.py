"""Decisions by the number of the step alone: a fixed set, every n-th, a growing window."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from diffaccel.errors import DiffAccelError


@dataclass
class Place:
    """Where a stream of calls stands.

    Attributes:
        step, steps: the step and their number, within the stage.
        skipped: number of steps skipped since the last real one.
        real: number of real steps before this one.
        stage: index of the stage.
    """

    step: int
    steps: int
    skipped: int = 0
    real: int = 0
    stage: int = 0


Look = Callable[[], Tensor]


class Decision:
    """Says of one stream of network calls, in their order, which are real; each stream has an instance of its own."""

    def is_real(self, at: Place, look: Look) -> bool:
        """Return whether the blocks run at this step.

        Args:
            look: returns the indicator of this step, for decisions that depend on data.
        """
        raise NotImplementedError


@dataclass
class FixedSteps(Decision):
    """Real at the given steps: a pattern that was chosen beforehand (arXiv 2606.13496 searches for one)."""

    real_steps: frozenset[int]

    def is_real(self, at: Place, look: Look) -> bool:
        return at.step in self.real_steps


@dataclass
class StageSteps(Decision):
    """Real at the given steps of each stage, which are counted from its beginning.

    Raises:
        DiffAccelError: in a stage for which no steps are given.
    """

    stages: tuple[frozenset[int], ...]

    @classmethod
    def of(cls, real_steps: Sequence[int]) -> StageSteps:
        """Return the decision of a list in which every 0 begins a stage, as records have it."""
        begins = [*(place for place, step in enumerate(real_steps) if step == 0), len(real_steps)]
        return cls(tuple(frozenset(real_steps[first:last]) for first, last in pairwise(begins)))

    def is_real(self, at: Place, look: Look) -> bool:
        if at.stage >= len(self.stages):
            raise DiffAccelError(
                f"real_steps has steps of {len(self.stages)} stages, and the call has more. Give each stage a list "
                "from its step 0 on, or one list for all."
            )
        return at.step in self.stages[at.stage]


@dataclass
class EveryNth(Decision):
    """Real at the first ``warmup`` steps and at every ``interval``-th from the last of them on (arXiv 2503.06923)."""

    interval: int
    warmup: int

    def is_real(self, at: Place, look: Look) -> bool:
        return at.step < self.warmup or (at.step - self.warmup + 1) % self.interval == 0


@dataclass
class GrowingWindow(Decision):
    """Real at the first ``warmup`` steps, then once in a window that grows with every real step (arXiv 2603.01623).

    A step is real when ``(s + 1) mod floor(n) = 0`` for ``s`` steps skipped since the last real one; ``n`` begins at
    ``window`` and grows by ``growth`` after each real step that follows the warm-up.
    """

    window: float
    growth: float
    warmup: int

    def is_real(self, at: Place, look: Look) -> bool:
        if at.step < self.warmup:
            return True
        is_real = (at.skipped + 1) % max(1, int(self.window)) == 0
        if is_real:
            self.window += self.growth
        return is_real
