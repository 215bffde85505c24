"""Intervals against closed forms, and their coverage by simulation."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from diffaccel.errors import DiffAccelError
from diffaccel.eval.uncertainty import intervals, studentised
from diffaccel.eval.uncertainty.intervals import bootstrap_mean, median_ratio, paired_difference, spearman, wilson
from diffaccel.eval.uncertainty.student import student_quantile

Z = 1.959963984540054


def coverage(intervals_of: list[intervals.Interval], truth: float) -> float:
    return sum(i.low <= truth <= i.high for i in intervals_of) / len(intervals_of)


def clustered(rng: np.random.Generator, k: int, m: int, rho: float) -> tuple[np.ndarray, list[int]]:
    """``k m`` values of mean 0, variance 1 and correlation ``rho`` within a cluster of ``m``."""
    shared, own = rng.normal(size=(k, 1)), rng.normal(size=(k, m))
    values = math.sqrt(rho) * shared + math.sqrt(1 - rho) * own
    return values.ravel(), [c for c in range(k) for _ in range(m)]


def test_the_bootstrap_of_many_values_is_the_normal_interval_widened_for_skewness() -> None:
    x = np.random.default_rng(0).gamma(2.0, size=2000)
    got = bootstrap_mean(torch.from_numpy(x), draws=20_000)
    error = x.std() / math.sqrt(len(x))
    # the first Edgeworth term of Student's t: quantiles move by -g (2 z^2 + 1) / (6 sqrt(n))
    moved = ((x - x.mean()) ** 3).mean() / x.std() ** 3 * (2 * Z * Z + 1) / (6 * math.sqrt(len(x)))
    assert got.value == pytest.approx(x.mean(), rel=1e-14)
    assert got.low == pytest.approx(x.mean() - error * Z, rel=1e-3)  # not nearer than Student's
    assert got.high == pytest.approx(x.mean() + error * (Z + moved), abs=0.02 * Z * error)
    assert got.method == "studentised bootstrap over 2000 values, 20000 draws"
    assert not got.significant and got.units == 2000 and not got.too_few


def test_clusters_widen_the_interval_by_the_design_effect() -> None:
    rng = np.random.default_rng(1)
    m, rho = 4, 0.5
    values, labels = clustered(rng, 1500, m, rho)
    plain = bootstrap_mean(values, draws=4000)
    whole = bootstrap_mean(values, clusters=labels, draws=4000)
    ratio = (whole.high - whole.low) / (plain.high - plain.low)
    assert ratio == pytest.approx(math.sqrt(1 + (m - 1) * rho), rel=0.05)


def test_unequal_clusters_keep_the_mean_of_all_values() -> None:
    got = bootstrap_mean([0.0, 0.0, 0.0, 8.0], clusters=["a", "a", "a", "b"], draws=4000)
    assert got.value == 2.0
    # both of a and both of b have no spread, one of each has t = 0: Student's interval of two clusters is left, with
    # residuals of -6 and 6 and a standard error of sqrt(2 (36 + 36)) / 4 = 3
    # and two carriers, with which 0.025 becomes 0.025 2 / (2 + 4)
    half = 3 * math.tan((0.5 - 0.025 / 3) * math.pi)
    assert got.carriers == 2
    assert (got.low, got.high) == pytest.approx((2 - half, 2 + half), rel=1e-9)
    assert got.units == 2 and got.too_few == "too few prompts (n = 2) for a verdict"


def test_the_interval_depends_on_the_seed_and_not_on_the_order() -> None:
    rng = np.random.default_rng(2)
    x, labels = rng.normal(size=50), [f"p{i % 13}" for i in range(50)]
    order = rng.permutation(50)
    one = bootstrap_mean(x, clusters=labels)
    other = bootstrap_mean(x[order], clusters=[labels[i] for i in order])
    assert (one.low, one.high) == pytest.approx((other.low, other.high), abs=1e-14)
    assert bootstrap_mean(x, seed=1) == bootstrap_mean(x[order].tolist(), seed=1)
    assert bootstrap_mean(x, seed=1).low != bootstrap_mean(x, seed=2).low


def test_the_bootstrap_does_not_depend_on_its_block(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(3).normal(size=30)
    whole = bootstrap_mean(x, draws=64)
    monkeypatch.setattr(studentised, "_BLOCK", 30 * 16)
    assert bootstrap_mean(x, draws=64) == whole


@pytest.mark.slow
def test_coverage_of_the_mean_with_and_without_clusters() -> None:
    rng = np.random.default_rng(4)
    plain = [bootstrap_mean(rng.exponential(size=60), draws=400, seed=s) for s in range(600)]
    assert 0.92 <= coverage(plain, 1.0) <= 0.985
    drawn = [clustered(rng, 60, 4, 0.6) for _ in range(600)]
    whole = [bootstrap_mean(values, clusters=labels, draws=400, seed=s) for s, (values, labels) in enumerate(drawn)]
    blind = [bootstrap_mean(values, draws=400, seed=s) for s, (values, _) in enumerate(drawn)]
    assert 0.92 <= coverage(whole, 0.0) <= 0.985
    assert coverage(blind, 0.0) < 0.85  # taking seeds of one prompt as independent is wrong


MIXTURE = 0.02  # share of outliers, five standard deviations up
DRAWS_OF: dict[str, tuple[Callable[[np.random.Generator, int], np.ndarray], float]] = {
    "normal": (lambda rng, n: rng.normal(size=n), 0.0),
    "lognormal": (lambda rng, n: rng.lognormal(0, 1, n), math.exp(0.5)),
    "outliers": (lambda rng, n: rng.normal(size=n) + 5 * (rng.random(n) < MIXTURE), 5 * MIXTURE),
    "failures": (lambda rng, n: 0.01 * rng.normal(size=n) - (rng.random(n) < 0.05), -0.05),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "n", "least"),
    [
        ("normal", 4, 0.92), ("normal", 10, 0.93), ("normal", 30, 0.93), ("normal", 100, 0.93),
        ("lognormal", 4, 0.88), ("lognormal", 10, 0.92), ("lognormal", 30, 0.93), ("lognormal", 100, 0.93),
        ("outliers", 10, 0.92), ("outliers", 30, 0.92), ("outliers", 100, 0.92), ("failures", 100, 0.92),
    ],
)  # fmt: skip
def test_coverage_by_number_of_values(name: str, n: int, least: float) -> None:
    """Percentile intervals cover 80 % of 4 normal values and 82 % of 10 lognormal ones; binomial error here 0.8 %.

    With the level of each end as it is, 10 lognormal values are covered in 91 % and five failures of 100 in 87 %.
    """
    draw, truth = DRAWS_OF[name]
    rng = np.random.default_rng(10)
    got = [bootstrap_mean(draw(rng, n), draws=400, seed=s) for s in range(800)]
    assert least <= coverage(got, truth) <= 0.99


def test_equivariance_under_shift_scale_and_turn() -> None:
    rng = np.random.default_rng(11)
    x, labels = rng.lognormal(size=40), [i % 11 for i in range(40)]
    for clusters in (None, labels):
        plain = bootstrap_mean(x, clusters=clusters)
        ends = np.array([plain.low, plain.value, plain.high])
        doubled = bootstrap_mean(4 * x, clusters=clusters)
        assert [doubled.low, doubled.value, doubled.high] == list(4 * ends)  # to the bit: 4 x has no rounding
        moved = bootstrap_mean(0.7 * x + 100, clusters=clusters)
        np.testing.assert_allclose([moved.low, moved.value, moved.high], 0.7 * ends + 100, rtol=1e-13)
        turned = bootstrap_mean(-x, clusters=clusters)
        assert [turned.high, turned.value, turned.low] == list(-ends)


def test_values_without_spread_have_an_interval_without_width() -> None:
    for value in (0.0, 0.1, -3.7):
        got = bootstrap_mean([value] * 7)
        assert (got.low, got.value, got.high) == (value, value, value)
    got = bootstrap_mean([0.1] * 6, clusters=[1, 1, 1, 2, 2, 3])
    assert (got.low, got.value, got.high) == pytest.approx((0.1, 0.1, 0.1), abs=1e-16)


@pytest.mark.parametrize("scale", [2.0**-1000, 2.0**-30, 2.0**30, 2.0**1000])
def test_values_of_any_size_have_the_interval_of_their_size(scale: float) -> None:
    """Squares of numbers beyond 1e154 or below 1e-162 have no floats."""
    values = np.random.default_rng(0).exponential(size=40)
    plain, scaled = bootstrap_mean(values), bootstrap_mean(scale * values)
    assert (scaled.value, scaled.low, scaled.high) == (scale * plain.value, scale * plain.low, scale * plain.high)
    assert scaled.carriers == plain.carriers


def test_times_without_a_ratio_are_refused() -> None:
    for a, b in ((1e308, 1e-308), (5e-324, 1e300)):
        with pytest.raises(DiffAccelError, match="have no ratio"):
            median_ratio([a] * 6, [b] * 6)


@pytest.mark.parametrize("noise", [0.0, 1e-9, 1e-4])
def test_a_rare_difference_has_a_finite_interval(noise: float) -> None:
    """A third of the resamples miss the one pair of 50 that differs: they have no t, tiny noise on the rest or not."""
    x = noise * np.random.default_rng(12).normal(size=50)
    x[7] = 1.0
    got = bootstrap_mean(x)
    few = 0.98**2 / (0.98**4 + 49 * 0.02**4)  # (sum r^2)^2 / sum r^4 of the pair and the 49 others
    student = student_quantile(1 - 0.025 * few / (few + 4), 49) * x.std(ddof=1) / math.sqrt(50)
    assert got.carriers == pytest.approx(few, abs=1e-3)
    assert got.high == pytest.approx(x.mean() + student, rel=1e-3) and got.low < 0.0 <= got.value


@pytest.mark.parametrize(
    ("df", "quantile"),
    [(1, 12.7062047364), (2, 4.3026527297), (3, 3.1824463053), (5, 2.5705818356), (9, 2.2621571628),
     (29, 2.0452296421), (60, 2.0002978211), (120, 1.9799304051)],
)  # fmt: skip
def test_quantiles_of_student_against_a_table(df: int, quantile: float) -> None:
    assert student_quantile(0.975, df) == pytest.approx(quantile, rel=1e-9)
    assert student_quantile(0.025, df) == -student_quantile(0.975, df)


def test_wilson_against_published_values_and_its_defining_equation() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
    for successes, n, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        got = wilson(successes, n)
        assert (got.low, got.high) == pytest.approx((low, high), abs=5e-5)
    got = wilson(29, 29)
    assert got.high == 1.0 and got.low == pytest.approx(29 / (29 + Z * Z))
    got = wilson(7.5, 31, level=0.9)
    z = 1.6448536269514722
    for end in (got.low, got.high):  # where the score test just rejects
        assert abs(7.5 / 31 - end) / math.sqrt(end * (1 - end) / 31) == pytest.approx(z, rel=1e-9)


def test_paired_difference_sees_what_unpaired_noise_hides() -> None:
    rng = np.random.default_rng(5)
    b = rng.normal(scale=10, size=400)
    a = b + 0.2 + rng.normal(scale=0.5, size=400)
    got = paired_difference(a, b)
    assert got.interval.value == pytest.approx((a - b).mean(), rel=1e-12)
    assert got.interval.significant and got.interval.high - got.interval.low < 0.12
    assert got.wins.value == pytest.approx((a > b).mean())
    assert got.wins.significant and got.n == 400 and got.ties == 0
    assert paired_difference(a, b, better="lower").wins.value == pytest.approx(1 - got.wins.value)
    assert paired_difference(b, a).interval.value == pytest.approx(-got.interval.value)


def test_ties_are_half_a_win_in_both_directions() -> None:
    a, b = [1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 2.0, 5.0]
    for better in ("higher", "lower"):
        got = paired_difference(a, b, better=better)  # type: ignore[arg-type]
        assert got.wins.value == 0.5 and got.ties == 2 and not got.wins.significant
    same = paired_difference(a, a)
    assert (same.interval.low, same.interval.value, same.interval.high) == (0, 0, 0)
    assert same.wins.value == 0.5 and same.ties == 4 and not same.interval.significant


@pytest.mark.slow
def test_win_rate_of_clusters_covers_and_that_of_pairs_does_not() -> None:
    rng = np.random.default_rng(6)
    whole, blind = [], []
    for seed in range(500):
        values, labels = clustered(rng, 60, 5, 0.7)
        zeros = np.zeros_like(values)
        whole.append(paired_difference(values, zeros, clusters=labels, draws=2, seed=seed).wins)
        blind.append(paired_difference(values, zeros, draws=2, seed=seed).wins)
    assert 0.92 <= coverage(whole, 0.5) <= 0.98
    assert coverage(blind, 0.5) < 0.85


def test_copies_of_a_pair_add_nothing_to_the_win_rate() -> None:
    a, labels = [1.0, 2.0, -1.0, 3.0, 1.0, -2.0], list(range(6))
    once = paired_difference(a, [0.0] * 6, clusters=labels).wins
    thrice = paired_difference(a * 3, [0.0] * 18, clusters=labels * 3).wins
    assert thrice.value == once.value
    # k/(k-1) of the clusters' variance against n/(n-1) of the pairs' is all that differs
    assert thrice.high - thrice.low >= (once.high - once.low) * 0.98
    sure = paired_difference([1.0] * 18, [0.0] * 18, clusters=labels * 3).wins
    assert sure.low == pytest.approx(wilson(6, 6).low)


def test_median_ratio_of_turns_is_exact_for_a_machine_that_drifts() -> None:
    drift = np.linspace(1, 3, 20)
    got = median_ratio(2.5 * drift, drift)
    assert got.interval is not None and got.interval.significant and got.value == got.interval.value
    assert (got.interval.low, got.value, got.interval.high) == pytest.approx((2.5, 2.5, 2.5))
    same = median_ratio(drift, drift).interval
    assert same is not None and not same.significant
    noisy = median_ratio([1.0, 1.2, 0.9, 1.1, 0.8, 1.05], [1.0] * 6)
    assert noisy.value == pytest.approx(1.025) and noisy.interval is not None and not noisy.interval.significant
    # of 6 values, the extremes enclose the median with 31/32 and the next with 25/32: I = 0.1, w = 0.5 / 1.4
    weight = 0.5 / 1.4
    ends = 0.8 ** (1 - weight) * 0.9**weight, 1.2 ** (1 - weight) * 1.1**weight
    assert (noisy.interval.low, noisy.interval.high) == pytest.approx(ends, rel=1e-9)
    turned = median_ratio([1.0] * 6, [1.0, 1.2, 0.9, 1.1, 0.8, 1.05]).interval
    assert turned is not None and (turned.low, turned.high) == pytest.approx((1 / ends[1], 1 / ends[0]), rel=1e-9)


def test_fewer_than_six_turns_have_a_ratio_and_no_interval() -> None:
    few = median_ratio([2.0, 2.2, 2.1, 2.0, 2.4], [1.0] * 5)
    assert few.interval is None and few.value == 2.1 and few.method == "median of 5 turns; an interval needs 6"
    ends = {"low": None, "high": None, "significant": None}
    assert few.to_dict() == {"value": 2.1, "method": few.method} | ends


def test_the_interval_of_a_ratio_holds_its_median() -> None:
    """Five fast turns and one that waited for the disk: the mean logarithm is far above the median."""
    got = median_ratio([1.0, 1.0, 1.0, 1.0, 1.0, 1000.0], [1.0] * 6)
    assert got.value == 1.0 and got.interval is not None and got.interval.low <= 1.0 and not got.interval.significant


@pytest.mark.parametrize("turns", [6, 10, 25])
def test_coverage_of_the_ratio_of_turns(turns: int) -> None:
    """Of normal times, and of skewed ones, whose mean logarithm is not the median."""
    rng = np.random.default_rng(7)
    for times, median in (
        (rng.lognormal(0.1, 0.2, (1000, turns)), math.exp(0.1)),
        (np.exp(rng.exponential(0.1, (1000, turns))), 2**0.1),
    ):
        got = [median_ratio(row, np.ones(turns)).interval for row in times]
        assert 0.93 <= coverage([i for i in got if i is not None], median) <= 0.97 and None not in got


def test_spearman_against_scipy_with_ties() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(8)
    x, y = rng.integers(0, 6, 40), rng.normal(size=40)
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    assert spearman([1, 2, 3], [10, 20, 300]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, -1]) == pytest.approx(-1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_mean([1.0]), "at least 2 values or clusters, got 1"),
        (lambda: bootstrap_mean([1.0, 2.0], clusters=["a", "a"]), "at least 2 values or clusters, got 1"),
        (lambda: bootstrap_mean([1.0, math.nan, math.inf]), "2 of 3 values are not finite, the first at 1: nan"),
        (lambda: bootstrap_mean([[1.0, 2.0]]), r"\(n,\); got shape \(1, 2\)"),
        (lambda: bootstrap_mean(["a", "b"]), "must be numbers"),
        (lambda: bootstrap_mean([]), r"got shape \(0,\)"),
        (lambda: bootstrap_mean([1.0, 2.0], clusters=["a"]), "2 values, but 1 cluster labels"),
        (lambda: bootstrap_mean([1.0, 2.0], level=95), "between 0 and 1"),
        (lambda: bootstrap_mean([1.0, 2.0], draws=0), "at least 1 draw"),
        (lambda: paired_difference([1.0, 2.0], [1.0]), "got 2 and 1. Pair them by id"),
        (lambda: paired_difference([1.0, 2.0], [1.0, math.nan]), "1 of 2 second values are not finite"),
        (lambda: paired_difference([1.0, 2.0], [1.0, 3.0], better="up"), "not 'up'"),
        (lambda: wilson(3, 2), "got 3 of 2"),
        (lambda: wilson(0, 0), "n > 0"),
        (lambda: median_ratio([1.0, 2.0], [0.0, 1.0]), "must be positive; the smallest is 0"),
        (lambda: median_ratio([1.0], [1.0]), "at least 2 turns, got 1"),
        (lambda: spearman([1.0, 1.0], [1.0, 2.0]), "2 different values"),
    ],
)
def test_errors_say_what_is_wrong(call, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(DiffAccelError, match=message):
        call()
