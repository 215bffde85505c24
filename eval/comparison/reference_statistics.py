"""Fréchet distances of runs to a set of which only mean and covariance are known, such as published statistics."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffaccel.eval.comparison import printed_distances as distances
from diffaccel.eval.comparison.distribution import FEWEST, features
from diffaccel.eval.comparison.row import Row, missing
from diffaccel.eval.features import sets as feature_sets
from diffaccel.eval.images.open import open_source
from diffaccel.eval.metrics import frechet_intervals
from diffaccel.eval.metrics.frechet import Moments
from diffaccel.eval.networks.extractors.base import Extractor
from diffaccel.eval.sets.run import Run, pair


def is_statistics(reference: Any) -> bool:
    """Whether it is the path of a file that holds statistics and no images."""
    if not isinstance(reference, str | Path):
        return False
    path = Path(reference)
    return path.suffix.lower() == ".pkl" or (path.suffix.lower() == ".npz" and open_source(path).kind == "statistics")


def moments(reference: str | Path, extractor: Extractor) -> tuple[Moments, list[str]]:
    """What the file keeps of its images, and what a report must say about it.

    Raises:
        DiffAccelError: for statistics of another network or another number of features.
    """
    found = feature_sets.load(reference, extractor)
    main = found.main
    return (main if isinstance(main, Moments) else Moments.of(main)), found.warnings


def rows(
    baseline: Run, runs: Sequence[Run], others: Run | None, reference: str | Path, extractor: Extractor
) -> tuple[list[Row], list[str]]:
    """The Fréchet distance of every run, paired differences to the baseline's, and warnings about the file.

    Distances of other kinds need the reference's images.
    """
    target, warnings = moments(reference, extractor)
    name, shown = Path(reference).stem, (baseline, *runs)
    if (fewest := min(map(len, shown))) < FEWEST:
        why = f"{fewest} pictures are too few to compare distributions; give at least {FEWEST}"
        return [missing(distances.FD, extractor.key, "distribution", run.name, "lower", why) for run in shown], warnings
    base = features(baseline, extractor)
    floor = None if others is None else distances.fid(features(others, extractor), target)[distances.FD]
    found = []
    for run in shown:
        mine = features(run, extractor)
        interval = frechet_intervals.distance_interval(mine, target)
        row = Row(
            metric=distances.FD, key=extractor.key, family="distribution", run=run.name, better="lower",
            value=interval.value, interval=interval, n=len(run), m=target.n, floor=floor,
            detail={
                "extractor": extractor.name, "weights_sha256": extractor.weights_sha256, "reference": name,
                "from": f"to the statistics {name}",
            },
        )  # fmt: skip
        if run is not baseline:
            ordered = mine[[j for _, j in pair(baseline, run)]]
            row.delta_interval = frechet_intervals.difference(ordered, base, target)
            row.delta = row.delta_interval.value
        found.append(row)
    return found, warnings
