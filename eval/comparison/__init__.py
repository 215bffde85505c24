"""Runs against a baseline: every metric that can be measured, with its interval, beside what chance alone does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.eval.comparison import (
    alignment,
    categories,
    checks,
    cost,
    distribution,
    fidelity,
    nearest,
    reference_statistics,
    videos,
)
from diffaccel.eval.comparison.measures import Measures
from diffaccel.eval.comparison.result import Comparison
from diffaccel.eval.comparison.row import Section
from diffaccel.eval.images.source import Source
from diffaccel.eval.sets.run import Run, first_pictures, pair, pair_prompts


def compare_runs(
    baseline: Run,
    runs: Sequence[Run],
    measures: Measures | None = None,
    *,
    progress: Callable[[str], None] = lambda text: None,
) -> Comparison:
    """Measure every run against the baseline.

    Args:
        baseline: what the others are compared with.
        runs: at least one, of the same prompts and seeds; all of pictures, or all of videos.
        measures: what is measured; by default what needs no network.
        progress: told what is measured now.

    Raises:
        DiffAccelError: for no run, two of one name, runs that are not paired, pictures beside videos, networks of
            pictures for videos, and prompts without a category in a file that should name it.
    """
    measures = measures or Measures()
    baseline, runs, others, notes = _checked(baseline, runs, measures)
    categories_of = categories.known(baseline, measures.prompts)
    pairs = {run.name: pair(baseline, run, partial=measures.allow_mixed_n) for run in runs}
    warnings = [*notes, *checks.warnings(baseline, runs, pairs), *cost.doubts((baseline, *runs), measures.timing)]
    comparison = Comparison(baseline=baseline, runs=list(runs), pairs=pairs, rows=[], values={}, warnings=warnings)
    measure_pairs = _videos if baseline.is_video else _pictures
    measure_pairs(comparison, others, measures.distances, progress)
    _by_networks(comparison, others, measures, progress)
    doubts = [f"{row.key}: {row.detail['warning']}" for row in comparison.rows if row.detail.get("warning")]
    comparison.warnings += dict.fromkeys(doubts)
    comparison.rows += cost.rows(baseline, list(runs), measures.timing)
    comparison.steps = {run.name: cost.steps(run, measures.timing) for run in (baseline, *runs)}
    tables = [
        categories.section(comparison, categories_of) if categories_of else None,
        cost.section(baseline, runs, measures.timing),
        *_nearest(comparison, measures),
    ]
    comparison.sections = [table for table in tables if table is not None]
    return comparison


def _checked(baseline: Run, runs: Sequence[Run], measures: Measures) -> tuple[Run, list[Run], Run | None, list[str]]:
    """The runs as they are compared, and what a reader must know of that; refuse what does not go together."""
    names = [baseline.name, *(run.name for run in runs)]
    if not runs:
        raise DiffAccelError("There is no run to compare with the baseline. Give at least one.")
    if len(set(names)) < len(names):
        raise DiffAccelError(f"Two runs are called {next(n for n in names if names.count(n) > 1)!r}. Rename a folder.")
    baseline, compared, others, notes = first_pictures(baseline, runs, measures.others)
    checks.kinds(baseline, [*compared, *([others] if others is not None else [])])
    if baseline.is_video:
        checks.of_videos(measures.extractors, measures.clips, measures.scorers, measures.reference)
    elif measures.video is not None:
        raise DiffAccelError(f"'{baseline.name}' holds pictures, and a network of videos was given. Leave it out.")
    return baseline, compared, others, notes


def _by_networks(
    comparison: Comparison, others: Run | None, measures: Measures, progress: Callable[[str], None]
) -> None:
    """Add what networks say of the pictures or videos."""
    baseline, runs, pairs = comparison.baseline, comparison.runs, comparison.pairs
    if measures.video is not None:
        progress(f"distributions by {measures.video.name}")
        comparison.rows += videos.distances(baseline, runs, others, measures.video)
    for clip in measures.clips:
        progress(f"fit to the prompts by {clip.name}")
        comparison.add(*alignment.clip_similarity(baseline, runs, pairs, others, clip))
        comparison.add(*alignment.clip_scores(baseline, runs, pairs, others, clip))
    for scorer in measures.scorers:
        progress(f"scores by {scorer.name}")
        comparison.add(*alignment.preferred(baseline, runs, pairs, others, scorer))
    for extractor in measures.extractors:
        progress(f"distributions by {extractor.name}")
        if isinstance(measures.reference, Path):
            rows, warnings = reference_statistics.rows(baseline, runs, others, measures.reference, extractor)
            comparison.rows += rows
            comparison.warnings += warnings
        else:
            comparison.rows += distribution.rows(baseline, runs, pairs, others, measures.reference, extractor)


def _nearest(comparison: Comparison, measures: Measures) -> list[Section]:
    """Tables of the nearest reference pictures, a network each."""
    if not isinstance(measures.reference, Source):
        return []
    networks = (*measures.extractors, *measures.clips)
    return [nearest.section(comparison.baseline, comparison.runs, measures.reference, network) for network in networks]


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
