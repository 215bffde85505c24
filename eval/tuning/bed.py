"""What a search runs on: something that draws and measures a plan, on some prompts or in turns with others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from diffaccel.runs.variant import Variant

Set = Literal["tuning", "held-out"]


@dataclass(frozen=True)
class Part:
    """Prompts ``start`` to ``stop`` of the tuning or of the held-out ones."""

    prompts: Set
    start: int
    stop: int

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"{self.prompts}-{self.start}-{self.stop}"


class Refused(Exception):
    """A plan does not run on this pipeline; the message says why."""


class TuningBed(Protocol):
    """Draws and measures plans. What it returns is JSON-ready and has ``spent``, the seconds that it took."""

    def baseline(self) -> Variant:
        """Return what all plans are compared with."""

    def baseline_values(self) -> dict[str, float]:
        """Return by metric what a gate compares of the baseline itself."""

    def evaluate(self, plan: Variant, part: Part) -> dict[str, Any]:
        """Draw a plan and the baseline, and measure the pairs.

        Returns:
            ``values``: by metric, a number of every prompt; ``cost``: by metric, a number; ``ratio``: the baseline's
            seconds over the plan's, of tuning prompts; ``spent``.

        Raises:
            Refused: for a plan that does not run.
        """

    def take_turns(self, plans: list[Variant], turns: int, part: Part) -> dict[str, Any]:
        """Time plans in turns with the baseline.

        Returns:
            ``plans``: by name, ``seconds`` a picture and ``ratio`` to the baseline with its interval, as
            :func:`diffaccel.eval.timing.turns.take_turns` has it, ``low`` and ``high`` null for fewer than 6 turns;
            ``baseline``: its seconds a picture; ``spent``.
        """
