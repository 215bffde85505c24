"""Coverage of the intervals of sets of features, by simulation: what ``scripts.bench_coverage`` prints of them."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from diffaccel import zoo
from diffaccel.eval.features import statistics_files
from diffaccel.eval.metrics import frechet, frechet_intervals, manifold_intervals, mind, mmd_intervals
from diffaccel.eval.metrics.frechet import Moments
from diffaccel.eval.uncertainty.intervals import Interval

Row = dict[str, Any]
LEAST, MOST, FEW = 0.92, 0.98, 5  # bounds of coverage, and the carriers from which it is promised
SIZES = {200: 750, 1000: 750}  # rows in sets of features, and how many sets are drawn at scale 1
FEATURES = {"normal": 16, "skewed": 16, "our own covariance": 192}
SHIFT = 0.1  # of a run, in standard deviations
DIRECTIONS = 200  # of MIND; a report takes 1000


def generator(*names: object) -> np.random.Generator:
    """Return a generator whose seed is made from names, so that every row stands alone."""
    return np.random.default_rng(zlib.crc32(json.dumps(names).encode()))


def holds(coverage: float, repeats: int) -> bool:
    """Return whether a coverage is from 92 to 98 %, up to two standard errors of the simulation."""
    error = 2 * math.sqrt(0.95 * 0.05 / repeats)
    return LEAST - error <= coverage <= MOST + error


class Population:
    """Features of pictures: normal, skewed, or with the covariance of our own, and runs that are paired with them.

    Args:
        name: of the population.
        case: what its samples are for, so that every row stands alone.
    """

    def __init__(self, name: str, *case: object) -> None:
        self.draw = torch.Generator().manual_seed(zlib.crc32(json.dumps((name, *case)).encode()))
        self.name, self.d = name, FEATURES[name]
        self.spread = torch.diag(torch.linspace(0.5, 1.5, self.d, dtype=torch.float64))
        self.mean = torch.zeros(self.d, dtype=torch.float64)
        if name == "our own covariance":
            moments = statistics_files.read(zoo.path("emoji-clip-judge") / "fd_reference_64.npz").moments
            values, vectors = torch.linalg.eigh(moments.covariance)
            self.spread, self.mean = (vectors * values.clamp_min(0).sqrt()).T, moments.mean

    def latents(self, n: int) -> torch.Tensor:
        """Draw what pictures differ in, (n, d)."""
        return torch.randn(n, self.d, generator=self.draw, dtype=torch.float64)

    def features(self, latents: torch.Tensor) -> torch.Tensor:
        """Return the features of pictures, (n, d)."""
        x = latents @ self.spread + self.mean
        return x.mul(0.5).exp() if self.name.startswith("skewed") else x

    def pair(self, n: int, shift: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw a run and a baseline of the same ids, which correlate by 0.95; the run is shifted."""
        z = self.latents(n)
        return self.features(0.95 * z + 0.3 * self.latents(n) + shift), self.features(z)


Estimates = Callable[[torch.Tensor, torch.Tensor], dict[str, Interval]]  # of a run and its baseline, by number


@dataclass(frozen=True)
class Only:
    """The rows that are asked for: numbers whose names begin so, of these populations, with so many pictures."""

    begins: tuple[str, ...] = ("",)
    populations: tuple[str, ...] = tuple(FEATURES)
    pictures: tuple[int, ...] = ()

    def cases(self, sizes: dict[int, int], scale: float) -> Iterator[tuple[str, int, int]]:
        """Yield population, pictures and number of samples of every case, at a scale of the latter."""
        for name in self.populations:
            for n, repeats in sizes.items():
                if not self.pictures or n in self.pictures:
                    yield name, n, max(30, int(scale * repeats))


def distances(scale: float, only: Only = Only()) -> Iterator[Row]:
    """Yield the coverage of distances of sets of features: of their mean at this number of pictures."""
    for name, n, repeats in only.cases(SIZES, scale):
        population = Population(name, "distances", n)
        reference = population.features(population.latents(500))
        yield from _coverage(population, _distances_to(reference, only.begins), n, repeats)
    if not "FVD".startswith(only.begins):
        return
    for name, n, repeats in only.cases({30: 750, 100: 750}, scale):  # as few as videos are
        if name == "normal":
            yield from _coverage(Population(name, "clips", n), _few_clips, n, repeats)


def _distances_to(reference: torch.Tensor, begins: tuple[str, ...]) -> Estimates:
    """Return the function that measures every smooth distance of a run to a reference and to its baseline."""
    moments = Moments.of(reference)
    sigma = float((reference - reference.mean(0)).square().sum(1).mean().sqrt() / reference.norm(dim=1).mean())

    def numbers(run: torch.Tensor, base: torch.Tensor) -> dict[str, Interval]:
        ids = [(i, i) for i in range(len(run))]
        directions: dict[str, Any] = {"projections": DIRECTIONS}
        measures: dict[str, Callable[[], Interval]] = {
            "FD": lambda: frechet_intervals.distance_interval(run, moments),
            "FD, difference": lambda: frechet_intervals.difference(run, base, moments),
            "FD, to the baseline's own": lambda: frechet_intervals.distance_interval(run, base, pairs=ids),
            "KID": lambda: mmd_intervals.kid_interval(run, reference),
            "KID, difference": lambda: mmd_intervals.kid_difference(run, base, reference),
            "KID, to the baseline's own": lambda: mmd_intervals.kid_interval(run, base, pairs=ids),
            "CMMD": lambda: mmd_intervals.cmmd_interval(run, reference, sigma=sigma),
            "CMMD, difference": lambda: mmd_intervals.cmmd_difference(run, base, reference, sigma=sigma),
            "CMMD, to the baseline's own": lambda: mmd_intervals.cmmd_interval(run, base, sigma=sigma, pairs=ids),
            "MIND": lambda: mind.mind_interval(run, reference, **directions),
            "MIND, difference": lambda: mind.mind_difference(run, base, reference, **directions),
            "MIND, to the baseline's own": lambda: mind.mind_interval(run, base, pairs=ids, **directions),
        }
        return {name: measure() for name, measure in measures.items() if name.startswith(begins)}

    return numbers


def _few_clips(run: torch.Tensor, base: torch.Tensor) -> dict[str, Interval]:
    ids = [(i, i) for i in range(len(run))]
    return {"FVD, to the baseline's own": frechet_intervals.distance_interval(run, base, pairs=ids)}


def shares(scale: float, only: Only = Only()) -> Iterator[Row]:
    """Yield the coverage of precision, recall, density and coverage, and of their differences, reference fixed."""
    for name, n, repeats in only.cases({100: 750, 200: 750, 1000: 750}, scale):
        population = Population(name, "shares", n)
        reference = population.features(population.latents(500))

        def numbers(run: torch.Tensor, base: torch.Tensor, reference: torch.Tensor = reference) -> dict[str, Interval]:
            precision, recall = manifold_intervals.precision_recall_intervals(reference, run)
            density, covered = manifold_intervals.density_coverage_intervals(reference, run)
            less_precision, less_recall = manifold_intervals.precision_recall_differences(reference, run, base)
            less_density, less_covered = manifold_intervals.density_coverage_differences(reference, run, base)
            shares = {
                "precision": precision, "recall": recall.interval, "density": density, "coverage": covered.interval,
                "precision, difference": less_precision, "recall, difference": less_recall.interval,
                "density, difference": less_density, "coverage, difference": less_covered.interval,
            }  # fmt: skip
            return {number: interval for number, interval in shares.items() if interval is not None}

        for row in _coverage(population, numbers, n, repeats):
            yield {key: value for key, value in row.items() if key not in ("carriers", "promised")}


def _coverage(population: Population, numbers: Estimates, n: int, repeats: int) -> Iterator[Row]:
    """Yield how often the intervals of runs of ``n`` pictures hold the mean of their numbers."""
    intervals: dict[str, list[Interval]] = {}
    for _ in range(repeats):
        for number, interval in numbers(*population.pair(n, SHIFT)).items():
            intervals.setdefault(number, []).append(interval)
    for number, of_number in intervals.items():
        truth = sum(interval.value for interval in of_number) / len(of_number)
        yield _distance_row(number, population, n, of_number, truth)


def extrapolations(scale: float, only: Only = Only()) -> Iterator[Row]:
    """Yield the coverage of distances at infinitely many pictures: of the distance of the populations themselves."""
    for name, n, repeats in only.cases({500: 750, 1000: 750}, scale):
        yield from _infinities(Population(name, "extrapolation", n), n, repeats)


def _infinities(population: Population, n: int, repeats: int) -> Iterator[Row]:
    """Yield how often the extrapolation to infinitely many pictures holds the distance of the populations."""
    reference = Moments.of(population.features(population.latents(1000)))
    run, base = (Moments.of(x) for x in population.pair(100_000, SHIFT))
    truth, of_base = (frechet.distance(moments, reference) for moments in (run, base))
    whole, less = [], []
    for _ in range(repeats):
        a, b = population.pair(n, SHIFT)
        whole.append(frechet_intervals.infinity(a, reference).interval)
        less.append(frechet_intervals.infinity_difference(a, b, reference))
    yield _distance_row("FD-infinity", population, n, whole, truth)
    yield _distance_row("FD-infinity, difference", population, n, less, truth - of_base)


def _distance_row(number: str, population: Population, n: int, intervals: list[Interval], truth: float) -> Row:
    coverage = sum(interval.low <= truth <= interval.high for interval in intervals) / len(intervals)
    counts = sorted(interval.carriers for interval in intervals if interval.carriers is not None)
    few = counts[len(counts) // 2] if counts else None
    return {
        "number": number, "features": population.d, "population": population.name, "n": n,
        "carriers": None if few is None else round(few, 1), "coverage": coverage, "promised": few is None or few >= FEW,
        "holds": holds(coverage, len(intervals)), "repeats": len(intervals),
    }  # fmt: skip
