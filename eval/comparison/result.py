"""What a comparison found: rows, the numbers behind them, warnings, and tables beside them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from diffaccel import record
from diffaccel.eval.comparison import paired_scores as scored
from diffaccel.eval.comparison import text
from diffaccel.eval.comparison.row import Row, Section
from diffaccel.eval.sets.run import Pairs, Run

FORMAT = 2  # of report.json: 1 had pairs by short names, and no curves or steps


@dataclass(kw_only=True, repr=False, eq=False)
class Comparison:
    """What was measured.

    Attributes:
        baseline, runs: the pictures.
        pairs: by run, which of its pictures belongs to which of the baseline.
        rows: every metric of every run.
        values: by a row's key and run, a number a pair, in the order of ``pairs``; of scores the baseline's too.
        curves: by a row's key and run, the mean over videos of every frame.
        steps: by run, seconds of every network call.
        warnings: what a reader must know.
        sections: tables beside the metrics, in the report's order.
    """

    baseline: Run
    runs: list[Run]
    pairs: dict[str, Pairs]
    rows: list[Row]
    values: dict[str, dict[str, Tensor]]
    curves: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    steps: dict[str, list[float]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)

    def row(self, metric: str, run: str) -> Row | None:
        """One row."""
        return next((row for row in self.rows if (row.metric, row.run) == (metric, run)), None)

    def add(self, rows: Sequence[Row], values: dict[str, Tensor]) -> None:
        """Rows of one metric, and its number of every pair by run."""
        self.rows += rows
        self.values[rows[0].key] = values

    def of_pairs(self, row: Row) -> Tensor | None:
        """The row's number of every pair, in the order of ``pairs``; None where there are none."""
        return self.values.get(row.key, {}).get(row.run)

    def units(self, run: str) -> list[Any]:
        """What intervals draw, a label a pair of a run: its prompt, or the pair itself where there are no prompts."""
        return scored.units(self.baseline, self.pairs[run])

    def gate_values(self, run: str) -> dict[str, float | None]:
        """What ``--fail-if`` compares, by full name, and by short name where it means one row only."""
        rows = [row for row in self.rows if row.run == run]
        counts = Counter(row.metric for row in rows)
        short = {row.metric: row.gated for row in rows if counts[row.metric] == 1}
        return {row.key: row.gated for row in rows} | short

    def table(self) -> str:
        """Verdicts, every metric with its interval, and warnings, for a terminal."""
        return text.plain(self)

    def __repr__(self) -> str:
        return self.table()

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; numbers of single pairs included."""
        described = [
            {"name": run.name, "images": len(run), "settings": run.record.get("settings", {})}
            | {
                key: run.record[key]
                for key in ("fingerprint", "device", "versions", "started", "command")
                if key in run.record
            }
            for run in (self.baseline, *self.runs)
        ]
        return {
            "format": FORMAT,
            "made": record.now(),
            "versions": record.versions(),
            "baseline": self.baseline.name,
            "runs": described,
            "metrics": [row.to_dict() for row in self.rows],
            "pairs": _numbers(self.values),
            "curves": _numbers(self.curves),
            "steps": {run: [round(seconds, 6) for seconds in times] for run, times in self.steps.items() if times},
            "sections": {section.key: section.to_dict() for section in self.sections},
            "warnings": self.warnings,
        }


def _numbers(values: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, list[float | None]]]:
    """JSON-ready: what is infinite is null."""
    return {
        key: {run: [round(x, 6) if math.isfinite(x) else None for x in numbers.tolist()] for run, numbers in by.items()}
        for key, by in values.items()
    }
