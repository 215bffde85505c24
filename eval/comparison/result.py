"""The result of a comparison: rows, the values of every pair behind them, warnings, and tables beside them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from diffaccel import record
from diffaccel.eval.comparison import text
from diffaccel.eval.comparison.paired_scores import cluster_labels
from diffaccel.eval.comparison.row import Row, Section
from diffaccel.eval.sets.run import Pairs, Run

FORMAT = 2  # of report.json: 1 had pairs by short names, and no curves or steps


@dataclass(kw_only=True, repr=False, eq=False)
class Comparison:
    """Everything that was measured of runs against a baseline.

    Attributes:
        baseline, runs: the runs that were compared.
        pairs: by run, which of its pictures belongs to which of the baseline.
        rows: every metric of every run.
        values: by a row's key and run, the value of every pair, in the order of ``pairs``; scores have the baseline's
            own values too.
        curves: by a row's key and run, the mean over videos at every frame.
        steps: by run, seconds of every network call.
        warnings: sentences that a reader of the numbers must know.
        reference: a sentence on the reference of distributions where one was taken that was not asked for; else "".
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
    reference: str = ""
    sections: list[Section] = field(default_factory=list)

    def row(self, metric: str, run: str) -> Row | None:
        """Return the row of a metric and a run; None where there is none."""
        return next((row for row in self.rows if (row.metric, row.run) == (metric, run)), None)

    def add(self, rows: Sequence[Row], values: dict[str, Tensor]) -> None:
        """Add the rows of one metric, and by run its value of every pair."""
        self.rows += rows
        self.values[rows[0].key] = values

    def pair_values(self, row: Row) -> Tensor | None:
        """Return a row's value of every pair, in the order of ``pairs``; None where it has none."""
        return self.values.get(row.key, {}).get(row.run)

    def clusters(self, run: str) -> list[Any]:
        """Return a cluster label for every pair of a run: see :func:`cluster_labels`."""
        return cluster_labels(self.baseline, self.pairs[run])

    def gate_values(self, run: str) -> dict[str, float | None]:
        """Return the numbers that ``--fail-if`` compares, by full name, and by short name where one row has it."""
        return {name: row.gate_value for name, row in self._named_rows(run).items()}

    def reasons(self, run: str) -> dict[str, str]:
        """Return by the same names why there is no number."""
        return {name: row.missing for name, row in self._named_rows(run).items() if row.missing}

    def gate_differences(self, run: str) -> set[str]:
        """Return those names whose number is a difference to the baseline."""
        return {name for name, row in self._named_rows(run).items() if row.delta is not None}

    def _named_rows(self, run: str) -> dict[str, Row]:
        rows = [row for row in self.rows if row.run == run]
        counts = Counter(row.metric for row in rows)
        return {row.key: row for row in rows} | {row.metric: row for row in rows if counts[row.metric] == 1}

    def table(self) -> str:
        """Return verdicts, every metric with its interval, and warnings, as text for a terminal."""
        return text.plain(self)

    def __repr__(self) -> str:
        return self.table()

    def to_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON-ready values, those of single pairs included."""
        runs = [
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
            "runs": runs,
            "metrics": [row.to_dict() for row in self.rows],
            "pairs": _numbers(self.values),
            "curves": _numbers(self.curves),
            "steps": {run: [round(seconds, 6) for seconds in times] for run, times in self.steps.items() if times},
            "sections": {section.key: section.to_dict() for section in self.sections},
            "reference": self.reference,
            "warnings": self.warnings,
        }


def _numbers(values: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, list[float | None]]]:
    """Round values to JSON-ready numbers; an infinite one is null."""
    return {
        key: {
            run: [round(number, 6) if math.isfinite(number) else None for number in tensor.tolist()]
            for run, tensor in by_run.items()
        }
        for key, by_run in values.items()
    }
