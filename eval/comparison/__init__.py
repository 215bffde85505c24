"""Runs against a baseline: every metric that can be measured, with its interval and its noise floor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
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
from diffaccel.eval.comparison.fidelity import Distance
from diffaccel.eval.comparison.measures import Measures
from diffaccel.eval.comparison.paired_scores import cluster_labels
from diffaccel.eval.comparison.result import Comparison
from diffaccel.eval.comparison.row import Estimate, Section
from diffaccel.eval.comparison.verdict import ONE_COLOUR
from diffaccel.eval.comparison.zoo_reference import ShippedStatistics
from diffaccel.eval.images.source import Source
from diffaccel.eval.sets.run import Pairs, Run, cut_to_shortest, pair, pair_by_prompt

Progress = Callable[[str], None]


def compare_runs(
    baseline: Run,
    runs: Sequence[Run],
    measures: Measures | None = None,
    *,
    progress: Progress = lambda text: None,
) -> Comparison:
    """Measure every run against the baseline.

    Args:
        baseline: the run that the others are compared with.
        runs: at least one, of the same prompts and seeds; all of pictures, or all of videos.
        measures: what is measured; by default what needs no network.
        progress: called with a line of text before every step.

    Raises:
        DiffAccelError: for no run, two of one name, runs that are not paired, pictures beside videos, networks of
            pictures for videos, and prompts without a category in a file that should name it.
    """
    measures = measures or Measures()
    baseline, runs, others, notes = _check(baseline, runs, measures)
    category_of_prompt = categories.category_of_prompts(baseline, measures.prompts)
    pairs = {run.name: pair(baseline, run, partial=measures.allow_mixed_n) for run in runs}
    warnings = [
        *notes,
        *checks.warnings(baseline, runs, pairs),
        *cost.timing_warnings((baseline, *runs), measures.timing),
    ]
    comparison = Comparison(baseline=baseline, runs=list(runs), pairs=pairs, rows=[], values={}, warnings=warnings)
    if isinstance(measures.reference, ShippedStatistics):
        comparison.reference = measures.reference.sentence
    measure_pairs = _measure_videos if baseline.is_video else _measure_pictures
    measure_pairs(comparison, others, measures.distances, progress)
    _measure_by_networks(comparison, others, measures, progress)
    row_warnings = [f"{row.key}: {row.detail['warning']}" for row in comparison.rows if row.detail.get("warning")]
    comparison.warnings += dict.fromkeys(row_warnings)
    comparison.rows += cost.rows(baseline, list(runs), measures.timing)
    comparison.steps = {run.name: cost.steps(run, measures.timing) for run in (baseline, *runs)}
    sections = [
        categories.section(comparison, category_of_prompt) if category_of_prompt else None,
        cost.section(baseline, runs, measures.timing),
        *_nearest_sections(comparison, measures),
    ]
    comparison.sections = [section for section in sections if section is not None]
    return comparison


def _check(baseline: Run, runs: Sequence[Run], measures: Measures) -> tuple[Run, list[Run], Run | None, list[str]]:
    """Raise for runs and measures that do not go together, and cut the runs to the pictures that are compared.

    Returns:
        The baseline, the runs, the baseline with other seeds, and notes on pictures that were left out.
    """
    names = [baseline.name, *(run.name for run in runs)]
    if not runs:
        raise DiffAccelError("There is no run to compare with the baseline. Give at least one.")
    if len(set(names)) < len(names):
        name = next(n for n in names if names.count(n) > 1)
        folders = {run.path.resolve() for run in (baseline, *runs) if run.name == name}
        fix = "Rename a folder." if len(folders) > 1 else f"They are one folder, {folders.pop()}: give it once."
        raise DiffAccelError(f"Two runs are called {name!r}. {fix}")
    baseline, cut_runs, others, notes = cut_to_shortest(baseline, runs, measures.others)
    checks.check_other_seeds(baseline, others)
    checks.check_same_kind(baseline, [*cut_runs, *([others] if others is not None else [])])
    if baseline.is_video:
        checks.check_no_picture_networks(measures.extractors, measures.clips, measures.scorers, measures.reference)
    elif measures.video is not None:
        raise DiffAccelError(f"'{baseline.name}' holds pictures, and a network of videos was given. Leave it out.")
    return baseline, cut_runs, others, notes


# -- pairs ------------------------------------------------------------------------------------------------------------


def _measure_pictures(
    comparison: Comparison, others: Run | None, distances: Sequence[Distance], progress: Progress
) -> None:
    """Add the distances of every pair of pictures."""
    baseline, floors = comparison.baseline, {}
    if others is not None:
        other_pairs = pair_by_prompt(baseline, others)
        floors = _floors(baseline, other_pairs, fidelity.measure(baseline, others, other_pairs, distances))
    for run in comparison.runs:
        progress(f"{run.name}: pairs")
        measured = fidelity.measure(baseline, run, comparison.pairs[run.name], (*distances, fidelity.BLANK))
        for distance, values in measured:
            if distance is not fidelity.BLANK:
                _add_distance(comparison, run, distance, values, floors)
        _note_blank_pictures(comparison, run, next(values for d, values in measured if d is fidelity.BLANK))


def _measure_videos(
    comparison: Comparison, others: Run | None, distances: Sequence[Distance], progress: Progress
) -> None:
    """Add the distances of every pair of videos, their curves over frames and drifts, and flicker."""
    baseline, floors = comparison.baseline, {}
    if others is not None:
        other_pairs = pair_by_prompt(baseline, others)
        other_curves = videos.measure(baseline, others, other_pairs, distances)
        values = [(distance, videos.video_values(distance, curves)) for distance, curves in other_curves]
        floors = _floors(baseline, other_pairs, values)
    for run in comparison.runs:
        progress(f"{run.name}: pairs of videos")
        *measured, (_, blank) = videos.measure(baseline, run, comparison.pairs[run.name], (*distances, fidelity.BLANK))
        for distance, curves in measured:
            _add_distance(comparison, run, distance, videos.video_values(distance, curves), floors)
            comparison.curves.setdefault(distance.key, {})[run.name] = videos.mean_curve(distance, curves)
        _note_blank_pictures(comparison, run, torch.stack([curve.min() for curve in blank]))
        comparison.rows += videos.drift_rows(run, measured, comparison.clusters(run.name))
    comparison.add(*videos.flicker_rows(baseline, comparison.runs, comparison.pairs, others))


def _add_distance(
    comparison: Comparison, run: Run, distance: Distance, values: Tensor, floors: dict[str, Estimate]
) -> None:
    """Add the row of a distance, and its value of every pair."""
    floor = floors.get(distance.metric)
    comparison.rows.append(fidelity.row(run, distance, values, clusters=comparison.clusters(run.name), floor=floor))
    comparison.values.setdefault(distance.key, {})[run.name] = values


def _note_blank_pictures(comparison: Comparison, run: Run, is_blank: Tensor) -> None:
    """Say of a run's rows and in the warnings how many pictures show nothing, while the baseline's do."""
    places = [j for (_, j), blank in zip(comparison.pairs[run.name], is_blank.tolist(), strict=True) if blank]
    if not places:
        return
    for row in comparison.rows:
        if row.run == run.name and row.family == "fidelity":
            row.detail[ONE_COLOUR] = len(places)
    things = "videos" if run.is_video else "pictures"
    comparison.warnings.append(
        f"{run.name}: {len(places)} of {len(is_blank)} {things} are of one colour and the baseline's are not, such as "
        f"'{run.pictures[places[0]].id}': so a run looks that met NaN. Scores of networks say nothing of them."
    )


def _floors(baseline: Run, pairs: Pairs, measured: Sequence[tuple[Distance, Tensor]]) -> dict[str, Estimate]:
    """Return by metric the mean over the pairs of other seeds, of every distance that has one."""
    clusters = cluster_labels(baseline, pairs)
    means = {distance.metric: fidelity.estimate(values, clusters) for distance, values in measured}
    return {metric: mean for metric, mean in means.items() if mean is not None}


# -- networks ---------------------------------------------------------------------------------------------------------


def _measure_by_networks(comparison: Comparison, others: Run | None, measures: Measures, progress: Progress) -> None:
    """Add what networks measure: fit to the prompts, preference scores, and distances of distributions."""
    baseline, runs, pairs = comparison.baseline, comparison.runs, comparison.pairs
    if measures.video is not None:
        progress(f"distributions by {measures.video.name}")
        comparison.rows += videos.frechet_rows(baseline, runs, pairs, others, measures.video)
    for clip in measures.clips:
        progress(f"fit to the prompts by {clip.name}")
        comparison.add(*alignment.clip_similarity(baseline, runs, pairs, others, clip))
        comparison.add(*alignment.clip_scores(baseline, runs, pairs, others, clip))
    for scorer in measures.scorers:
        progress(f"scores by {scorer.name}")
        comparison.add(*alignment.preference_scores(baseline, runs, pairs, others, scorer))
    for extractor in measures.extractors:
        progress(f"distributions by {extractor.name}")
        if isinstance(measures.reference, Path | ShippedStatistics):
            rows, warnings = reference_statistics.rows(baseline, runs, others, measures.reference, extractor)
            comparison.rows += rows
            comparison.warnings += warnings
        else:
            comparison.rows += distribution.rows(baseline, runs, pairs, others, measures.reference, extractor)


def _nearest_sections(comparison: Comparison, measures: Measures) -> list[Section]:
    """Return a table of the nearest reference pictures for every network, where the reference holds images."""
    if not isinstance(measures.reference, Source):
        return []
    networks = (*measures.extractors, *measures.clips)
    return [nearest.section(comparison.baseline, comparison.runs, measures.reference, network) for network in networks]
