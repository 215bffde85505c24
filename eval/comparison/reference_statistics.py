"""Fréchet distances of runs to a reference set of which only mean and covariance are known, as published statistics."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffaccel.eval.comparison.distribution import FEWEST, features, too_few_pictures
from diffaccel.eval.comparison.printed_distances import FD, feature_row
from diffaccel.eval.comparison.row import Estimate, Row, missing
from diffaccel.eval.comparison.zoo_reference import ShippedStatistics
from diffaccel.eval.features.sets import load
from diffaccel.eval.images.open import open_source
from diffaccel.eval.metrics import frechet_intervals
from diffaccel.eval.metrics.frechet import Moments
from diffaccel.eval.networks.extractors.base import Extractor
from diffaccel.eval.sets.run import Run, pair


def is_statistics_file(reference: Any) -> bool:
    """Return whether a reference is the path of a file that holds statistics and no images."""
    if not isinstance(reference, str | Path):
        return False
    path = Path(reference)
    return path.suffix.lower() == ".pkl" or (path.suffix.lower() == ".npz" and open_source(path).kind == "statistics")


def load_moments(reference: str | Path | ShippedStatistics, extractor: Extractor) -> tuple[Moments, list[str]]:
    """Return the mean and covariance of a reference, and warnings about its file.

    Raises:
        DiffAccelError: for statistics of another network or another number of features.
    """
    if isinstance(reference, ShippedStatistics):
        return reference.moments, []
    feature_set = load(reference, extractor)
    main = feature_set.main
    return (main if isinstance(main, Moments) else Moments.of(main)), feature_set.warnings


def rows(
    baseline: Run,
    runs: Sequence[Run],
    others: Run | None,
    reference: str | Path | ShippedStatistics,
    extractor: Extractor,
) -> tuple[list[Row], list[str]]:
    """Measure the Fréchet distance of every run to the reference, and its paired difference to the baseline's.

    Distances of other kinds need the reference's images.

    Returns:
        A row of the baseline and of each run, and warnings about the file.
    """
    all_runs = (baseline, *runs)
    reference_moments, warnings = load_moments(reference, extractor)
    reference_name = reference.name if isinstance(reference, ShippedStatistics) else Path(reference).stem
    if (fewest := min(map(len, all_runs))) < FEWEST:
        why = too_few_pictures(fewest)
        return [missing(FD, extractor.key, "distribution", run.name, "lower", why) for run in all_runs], warnings
    base_features = features(baseline, extractor)
    floor = None
    if others is not None:
        floor = frechet_intervals.distance_interval(features(others, extractor), reference_moments)
    distance_rows = []
    for run in all_runs:
        run_features = features(run, extractor)
        distance = frechet_intervals.distance_interval(run_features, reference_moments)
        row = feature_row(
            FD, run.name, Estimate(distance.value, distance), extractor, n=len(run), m=reference_moments.n,
            detail={
                "reference": reference_name,
                "from": f"to the statistics {reference_name}{_note(len(run), extractor)}",
            },
        )  # fmt: skip
        if floor is not None:
            row.floor, row.floor_interval = floor.value, floor
        if run is not baseline:
            paired_features = run_features[[j for _, j in pair(baseline, run)]]
            difference = frechet_intervals.difference(paired_features, base_features, reference_moments)
            row.delta = difference.value
            row.set_interval("delta_interval", difference)
        distance_rows.append(row)
    return distance_rows, warnings


def _note(n: int, extractor: Extractor) -> str:
    return f"; fewer pictures than the {extractor.dim} features, covariance is singular" if n < extractor.dim else ""
