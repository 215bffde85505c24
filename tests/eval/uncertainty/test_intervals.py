"""Intervals against closed forms, and their coverage by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from diffaccel.errors import DiffAccelError
from diffaccel.eval.uncertainty import intervals
from diffaccel.eval.uncertainty.intervals import bootstrap_mean, median_ratio, paired_difference, spearman, wilson

Z = 1.959963984540054


def coverage(intervals_of: list[intervals.Interval], truth: float) -> float:
    return sum(i.low <= truth <= i.high for i in intervals_of) / len(intervals_of)


def clustered(rng: np.random.Generator, k: int, m: int, rho: float) -> tuple[np.ndarray, list[int]]:
    """``k m`` values of mean 0, variance 1 and correlation ``rho`` within a cluster of ``m``."""
    shared, own = rng.normal(size=(k, 1)), rng.normal(size=(k, m))
    values = math.sqrt(rho) * shared + math.sqrt(1 - rho) * own
    return values.ravel(), [c for c in range(k) for _ in range(m)]


def test_the_bootstrap_of_many_values_is_the_normal_interval() -> None:
    x = np.random.default_rng(0).gamma(2.0, size=2000)
    got = bootstrap_mean(torch.from_numpy(x), draws=20_000)
    half = Z * x.std() / math.sqrt(len(x))
    assert got.value == pytest.approx(x.mean(), rel=1e-14)
    assert got.low == pytest.approx(x.mean() - half, abs=0.04 * half)
    assert got.high == pytest.approx(x.mean() + half, abs=0.04 * half)
    assert got.method == "percentile bootstrap over 2000 values, 20000 draws"
    assert not got.significant


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
    # two clusters: both of a, one of each, both of b, with chances 1/4, 1/2, 1/4
    assert (got.low, got.high) == (0.0, 8.0)


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
    monkeypatch.setattr(intervals, "_BLOCK", 30 * 16)
    assert bootstrap_mean(x, draws=64) == whole


def test_coverage_of_the_mean_with_and_without_clusters() -> None:
    rng = np.random.default_rng(4)
    plain = [bootstrap_mean(rng.exponential(size=60), draws=400, seed=s) for s in range(600)]
    assert 0.91 <= coverage(plain, 1.0) <= 0.97
    drawn = [clustered(rng, 60, 4, 0.6) for _ in range(600)]
    whole = [bootstrap_mean(values, clusters=labels, draws=400, seed=s) for s, (values, labels) in enumerate(drawn)]
    blind = [bootstrap_mean(values, draws=400, seed=s) for s, (values, _) in enumerate(drawn)]
    assert 0.91 <= coverage(whole, 0.0) <= 0.97
    assert coverage(blind, 0.0) < 0.85  # taking seeds of one prompt as independent is wrong


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
    assert (got.low, got.value, got.high) == pytest.approx((2.5, 2.5, 2.5)) and got.significant
    assert not median_ratio(drift, drift).significant
    noisy = median_ratio([1.0, 1.2, 0.9, 1.1, 0.8, 1.05], [1.0] * 6)
    assert not noisy.significant and noisy.low < 1 < noisy.high and noisy.value == pytest.approx(1.025)


def test_coverage_of_the_median_ratio() -> None:
    rng = np.random.default_rng(7)
    got = [median_ratio(rng.lognormal(0.1, 0.2, 25), np.ones(25), draws=400, seed=s) for s in range(1500)]
    assert 0.92 <= coverage(got, math.exp(0.1)) <= 0.97


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
