"""Plan of a report on accelerations, and the report that comes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from diffaccel.errors import DiffAccelError
from diffaccel.eval.comparison.gate import Gate, check_runs
from diffaccel.eval.comparison.result import Comparison
from diffaccel.eval.comparison.row import Section
from diffaccel.runs.request import Request
from diffaccel.runs.variant import Variant

FAILED = "could_not_run"


@dataclass(frozen=True, kw_only=True)
class ReportPlan:
    """Settings of a report on accelerations.

    Args:
        request: prompts, seeds, model, batch; every variant draws the same pictures.
        baseline: the variant that the others are compared with.
        accelerated: the others.
        everything: compare every registered method too, with default options (stages once for each preset, diffusers'
            caches once for each kind) and the baseline's call settings.
        searches: whether methods that draw many pictures for one are among them.
        turns: timed calls of each variant.
        batches: pictures in a call that every variant is timed with as well as with the request's own number.
        other_seeds: draw the baseline with other seeds too, as the noise floor of every metric.
        equal_time: answer what the same wall time buys.
        extractors: networks for distances of distributions; None for that of the statistics that ship for a zoo model,
            else "tiny".
        judges: CLIPs for the fit to the prompts; the first judges what equal time buys.
        reward: the CLIP that chooses the best of several pictures; "" for no such question.
        reference: images, or a file of statistics, for distances from data; "none" for the baseline's own pictures;
            None for the statistics that ship for a zoo model where extractors are not named, else its own pictures.
    """

    request: Request
    baseline: Variant
    accelerated: tuple[Variant, ...] = ()
    everything: bool = False
    searches: bool = True
    turns: int = 10
    batches: tuple[int, ...] = ()
    other_seeds: bool = True
    equal_time: bool = True
    extractors: tuple[str, ...] | None = None
    judges: tuple[str, ...] = ()
    reward: str = ""
    reference: str | None = None

    def __post_init__(self) -> None:
        names = [self.baseline.name, *(variant.name for variant in self.accelerated)]
        if duplicate := next((name for name in names if names.count(name) > 1), None):
            raise DiffAccelError(f"'{duplicate}' is there twice. Take one out.")
        if wrong := [batch for batch in self.batches if batch < 1]:
            raise DiffAccelError(f"A call of {wrong[0]} pictures cannot be timed. Give 1 or more.")
        if not self.accelerated and not self.everything:
            raise DiffAccelError("There is nothing to compare with the baseline. Give an acceleration, or ask for all.")


@dataclass
class AccelerationReport:
    """A report that was made.

    Attributes:
        comparison: what was measured.
        report: what is in ``report.json``.
        failures: by name, why an acceleration could not run.
    """

    comparison: Comparison
    report: dict[str, Any]
    failures: dict[str, str] = field(default_factory=dict)

    def check_gate(self, gate: Gate | None, requested: Sequence[str]) -> tuple[bool, list[str]]:
        """Return whether ``--fail-if`` fails, and a sentence on every clause and run.

        An acceleration that was requested and could not run has not passed.
        """
        if gate is None:
            return False, []
        failed, sentences = check_runs(gate, self.comparison)
        for name in requested:
            if name in self.failures:
                failed = True
                sentences.append(f"{name}: FAILED: it could not run: {self.failures[name]}")
        return failed, sentences


def failures_section(failures: dict[str, str]) -> Section:
    """Tabulate the accelerations that were asked for and could not run on this model."""
    return Section(
        key=FAILED, title="Could not run", columns=("way", "why"), rows=tuple(failures.items()),
        note="Asked for, tried on this model, and left out of the tables above.", data={"failed": failures},
    )  # fmt: skip
