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
        stage, stages: index of the stage and their number.
    """

    step: int
    steps: int
    skipped: int = 0
    real: int = 0
    stage: int = 0
    stages: int = 1


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
    """Real at the given steps: a pattern that was chosen beforehand (arXiv 2606.13496 searches for one).

    Of several stages each has this pattern, of which a short one makes the first part.

    Raises:
        DiffAccelError: for a step beyond those of a call of one stage.
    """

    real_steps: frozenset[int]

    def is_real(self, at: Place, look: Look) -> bool:
        if at.stages == 1:
            _check_reach(self.real_steps, at, "the call")
        return at.step in self.real_steps


@dataclass
class StageSteps(Decision):
    """Real at the given steps of each stage, which are counted from its beginning.

    Raises:
        DiffAccelError: for a call of another number of stages, and a step beyond those of its stage.
    """

    stages: tuple[frozenset[int], ...]

    @classmethod
    def of(cls, real_steps: Sequence[int]) -> StageSteps:
        """Return the decision of a list in which every 0 begins a stage, as records have it."""
        begins = [*(place for place, step in enumerate(real_steps) if step == 0), len(real_steps)]
        return cls(tuple(frozenset(real_steps[first:last]) for first, last in pairwise(begins)))

    def is_real(self, at: Place, look: Look) -> bool:
        if at.stages != len(self.stages):
            raise DiffAccelError(
                f"real_steps has steps of {len(self.stages)} stages, and the call has {at.stages}. Give each stage a "
                "list from its step 0 on, or one list for all."
            )
        _check_reach(self.stages[at.stage], at, f"stage {at.stage + 1} of the call")
        return at.step in self.stages[at.stage]


def _check_reach(real_steps: frozenset[int], at: Place, where: str) -> None:
    """Raise for a pattern that was made for more steps than there are."""
    if (last := max(real_steps)) >= at.steps:
        raise DiffAccelError(
            f"real_steps names step {last}, and {where} makes {at.steps}, from 0 to {at.steps - 1}. Leave out what "
            "lies beyond, or make more steps."
        )


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
