"""The sequential test: its verdicts, and by simulation that several looks do not buy false ones."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest

from diffaccel.errors import DiffAccelError
from diffaccel.eval.uncertainty import sequential
from diffaccel.eval.uncertainty.sequential import STAKE, Sequential, doubling

Draw = Callable[[np.random.Generator, int], np.ndarray]
LOOKS = (64, 128, 256)
LEVEL_RUNS, VERDICT_RUNS = 2000, 300


def verdicts(draw: Draw, *, tolerance: float = 0.2, seeds: int = 1, runs: int = VERDICT_RUNS) -> Counter[str]:
    rng = np.random.default_rng(0)
    test = Sequential(tolerance, LOOKS, bounds=(-1.0, 1.0))
    counts: Counter[str] = Counter()
    for _ in range(runs):
        x = draw(rng, LOOKS[-1]).clip(-1, 1)
        for n in LOOKS:
            verdict = test.look(x[:n], clusters=[i // seeds for i in range(n)])
            if verdict != "go on":
                break
        counts[verdict] += 1
    return counts


def normal(mean: float, spread: float = 0.3) -> Draw:
    return lambda rng, n: rng.normal(mean, spread, n)


# differences in [-1, 1] whose mean is known
KNOWN: dict[str, tuple[Draw, float]] = {
    "uniform": (lambda rng, n: rng.uniform(-0.4, 0.8, n), 0.2),
    "skewed up": (lambda rng, n: rng.beta(0.3, 2.7, n), 0.1),
    "skewed down": (lambda rng, n: -rng.beta(0.3, 2.7, n), -0.1),
    "rare": (lambda rng, n: -(rng.random(n) < 0.02).astype(float), -0.02),
    "ruined, tiny noise": (
        lambda rng, n: np.where(rng.random(n) < 0.02, -0.9, rng.uniform(-1e-4, 1e-4, n)), -0.018
    ),
    "half ruined": (lambda rng, n: np.where(rng.random(n) < 0.5, -1.0, 0.9), -0.05),
}  # fmt: skip


@pytest.mark.parametrize("name", KNOWN)
def test_the_mean_is_rarely_left_out_at_any_time(name: str) -> None:
    draw, mean = KNOWN[name]
    rng, level_missed = np.random.default_rng(1), {"above": 0, "below": 0}
    for _ in range(LEVEL_RUNS):
        x = (draw(rng, 500) + 1) / 2
        for side, values in (("above", x), ("below", 1 - x)):
            m = (mean + 1) / 2 if side == "above" else (1 - mean) / 2
            level_missed[side] += sequential._rules_out(values, m, sequential._plug_in_bets(values, 0.05), 0.05)
    # three binomial standard errors of 2000 runs at 5 % are 1.5 %
    assert max(level_missed.values()) <= (0.05 + 0.015) * LEVEL_RUNS


@pytest.mark.slow
@pytest.mark.parametrize(
    ("draw", "tolerance"),
    [
        (lambda rng, n: -1.0 * (rng.random(n) < 0.02) + rng.uniform(-1e-3, 1e-3, n), 0.0199),
        (lambda rng, n: -rng.beta(0.3, 2.7, n), 0.1),
        (normal(0.2), 0.2),
        (normal(-0.2), 0.2),
    ],
    ids=["ruined", "skewed", "normal", "below"],
)
def test_runs_that_differ_by_the_tolerance_are_rarely_called_equivalent(draw: Draw, tolerance: float) -> None:
    counts = verdicts(draw, tolerance=tolerance)
    # two binomial standard errors of 300 runs at 5 % are 2.5 %
    assert counts["equivalent"] <= (0.05 + 0.025) * VERDICT_RUNS
    assert counts["different"] <= (0.05 + 0.025) * VERDICT_RUNS


@pytest.mark.slow
def test_seeds_of_one_prompt_are_no_independent_pairs() -> None:
    def draw(rng: np.random.Generator, n: int) -> np.ndarray:
        return 0.2 + np.repeat(rng.choice([-0.5, 0.5], n // 4), 4) + rng.uniform(-0.1, 0.1, n)

    whole, blind = verdicts(draw, seeds=4), verdicts(draw, seeds=1)
    assert whole["equivalent"] <= 0.075 * VERDICT_RUNS < 0.15 * VERDICT_RUNS < blind["equivalent"]


def test_it_stops_early_for_equal_and_for_different_runs() -> None:
    assert verdicts(normal(0, 0.05), runs=50)["equivalent"] == 50
    assert verdicts(normal(0.6), runs=50)["different"] == 50
    rng, test = np.random.default_rng(1), Sequential(0.2, LOOKS)
    assert test.look(rng.normal(0, 0.05, 64)) == "equivalent"
    assert test.look(rng.normal(0.15, 0.2, 64).clip(-1, 1)) == "go on"
    assert test.look(rng.normal(-0.6, 0.1, 64)) == "different"


def test_intervals_of_later_looks_lie_in_those_of_earlier_ones() -> None:
    rng = np.random.default_rng(2)
    for draw, _ in KNOWN.values():
        x, test = draw(rng, LOOKS[-1]), Sequential(0.2, LOOKS)
        ends = [test.interval(x[:n]) for n in LOOKS]
        assert all(a.low <= b.low <= b.high <= a.high for a, b in pairwise(ends))
        assert -1 <= ends[0].low and ends[0].high <= 1


def test_the_interval_by_its_defining_equation() -> None:
    x = np.random.default_rng(3).uniform(-0.5, 0.7, 64)
    got = Sequential(1.0, (64, 128), bounds=(-1, 2)).interval(x)
    scaled = [(value + 1) / 3 for value in x]
    for end, values in ((got.low, scaled), (got.high, [1 - value for value in scaled])):
        m = (end + 1) / 3 if end == got.low else 1 - (end + 1) / 3
        capital, most = 1.0, 0.0
        for i, value in enumerate(values, 1):
            bet = min(math.sqrt(2 * math.log(20) / (_running(values[: i - 1]) * i * math.log(1 + i))), STAKE / m)
            capital *= 1 + bet * (value - m)
            most = max(most, capital)
        assert most == pytest.approx(20, rel=1e-6)
    assert got.level == pytest.approx(0.9) and got.value == pytest.approx(x.mean()) and got.units == 64
    assert got.method == "betting confidence sequence, 64 clusters, values from -1 to 2"


def _running(values: list[float]) -> float:
    """The paper's running variance: every value against the mean up to it."""
    squares, total = 0.25, 0.5
    for i, value in enumerate(values, 1):
        total += value
        squares += (value - total / (i + 1)) ** 2
    return squares / (len(values) + 1)


def test_equal_pairs_prove_what_their_number_allows() -> None:
    """Every bet is three quarters of the capital against values at the bound: (1 + 3/4 (1 - m) / m)^n = 20."""
    test = Sequential(0.02, doubling(1024), bounds=(-2.0, 0.0))
    for n in test.looks:
        gain = (20 ** (1 / n) - 1) / STAKE
        assert test.interval(np.zeros(n)).low == pytest.approx(2 / (1 + gain) - 2, rel=1e-6)
    assert [test.look(np.zeros(n)) for n in test.looks] == ["go on"] * 3 + ["equivalent"] * 2
    assert test.look(np.full(64, -0.5)) == "different"


def test_later_seeds_of_a_seen_prompt_add_nothing() -> None:
    rng, test = np.random.default_rng(4), Sequential(0.2, (64, 128))
    x = rng.uniform(-0.5, 0.5, 128)
    again = test.interval(x, clusters=[*range(64), *range(64)])
    first = test.interval(x[:64])
    assert (again.low, again.high, again.units) == (first.low, first.high, 64)


def test_looks() -> None:
    assert doubling(512) == (64, 128, 256, 512)
    assert doubling(500) == (64, 128, 256, 500)
    assert doubling(64) == (64,)
    assert Sequential(0.1).at_most(300).looks == (64, 128, 256, 300)
    assert Sequential(0.1).at_most(256).looks == (64, 128, 256)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Sequential(0), "must be positive, got 0"),
        (lambda: Sequential(math.nan), "must be positive"),
        (lambda: Sequential(1, (64, 64)), "growing numbers"),
        (lambda: Sequential(1, ()), "growing numbers"),
        (lambda: Sequential(1, level=95), "between 0.5 and 1"),
        (
            lambda: Sequential(1, (64, 128)).look([0.1] * 100),
            "100 pairs are no look .* at 64, 128",
        ),
        (lambda: Sequential(1, (64,)).look([math.nan] * 64), "64 of 64 differences are not finite"),
        (lambda: Sequential(1, (64,)).look([0.1] * 64, clusters=[0, 1] * 32), "2 given, at least 16 needed"),
        (lambda: Sequential(1, (64,)).look([0.1] * 64, clusters=[0]), "64 values, but 1 cluster labels"),
        (lambda: Sequential(1, (64,)).look([1.5] * 64), "beyond their bounds, -1 to 1"),
        (lambda: Sequential(1, bounds=(1, 0)), "finite, the least first; got 1 and 0"),
        (lambda: Sequential(1, bounds=(0, math.inf)), "finite, the least first"),
        (lambda: doubling(32), "last 32"),
    ],
)
def test_errors_say_what_is_wrong(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(DiffAccelError, match=message):
        call()
