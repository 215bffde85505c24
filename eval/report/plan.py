"""What a report on accelerations is about, and what came out of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from diffaccel.errors import DiffAccelError
from diffaccel.eval.comparison.gate import Gate
from diffaccel.eval.comparison.result import Comparison
from diffaccel.eval.comparison.row import Section
from diffaccel.runs.request import Request
from diffaccel.runs.variant import Variant

FAILED = "could_not_run"


@dataclass(frozen=True, kw_only=True)
class ReportPlan:
    """What to report on.

    Args:
        request: prompts, seeds, model, batch; every way draws the same pictures.
        baseline: the way that the others are compared with.
        accelerated: the others.
        everything: every registered method beside them, with its default options and the baseline's call settings.
        turns: timed calls of each way.
        other_seeds: draw the baseline with other seeds, for what chance alone does.
        equal_time: answer what the same wall time buys.
        extractors: networks for distances of distributions.
        judges: CLIPs for the fit to the prompts; the first judges what equal time buys.
        reward: the CLIP that chooses the best of several pictures; "" for no such question.
        reference: images, or a file of statistics, for distances from data; None for the baseline's own pictures.
    """

    request: Request
    baseline: Variant
    accelerated: tuple[Variant, ...] = ()
    everything: bool = False
    turns: int = 10
    other_seeds: bool = True
    equal_time: bool = True
    extractors: tuple[str, ...] = ("tiny",)
    judges: tuple[str, ...] = ()
    reward: str = ""
    reference: str | None = None

    def __post_init__(self) -> None:
        names = [self.baseline.name, *(variant.name for variant in self.accelerated)]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise DiffAccelError(f"'{twice}' is there twice. Take one out.")
        if not self.accelerated and not self.everything:
            raise DiffAccelError("There is nothing to compare with the baseline. Give an acceleration, or ask for all.")


@dataclass
class Made:
    """A report: the comparison, what is in ``report.json``, and which ways could not run, with why."""

    comparison: Comparison
    report: dict[str, Any]
    failed: dict[str, str] = field(default_factory=dict)

    def judged(self, rule: Gate | None, asked: Sequence[str]) -> tuple[bool, list[str]]:
        """Whether ``--fail-if`` holds for a run, and what was found of each; one that was asked for and could not run
        has not passed."""
        if rule is None:
            return False, []
        failed, said = False, []
        for run in self.comparison.runs:
            fails, sentences = rule.check(self.comparison.gate_values(run.name))
            failed |= fails
            said += [f"{run.name}: {'FAILED' if fails else 'passed'}: {sentence}" for sentence in sentences]
        for name in asked:
            if name in self.failed:
                failed = True
                said.append(f"{name}: FAILED: it could not run: {self.failed[name]}")
        return failed, said


def could_not_run(failed: dict[str, str]) -> Section:
    """The table of what was asked for and could not run on this model."""
    return Section(
        key=FAILED, title="Could not run", columns=("way", "why"), rows=tuple(failed.items()),
        note="Asked for, tried on this model, and left out of the tables above.", data={"failed": failed},
    )  # fmt: skip
