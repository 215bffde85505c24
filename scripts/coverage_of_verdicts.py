"""How often a real change is called "same" and how often no change is, by simulation: ``scripts.bench_coverage``.

What other seeds do to a mean over ``n`` prompts is ``1.96 s / sqrt(n)``, with the deviation ``s`` of what another seed
changes in the score of one prompt. The change is half of that, in every prompt alike but for noise of a share of what
seeds do; its verdict is read from two samples, of seeds and of the change, as that of a report is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from diffaccel.eval.comparison import verdict
from diffaccel.eval.comparison.row import Estimate
from diffaccel.eval.comparison.row import Row as ComparisonRow
from diffaccel.eval.uncertainty.intervals import bootstrap_mean
from scripts.coverage_of_features import Row, generator

Array = NDArray[np.float64]
PROMPTS = (10, 30, 100)
SHARES = (0.05, 0.3, 1.0)  # of the deviation between seeds: that of the change


def called_same(populations: Mapping[str, Array], scale: float) -> Iterator[Row]:
    """Yield how often half of what seeds do is called the same, and beside it how often no change at all is.

    Args:
        populations: by name, large samples of what another seed changes in the score of a prompt.
        scale: times as many repeats.
    """
    repeats = max(20, int(scale * 1000))
    for name, population in populations.items():
        for n in PROMPTS:
            for share in SHARES:
                false, proven = shares_called_same(population, n, share, repeats, generator("same", name, n, share))
                yield {
                    "number": "half of what other seeds do, called the same", "population": name, "n": n,
                    "noise": share, "false": false, "no change": proven,
                    "holds": false <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / repeats), "repeats": repeats,
                }  # fmt: skip


def shares_called_same(
    population: Array, n: int, share: float, repeats: int, draw: np.random.Generator
) -> tuple[float, float]:
    """Return the shares of repeats in which half of what seeds do, and no change, are called the same.

    Args:
        population: what another seed changes in the score of a prompt, a large sample.
        n: prompts of a sample.
        share: deviation of the change from prompt to prompt, over that of the population.
        repeats: samples.
        draw: makes them.
    """
    centred = population - population.mean()
    change = 0.5 * 1.96 * float(centred.std()) / math.sqrt(n)
    called = np.zeros(2)
    for seed in range(repeats):
        seeds, noise = (centred[draw.integers(0, len(centred), n)] for _ in range(2))
        row = ComparisonRow(metric="hpsv2", key="hpsv2", family="alignment", run="run", better="higher", delta=0.0)
        floor = bootstrap_mean(seeds, seed=seed)
        row.set_floor(Estimate(floor.value, floor), is_difference=True)
        interval = bootstrap_mean(share * noise, seed=seed)
        for place, shift in enumerate((change, 0.0)):
            moved = replace(interval, low=interval.low + shift, high=interval.high + shift, null=0.0)
            row.set_interval("delta_interval", moved)
            called[place] += verdict.word(row.to_dict()) == verdict.SAME
    return float(called[0]) / repeats, float(called[1]) / repeats
