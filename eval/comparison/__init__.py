"""Runs against a baseline: every metric that can be measured, with its interval, beside what chance alone does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from diffaccel import record
from diffaccel.errors import DiffAccelError
from diffaccel.eval.comparison import alignment, cost, distribution, fidelity
from diffaccel.eval.comparison.row import Row
from diffaccel.eval.comparison.section import Section
from diffaccel.eval.extractors.base import Extractor
from diffaccel.eval.extractors.clip import ClipExtractor
from diffaccel.eval.images import Source
from diffaccel.eval.runs import Pairs, Run, first_pictures, pair, pair_prompts, same_noise

FORMAT = 1


@dataclass(kw_only=True, repr=False, eq=False)
class Comparison:
    """What was measured.

    Attributes:
        baseline, runs: the pictures.
        pairs: by run, which of its pictures belongs to which of the baseline.
        rows: every metric of every run.
        values: by metric and run, a number a pair in the baseline's order.
        warnings: what a reader must know.
        sections: tables beside the metrics, in the report's order.
    """

    baseline: Run
    runs: list[Run]
    pairs: dict[str, Pairs]
    rows: list[Row]
    values: dict[str, dict[str, Tensor]]
    warnings: list[str] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)

    def row(self, metric: str, run: str) -> Row | None:
        """One row."""
        return next((row for row in self.rows if (row.metric, row.run) == (metric, run)), None)

    def gate_values(self, run: str) -> dict[str, float | None]:
        """What ``--fail-if`` compares, by short and by full name."""
        rows = [row for row in self.rows if row.run == run]
        return {row.key: row.gated for row in rows} | {row.metric: row.gated for row in rows}

    def table(self) -> str:
        """Verdicts, every metric with its interval, and warnings, for a terminal."""
        from diffaccel.eval.report import text

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
            "pairs": {
                metric: {
                    run: [round(v, 6) if abs(v) < float("inf") else None for v in values.tolist()]
                    for run, values in by.items()
                }
                for metric, by in self.values.items()
            },
            "sections": {section.key: section.to_dict() for section in self.sections},
            "warnings": self.warnings,
        }


def compare_runs(
    baseline: Run,
    runs: Sequence[Run],
    *,
    others: Run | None = None,
    distances: Sequence[fidelity.Distance] = fidelity.BUILT_IN,
    extractors: Sequence[Extractor] = (),
    clips: Sequence[ClipExtractor] = (),
    reference: Source | None = None,
    timing: dict[str, Any] | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Comparison:
    """Measure every run against the baseline, on the first pictures where one of them stopped early.

    Args:
        baseline: what the others are compared with.
        runs: at least one, of the same prompts and seeds.
        others: the baseline with other seeds: the noise floor of every metric.
        distances: of paired pictures; PSNR and SSIM need no network.
        extractors: for distances of distributions.
        clips: for the fit to prompts, which the runs must know.
        reference: what distributions are compared with; the baseline's own pictures when there is none.
        timing: turns on one machine; without it seconds are the runs' own.
        progress: told what is measured now.

    Raises:
        DiffAccelError: for no run, two of one name, or runs that are not paired.
    """
    names = [baseline.name, *(run.name for run in runs)]
    if not runs:
        raise DiffAccelError("There is no run to compare with the baseline. Give at least one.")
    if len(set(names)) < len(names):
        raise DiffAccelError(f"Two runs are called {next(n for n in names if names.count(n) > 1)!r}. Rename a folder.")
    baseline, runs, others, said = first_pictures(baseline, runs, others)
    pairs = {run.name: pair(baseline, run) for run in runs}
    warnings = said + _warnings(baseline, runs, pairs)
    found = Comparison(baseline=baseline, runs=list(runs), pairs=pairs, rows=[], values={}, warnings=warnings)
    floors = _floors(baseline, others, distances)
    for run in runs:
        progress(f"{run.name}: pairs")
        for distance, numbers in fidelity.measure(baseline, run, pairs[run.name], distances):
            floor = floors.get(distance.metric)
            found.rows.append(fidelity.row(run, distance, numbers, clusters=baseline.prompts, floor=floor))
            found.values.setdefault(distance.metric, {})[run.name] = numbers
    for clip in clips:
        progress(f"fit to the prompts by {clip.name}")
        more, scores = alignment.rows(baseline, runs, pairs, others, clip)
        found.rows += more
        found.values[more[0].key] = scores
    for extractor in extractors:
        progress(f"distributions by {extractor.name}")
        found.rows += distribution.rows(baseline, runs, others, reference, extractor)
    found.rows += cost.rows(baseline, list(runs), timing)
    return found


def _floors(baseline: Run, others: Run | None, distances: Sequence[fidelity.Distance]) -> dict[str, float]:
    """Every distance between the baseline and itself with other seeds."""
    if others is None:
        return {}
    measured = fidelity.measure(baseline, others, pair_prompts(baseline, others), distances)
    return {
        distance.metric: float(numbers[numbers.isfinite()].mean())
        for distance, numbers in measured
        if numbers.isfinite().any()
    }


def _warnings(baseline: Run, runs: Sequence[Run], pairs: dict[str, Pairs]) -> list[str]:
    said = [f"{run.name}: {text}" for run in (baseline, *runs) for text in run.source.warnings]
    for run in runs:
        if same_noise(baseline, run, pairs[run.name]) is False:
            said.append(f"{run.name} and {baseline.name} did not start from equal noise, though seeds are equal.")
        for key in ("model", "model_digest", "dtype", "device", "size", "guidance"):
            mine, base = (each.record.get("settings", {}).get(key) for each in (run, baseline))
            drawn = "model" in baseline.record.get("settings", {}) and "model" in run.record.get("settings", {})
            if mine != base and drawn:  # a function's pictures say nothing of a model
                said.append(f"{run.name} differs from {baseline.name} in {key}: {base} -> {mine}.")
    return said
