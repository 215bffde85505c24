"""Runs against a baseline: every metric that can be measured, with its interval, beside what chance alone does."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from diffaccel import record
from diffaccel.errors import DiffAccelError
from diffaccel.eval.comparison import (
    alignment,
    categories,
    checks,
    cost,
    distribution,
    fidelity,
    nearest,
    scored,
    similarity,
    videos,
)
from diffaccel.eval.comparison.row import Row
from diffaccel.eval.comparison.section import Section
from diffaccel.eval.extractors.base import Extractor
from diffaccel.eval.extractors.clip import ClipExtractor
from diffaccel.eval.images import Source
from diffaccel.eval.runs import Pairs, Run, first_pictures, pair, pair_prompts
from diffaccel.eval.scorers import Scorer

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


def compare_runs(
    baseline: Run,
    runs: Sequence[Run],
    *,
    others: Run | None = None,
    distances: Sequence[fidelity.Distance] = fidelity.BUILT_IN,
    extractors: Sequence[Extractor] = (),
    clips: Sequence[ClipExtractor] = (),
    scorers: Sequence[Scorer] = (),
    video: videos.Network | None = None,
    reference: Source | None = None,
    timing: dict[str, Any] | None = None,
    prompts: str | None = None,
    allow_mixed_n: bool = False,
    progress: Callable[[str], None] = lambda text: None,
) -> Comparison:
    """Measure every run against the baseline.

    Args:
        baseline: what the others are compared with.
        runs: at least one, of the same prompts and seeds; all of pictures, or all of videos.
        others: the baseline with other seeds: the noise floor of every metric.
        distances: of paired pictures, or of the frames of videos; PSNR and SSIM need no network.
        extractors: for distances of distributions of pictures.
        clips: for the fit of pictures to prompts, which the runs must know, for CLIP-I and for CMMD.
        scorers: of what people would like better.
        video: for the Fréchet distance of videos.
        reference: what distributions are compared with; the baseline's own pictures when there is none.
        timing: turns on one machine; without it seconds are the runs' own.
        prompts: a file or a packaged set that names the category of every prompt; None looks in the packaged sets.
        allow_mixed_n: compare runs of different prompts and seeds on what they share, and distributions on all.
        progress: told what is measured now.

    Raises:
        DiffAccelError: for no run, two of one name, runs that are not paired, pictures beside videos, networks of
            pictures for videos, and prompts without a category in a file that should name it.
    """
    names = [baseline.name, *(run.name for run in runs)]
    if not runs:
        raise DiffAccelError("There is no run to compare with the baseline. Give at least one.")
    if len(set(names)) < len(names):
        raise DiffAccelError(f"Two runs are called {next(n for n in names if names.count(n) > 1)!r}. Rename a folder.")
    baseline, runs, others, said = first_pictures(baseline, runs, others)
    checks.kinds(baseline, [*runs, *([others] if others is not None else [])])
    if baseline.is_video:
        checks.of_videos(extractors, clips, scorers, reference)
    elif video is not None:
        raise DiffAccelError(f"'{baseline.name}' holds pictures, and a network of videos was given. Leave it out.")
    categories_of = categories.known(baseline, prompts)
    pairs = {run.name: pair(baseline, run, partial=allow_mixed_n) for run in runs}
    found = Comparison(
        baseline=baseline, runs=list(runs), pairs=pairs, rows=[], values={},
        warnings=[*said, *checks.warnings(baseline, runs, pairs), *cost.doubts((baseline, *runs), timing)],
    )  # fmt: skip
    (_videos if baseline.is_video else _pictures)(found, others, distances, progress)
    if video is not None:
        progress(f"distributions by {video.name}")
        found.rows += videos.distances(baseline, runs, others, video)
    for clip in clips:
        progress(f"fit to the prompts by {clip.name}")
        found.add(*similarity.rows(baseline, runs, pairs, others, clip))
        found.add(*alignment.rows(baseline, runs, pairs, others, clip))
    for scorer in scorers:
        progress(f"scores by {scorer.name}")
        found.add(*alignment.preferred(baseline, runs, pairs, others, scorer))
    for extractor in extractors:
        progress(f"distributions by {extractor.name}")
        found.rows += distribution.rows(baseline, runs, pairs, others, reference, extractor)
    doubts = [f"{row.key}: {row.detail['warning']}" for row in found.rows if row.detail.get("warning")]
    found.warnings += dict.fromkeys(doubts)
    if reference is not None:
        found.sections += [nearest.section(baseline, runs, reference, extractor) for extractor in (*extractors, *clips)]
    found.rows += cost.rows(baseline, list(runs), timing)
    found.steps = {run.name: cost.steps(run, timing) for run in (baseline, *runs)}
    more = (categories.section(found, categories_of) if categories_of else None, cost.section(baseline, runs, timing))
    found.sections[:0] = [section for section in more if section is not None]
    return found


def _pictures(
    found: Comparison,
    others: Run | None,
    distances: Sequence[fidelity.Distance],
    progress: Callable[[str], None],
) -> None:
    base, floors = found.baseline, {}
    if others is not None:
        floors = _means(fidelity.measure(base, others, pair_prompts(base, others), distances))
    for run in found.runs:
        progress(f"{run.name}: pairs")
        for distance, numbers in fidelity.measure(base, run, found.pairs[run.name], distances):
            _add(found, run, distance, numbers, floors)


def _videos(
    found: Comparison,
    others: Run | None,
    distances: Sequence[fidelity.Distance],
    progress: Callable[[str], None],
) -> None:
    base, floors = found.baseline, {}
    if others is not None:
        of_others = videos.measure(base, others, pair_prompts(base, others), distances)
        floors = _means([(distance, videos.whole(distance, curves)) for distance, curves in of_others])
    for run in found.runs:
        progress(f"{run.name}: pairs of videos")
        measured = videos.measure(base, run, found.pairs[run.name], distances)
        for distance, curves in measured:
            _add(found, run, distance, videos.whole(distance, curves), floors)
            found.curves.setdefault(distance.key, {})[run.name] = videos.mean_curve(curves)
        found.rows += videos.drifts(run, measured, found.units(run.name))
    found.add(*videos.flicker(base, found.runs, found.pairs, others))


def _add(found: Comparison, run: Run, distance: fidelity.Distance, numbers: Tensor, floors: dict[str, float]) -> None:
    floor = floors.get(distance.metric)
    found.rows.append(fidelity.row(run, distance, numbers, clusters=found.units(run.name), floor=floor))
    found.values.setdefault(distance.key, {})[run.name] = numbers


def _means(measured: Sequence[tuple[fidelity.Distance, Tensor]]) -> dict[str, float]:
    """The mean of every distance that has one."""
    return {
        distance.metric: float(numbers[numbers.isfinite()].mean())
        for distance, numbers in measured
        if numbers.isfinite().any()
    }
