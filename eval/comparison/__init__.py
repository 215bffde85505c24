"""Runs against a baseline: every metric that can be measured, with its interval, beside what chance alone does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

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
    networks,
    videos,
)
from diffaccel.eval.comparison.result import Comparison
from diffaccel.eval.extractors.base import Extractor
from diffaccel.eval.extractors.clip import ClipExtractor
from diffaccel.eval.images import Source
from diffaccel.eval.runs import Run, first_pictures, pair, pair_prompts
from diffaccel.eval.scorers import Scorer


def compare_runs(
    baseline: Run,
    runs: Sequence[Run],
    *,
    others: Run | None = None,
    distances: Sequence[fidelity.Distance] = fidelity.BUILT_IN,
    extractors: Sequence[Extractor] = (),
    clips: Sequence[ClipExtractor] = (),
    scorers: Sequence[Scorer] = (),
    video: networks.Network | None = None,
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
        found.add(*alignment.clip_similarity(baseline, runs, pairs, others, clip))
        found.add(*alignment.clip_scores(baseline, runs, pairs, others, clip))
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
