"""Coverage of what is measured in turns, by simulation: seconds, their ratios, joules, shares of wins.

``scripts.bench_coverage`` prints it. A call is measured with noise that is normal, skewed, or an outlier of ten, on a
machine that drifts. Joules are read from a counter of ticks that calls begin at any moment of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from diffaccel.eval.uncertainty.intervals import median_ratio, wilson
from diffaccel.eval.uncertainty.turns import TICK, energy_ratio, mean_difference, mean_of_turns, of_ticks
from scripts.coverage_of_features import Row, generator, holds

Array = NDArray[np.float64]
TURNS = (6, 10, 20)
NOISE: dict[str, Callable[[np.random.Generator, int], Array]] = {
    "normal, 3 %": lambda draw, n: 0.03 * draw.normal(size=n),
    "skewed, exponential 10 %": lambda draw, n: 0.1 * draw.exponential(size=n),
    "a call of ten takes twice as long": lambda draw, n: 0.01 * draw.normal(size=n) + 0.69 * (draw.random(n) < 0.1),
}
TICKS = ((40.4, 20.1), (40.4, 20.5), (21.3, 20.3), (97.2, 22.9))  # of the baseline's calls and of the other's


def ratios(scale: float) -> Iterator[Row]:
    """Yield the coverage of all that is measured in turns, and of shares of wins."""
    repeats = max(50, int(scale * 2000))
    for name, sample in NOISE.items():
        median = float(np.median(sample(generator("median", name), 1_000_000)))
        for turns in TURNS:
            draw, apart, alone = generator("ratios", name, turns), 0, 0
            for _ in range(repeats):
                drift = np.exp(draw.normal(size=turns))  # of the machine, alike for both
                a, b = (seconds * np.exp(sample(draw, turns)) for seconds in (2.0, 1.0))
                interval = median_ratio(a * drift, b * drift).interval
                apart += interval is not None and interval.low <= 2.0 <= interval.high
                interval = median_ratio(a, [2.0] * turns).interval
                alone += interval is not None and interval.low <= math.exp(median) <= interval.high
            yield _row("ratios of times", name, turns, apart, repeats)
            yield _row("seconds", name, turns, alone, repeats)
    yield from _energies(repeats)
    for share in (0.5, 0.8):
        for n in (10, 30, 100):
            wins = generator("wins", share, n).binomial(n, share, repeats)
            covered = sum(wilson(int(k), n).low <= share <= wilson(int(k), n).high for k in wins)
            yield _row("shares of wins", f"wins, {share:.0%} of pairs", n, covered, repeats)


def _energies(repeats: int) -> Iterator[Row]:
    """Yield the coverage of energy, of its ratio to the baseline's and of the difference, by ticks and noise."""
    for base, own in TICKS:
        for noise in (0.01, 0.03):
            for turns in TURNS:
                draw, covered = generator("energy", base, own, noise, turns), np.zeros(3)
                resolutions, factor = (of_ticks(own * TICK), of_ticks(base * TICK)), math.exp(noise**2 / 2)
                for _ in range(repeats):
                    a, b = (
                        np.floor(draw.random(turns) + ticks) * np.exp(noise * draw.normal(size=turns))
                        for ticks in (own, base)
                    )
                    ratio = energy_ratio(list(a), list(b), (own * TICK, base * TICK))
                    found = (
                        (mean_of_turns(b, resolutions[1]), base * factor),
                        (None if ratio is None else ratio.interval, own / base),
                        (mean_difference(a, b, resolutions), (own - base) * factor),
                    )
                    covered += [x is not None and x.low <= truth <= x.high for x, truth in found]
                name = f"calls of {own} to {base} ticks, {noise:.0%} of noise"
                yield _row("energy", name, turns, covered[0], repeats)
                yield _row("energy over the baseline's", name, turns, covered[1], repeats)
                if turns >= 10:
                    yield _row("energy, difference", name, turns, covered[2], repeats)


def _row(number: str, population: str, turns: int, covered: float, repeats: int) -> Row:
    coverage = float(covered) / repeats
    return {
        "number": number, "population": population, "turns": turns, "coverage": coverage,
        "holds": holds(coverage, repeats), "repeats": repeats,
    }  # fmt: skip
