"""Whether the pictures of a run look like those of a reference set, by the features of a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from diffaccel.eval.comparison import distances as numbers
from diffaccel.eval.comparison import printed_distances as distances
from diffaccel.eval.comparison.row import Row, missing
from diffaccel.eval.features.extract import extract
from diffaccel.eval.images.source import Source
from diffaccel.eval.networks.extractors.base import Extractor
from diffaccel.eval.sets.run import Pairs, Run

CACHE = ".features"
FEWEST = 100  # pictures; the jackknife needs ten shards of ten


def features(run: Run, extractor: Extractor) -> Tensor:
    """(n, d), in the order of the run's pictures; kept in the run's folder."""
    found = extract(run.source, extractor, cache=run.path / CACHE)
    return found.rows([picture.id for picture in run.pictures])


def rows(
    baseline: Run,
    runs: Sequence[Run],
    pairs: Mapping[str, Pairs],
    others: Run | None,
    reference: Source | None,
    extractor: Extractor,
) -> list[Row]:
    """Fréchet distance, KID, MIND, precision, recall, density and coverage of every run; CMMD of a CLIP's features.

    Against ``reference``, the baseline has rows too and the others a difference to it, paired by id; with 500 pictures
    there is the Fréchet distance at infinite n. Without a reference the baseline's own pictures take its place, and
    the floor is what its other seeds are from it.
    """
    shown = (baseline, *runs) if reference is not None else runs
    smallest = min(*(len(run) for run in (baseline, *runs)), len(reference or baseline))
    if smallest < FEWEST:
        why = f"{smallest} pictures are too few to compare distributions; give at least {FEWEST}"
        return [missing(distances.FD, extractor.key, "distribution", run.name, "lower", why) for run in shown]
    of = {run.name: _placed(features(run, extractor), extractor) for run in (baseline, *runs)}
    if reference is None:
        target, against = of[baseline.name], baseline.name
    else:
        target, against = _placed(extract(reference, extractor).values, extractor), reference.name
    functions = list(numbers.measures(extractor, smallest, independent=reference is not None))

    def measured(x: Tensor) -> dict[str, numbers.Number]:
        return {metric: number for function in functions for metric, number in function(x, target).items()}

    floors = {} if others is None else measured(_placed(features(others, extractor), extractor))
    of_target = {run.name: measured(of[run.name]) for run in shown}
    detail = {"extractor": extractor.name, "weights_sha256": extractor.weights_sha256, "reference": against}
    found = []
    for run in shown:
        mine = of[run.name]
        note = _note(len(mine), len(target), extractor.dim, against, same_seeds=reference is None)
        for metric, number in of_target[run.name].items():
            row = Row(
                metric=metric, key=distances.key(metric, extractor), family="distribution", run=run.name,
                better=numbers.BETTER[metric], value=number.value, interval=number.interval, n=len(mine),
                m=len(target), floor=floors[metric].value if floors else None,
                detail={**detail, **number.detail, "from": "; ".join(filter(None, (note, number.note)))},
            )  # fmt: skip
            if reference is not None and run is not baseline:
                row.delta = number.value - of_target[baseline.name][metric].value
                at = pairs[run.name]
                if len(at) == len(run) == len(baseline):  # the same ids on both sides
                    a, b = mine[[j for _, j in at]], of[baseline.name][[i for i, _ in at]]
                    row.delta_interval = numbers.difference(metric, a, b, target)
            found.append(row)
    return found


def _placed(values: Tensor, extractor: Extractor) -> Tensor:
    """On the network's GPU, where float64 products are fast; MPS has no float64."""
    return values.to(extractor.device) if extractor.device.type == "cuda" else values


def _note(n: int, m: int, dim: int, against: str, *, same_seeds: bool) -> str:
    few = f"; fewer pictures than the {dim} features, covariance is singular" if min(n, m) < dim else ""
    alike = ", same seeds: not independent" if same_seeds else ""
    return f"to {against}{alike}{few}"
