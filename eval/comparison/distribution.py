"""Whether the pictures of a run look like those of a reference set, by the features of a network."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from diffaccel.eval import distances, frechet_intervals
from diffaccel.eval.comparison.row import Row, missing
from diffaccel.eval.extractors.base import Extractor
from diffaccel.eval.features import extract
from diffaccel.eval.images import Source
from diffaccel.eval.runs import Run

CACHE = ".features"
FEWEST = 100  # pictures; the jackknife needs ten shards of ten


def features(run: Run, extractor: Extractor) -> Tensor:
    """(n, d), in the order of the run's pictures; kept in the run's folder."""
    found = extract(run.source, extractor, cache=run.path / CACHE)
    return found.rows([picture.id for picture in run.pictures])


def rows(
    baseline: Run, runs: Sequence[Run], others: Run | None, reference: Source | None, extractor: Extractor
) -> list[Row]:
    """Fréchet distance, KID, precision, recall, density and coverage of every run.

    Against ``reference``, the baseline has rows too and the others a difference to it, paired by id. Without one the
    reference is the baseline's own pictures, and the floor what its other seeds are from it.
    """
    shown = (baseline, *runs) if reference is not None else runs
    smallest = min(len(baseline), len(reference or baseline))
    if smallest < FEWEST:
        why = f"{smallest} pictures are too few to compare distributions; give at least {FEWEST}"
        return [missing(distances.FD, extractor.key, "distribution", run.name, "lower", why) for run in shown]
    of = {run.name: features(run, extractor) for run in (baseline, *runs)}
    if reference is None:
        target, against = of[baseline.name], baseline.name
    else:
        target, against = extract(reference, extractor).values, reference.name
    of_target = {name: _numbers(mine, target) for name, mine in of.items() if reference is not None or name != against}
    floors = {} if others is None else _numbers(features(others, extractor), target)
    detail = {"extractor": extractor.name, "weights_sha256": extractor.weights_sha256, "reference": against}
    found = []
    for run in shown:
        mine, numbers = of[run.name], of_target[run.name]
        n, m = len(mine), len(target)
        note = _note(n, m, extractor.dim, against, same_seeds=reference is None)
        for metric, better in distances.BETTER.items():
            row = Row(
                metric=metric, key=distances.key(metric, extractor), family="distribution", run=run.name, better=better,
                value=numbers[metric], floor=floors.get(metric), n=n, m=m, detail={**detail, "from": note},
            )  # fmt: skip
            if reference is not None and run is not baseline:
                row.delta = numbers[metric] - of_target[baseline.name][metric]
            if metric == distances.FD:
                row.interval = frechet_intervals.distance_interval(mine, target)
                if row.delta is not None:
                    row.delta_interval = frechet_intervals.difference(mine, of[baseline.name], target)
                    row.delta = row.delta_interval.value
            found.append(row)
    return found


def _numbers(samples: Tensor, reference: Tensor) -> dict[str, float]:
    return {
        **distances.fid(samples, reference),
        **distances.kid(samples, reference),
        **distances.prdc(samples, reference),
    }


def _note(n: int, m: int, dim: int, against: str, *, same_seeds: bool) -> str:
    few = f"; fewer pictures than the {dim} features, covariance is singular" if min(n, m) < dim else ""
    alike = ", same seeds: not independent" if same_seeds else ""
    return f"to {against}{alike}{few}"
