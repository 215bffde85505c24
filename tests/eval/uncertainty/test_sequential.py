"""The sequential test: its verdicts, and by simulation that several looks do not buy false ones."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from diffaccel.errors import DiffAccelError
from diffaccel.eval.uncertainty.sequential import Sequential, _student_quantile, doubling

Draw = Callable[[np.random.Generator, int], np.ndarray]
LOOKS = (64, 128, 256, 512)


def verdicts(
    draw: Draw, *, runs: int = 1500, tolerance: float = 0.2, looks: tuple[int, ...] = LOOKS, seeds: int = 1
) -> Counter[str]:
    rng = np.random.default_rng(0)
    test = Sequential(tolerance, looks)
    found: Counter[str] = Counter()
    for _ in range(runs):
        x = draw(rng, LOOKS[-1])
        for n in LOOKS:
            verdict = test.look(x[:n], clusters=[i // seeds for i in range(n)])
            if verdict != "go on":
                break
        found[verdict] += 1
    return found


def normal(mean: float) -> Draw:
    return lambda rng, n: rng.normal(mean, 1, n)


@pytest.mark.parametrize(
    "draw",
    [
        normal(0.2),
        normal(-0.2),
        lambda rng, n: rng.exponential(1, n) - 0.8,
        lambda rng, n: 1.2 - rng.exponential(1, n),
        lambda rng, n: 0.8 * rng.standard_t(4, n) / math.sqrt(2) + 0.2,
        lambda rng, n: np.where(rng.random(n) < 0.02, 10.0, 0.0),  # most pairs are identical, and the mean is 0.2
    ],
    ids=["normal", "below", "skewed up", "skewed down", "heavy tails", "rare"],
)
def test_runs_that_differ_by_the_tolerance_are_rarely_called_equivalent(draw: Draw) -> None:
    found = verdicts(draw)
    # binomial error of 1500 runs at 5 %: 0.6 %
    assert found["equivalent"] <= 0.05 * 1500
    assert found["different"] <= 0.06 * 1500


def test_uncorrected_looks_would_break_the_promise() -> None:
    rng, wrong = np.random.default_rng(0), 0
    single = [Sequential(0.2, (n,)) for n in LOOKS]
    for _ in range(1500):
        x = rng.normal(0.2, 1, LOOKS[-1])
        wrong += any(test.look(x[: test.looks[0]]) == "equivalent" for test in single)
    assert wrong > 0.08 * 1500


def test_seeds_of_one_prompt_are_no_independent_pairs() -> None:
    def draw(rng: np.random.Generator, n: int) -> np.ndarray:
        return 0.2 + np.repeat(rng.normal(0, 0.8, n // 4), 4) + rng.normal(0, 0.6, n)

    whole, blind = verdicts(draw, seeds=4), verdicts(draw, seeds=1)
    assert whole["equivalent"] <= 0.05 * 1500 < 0.1 * 1500 < blind["equivalent"]


def test_it_stops_early_for_equal_and_for_different_runs() -> None:
    equal = verdicts(lambda rng, n: rng.normal(0, 0.3, n), runs=200)
    assert equal["equivalent"] == 200
    assert verdicts(normal(1.0), runs=200)["different"] == 200
    assert Sequential(0.2, LOOKS).look(np.random.default_rng(1).normal(0, 0.3, 64)) == "equivalent"
    assert Sequential(0.2, LOOKS).look(np.random.default_rng(1).normal(0, 3, 64)) == "go on"
    assert Sequential(0.2, LOOKS).look(np.random.default_rng(1).normal(-1, 0.3, 64)) == "different"


def test_the_interval_without_skewness_is_students() -> None:
    half = np.random.default_rng(2).normal(0, 1, 32)
    x = np.concatenate([half, -half]) + 0.5
    got = Sequential(1.0, (64, 128)).interval(x)
    t = pytest.importorskip("scipy.stats").t.ppf(1 - 0.05 / 2, 63)
    error = x.std(ddof=1) / 8
    assert (got.value, got.low, got.high) == pytest.approx((0.5, 0.5 - t * error, 0.5 + t * error), rel=1e-4)
    assert got.level == pytest.approx(1 - 2 * 0.025) and "Bonferroni over 2 looks" in got.method


def test_students_quantile_against_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    for df in (15, 31, 63, 1023):
        for p in (0.95, 0.99, 0.995, 0.9975):
            assert _student_quantile(p, df) == pytest.approx(stats.t.ppf(p, df), rel=1e-4)


def test_identical_runs_are_equivalent_once_rare_differences_would_have_shown() -> None:
    test = Sequential(0.01, doubling(1024))
    # one look's share of 5 % is 1 %: 0.99^n <= 0.01 from n = 459 on
    assert [test.look(np.zeros(n)) for n in test.looks] == ["go on"] * 3 + ["equivalent"] * 2
    assert test.look(np.full(64, 0.5)) == "go on" and test.look(np.full(512, 0.5)) == "different"


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
        (lambda: doubling(32), "last 32"),
    ],
)
def test_errors_say_what_is_wrong(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(DiffAccelError, match=message):
        call()
