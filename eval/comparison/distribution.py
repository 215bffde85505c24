"""Distances of the distribution of a run's pictures to that of a reference set, in the features of a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from diffaccel.eval.comparison.distances import difference_intervals, distance_functions
from diffaccel.eval.comparison.printed_distances import FD, feature_row
from diffaccel.eval.comparison.row import Estimate, Row, missing
from diffaccel.eval.features.extract import extract
from diffaccel.eval.images.source import Source
from diffaccel.eval.networks.extractors.base import Extractor
from diffaccel.eval.sets.run import Pairs, Run, pair_by_prompt
from diffaccel.eval.uncertainty.intervals import Interval

CACHE = ".features"
FEWEST = 100  # pictures


def too_few_pictures(count: int) -> str:
    """Return why so many pictures, fewer than :data:`FEWEST`, have no distance of distributions."""
    verb = "picture is" if count == 1 else "pictures are"
    return f"{count} {verb} too few to compare distributions; give at least {FEWEST}"


def features(run: Run, extractor: Extractor) -> Tensor:
    """Return features (n, d) in the order of the run's pictures; the run's folder keeps them."""
    run_features = extract(run.source, extractor, cache=run.path / CACHE)
    return run_features.rows([picture.id for picture in run.pictures])


@dataclass(frozen=True, eq=False)
class _Target:
    """Features of the set that every run is compared with.

    Attributes:
        name: of the set.
        features: (m, d), on the device of the numerics.
        extractor: network of the features.
        count: pictures of the smallest set.
        independent: whether it is a set of its own, and not the baseline's pictures of the same seeds.
    """

    name: str
    features: Tensor
    extractor: Extractor
    count: int
    independent: bool

    def estimates(self, samples: Tensor, pairs: Pairs) -> dict[str, Estimate]:
        """Measure every distance of samples (n, d), by metric.

        Args:
            samples: features.
            pairs: rows of the baseline and of the samples, which count where the baseline is the target.
        """
        row_pairs = [] if self.independent else [(j, i) for i, j in pairs]
        functions = distance_functions(self.extractor, self.count, independent=self.independent, pairs=row_pairs)
        return {
            metric: estimate for function in functions for metric, estimate in function(samples, self.features).items()
        }

    def note(self, n: int) -> str:
        """Return what a reader of a distance of ``n`` pictures must know."""
        dim = self.extractor.dim
        few = f"; fewer pictures than the {dim} features, covariance is singular"
        same_seeds = "" if self.independent else ", same seeds: not independent"
        return f"to {self.name}{same_seeds}{few if min(n, len(self.features)) < dim else ''}"


def rows(
    baseline: Run,
    runs: Sequence[Run],
    pairs: Mapping[str, Pairs],
    others: Run | None,
    reference: Source | None,
    extractor: Extractor,
) -> list[Row]:
    """Measure Fréchet distance, KID and MIND of every run, and by a CLIP CMMD too.

    Against ``reference``, the baseline has rows too and the others a difference to it, paired by id; there are
    precision, recall, density and coverage, and with 500 pictures the Fréchet distance at infinite n. Without a
    reference the baseline's own pictures take its place, paired by id, and the floor is the distance of its other
    seeds, paired by prompt.
    """
    measured_runs = (baseline, *runs) if reference is not None else runs
    smallest = min(*(len(run) for run in (baseline, *runs)), len(reference or baseline))
    if smallest < FEWEST:
        why = too_few_pictures(smallest)
        return [missing(FD, extractor.key, "distribution", run.name, "lower", why) for run in measured_runs]
    run_features = {run.name: _placed(features(run, extractor), extractor) for run in (baseline, *runs)}
    if reference is None:
        target = _Target(baseline.name, run_features[baseline.name], extractor, smallest, independent=False)
    else:
        reference_features = _placed(extract(reference, extractor).values, extractor)
        target = _Target(reference.name, reference_features, extractor, smallest, independent=True)
    floors = {}
    if others is not None:
        other_pairs = [] if reference is not None else pair_by_prompt(baseline, others)
        floors = target.estimates(_placed(features(others, extractor), extractor), other_pairs)
    estimates = {run.name: target.estimates(run_features[run.name], pairs.get(run.name, [])) for run in measured_runs}
    distance_rows = []
    for run in measured_runs:
        differences: dict[str, Interval | None] = {}
        run_pairs = pairs.get(run.name, [])
        if reference is not None and run is not baseline and len(run_pairs) == len(run) == len(baseline):
            a = run_features[run.name][[j for _, j in run_pairs]]
            b = run_features[baseline.name][[i for i, _ in run_pairs]]
            differences = difference_intervals(estimates[run.name], a, b, target.features)
        for metric, estimate in estimates[run.name].items():
            count = len(run_features[run.name])
            note = "; ".join(filter(None, (target.note(count), estimate.note)))
            row = feature_row(
                metric, run.name, estimate, extractor, n=count, m=len(target.features),
                detail={"reference": target.name, "from": note},
            )  # fmt: skip
            if floors:
                row.floor, row.floor_interval = floors[metric].value, floors[metric].interval
            if reference is not None and run is not baseline:
                row.delta = estimate.value - estimates[baseline.name][metric].value
                row.set_interval("delta_interval", differences.get(metric))
            distance_rows.append(row)
    return distance_rows


def _placed(values: Tensor, extractor: Extractor) -> Tensor:
    """Move features to the network's GPU, where float64 products are fast; MPS has no float64."""
    return values.to(extractor.device) if extractor.device.type == "cuda" else values
