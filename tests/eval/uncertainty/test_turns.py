"""Energy and peaks of memory over turns: closed forms, and coverage where a counter moves in ticks."""

from __future__ import annotations

import math

import numpy as np
import pytest

from diffaccel.errors import DiffAccelError
from diffaccel.eval.uncertainty.student import student_quantile
from diffaccel.eval.uncertainty.turns import (
    energy_ratio,
    mean_difference,
    mean_of_turns,
    of_ticks,
    range_of_turns,
    ratio_of_means,
)


def test_means_and_differences_have_students_interval_from_enough_turns() -> None:
    x = np.array([3.0, 1.0, 2.0, 5.0, 4.0, 3.0, 3.0, 2.0, 4.0, 3.0])
    half = student_quantile(0.975, 9) * x.std(ddof=1) / math.sqrt(10)
    mean, apart = mean_of_turns(x), mean_difference(x, 2 * x)
    assert mean is not None and apart is not None
    assert (mean.value, mean.low, mean.high) == pytest.approx((3.0, 3 - half, 3 + half)) and mean.null is None
    assert (apart.value, apart.low, apart.high, apart.null) == pytest.approx((-3.0, -3 - half, -3 + half, 0.0))
    assert mean_of_turns(x[:5]) is None and mean_difference(x[:9], x[:9]) is None
    assert mean_of_turns([0, 0, 0, 0, 0, 1.0]).low == 0  # type: ignore[union-attr]


def test_the_ratio_of_means_ignores_what_both_share_and_agrees_with_the_logarithms_of_small_noise() -> None:
    draw = np.random.default_rng(0)
    base = np.exp(draw.normal(size=12))
    exact = ratio_of_means(0.25 * base, base)
    assert exact.interval is not None and exact.value == pytest.approx(0.25)
    assert exact.interval.low == pytest.approx(0.25) and exact.interval.high == pytest.approx(0.25)
    base = 100 + draw.normal(size=12)
    own = 50 + draw.normal(size=12)
    found, logs = ratio_of_means(own, base).interval, np.log(own / base)
    assert found is not None and found.significant
    half = student_quantile(0.975, 11) * logs.std(ddof=1) / math.sqrt(12)
    assert math.log(found.high / found.low) == pytest.approx(2 * half, rel=0.03)
    assert ratio_of_means(own[:5], base[:5]).interval is None and "needs 6" in ratio_of_means(own[:5], base[:5]).method
    assert energy_ratio([0.0] * 6, list(base[:6]), (3.0, 3.0)) is None and energy_ratio(None, [1.0], (3.0, 3.0)) is None
    few = list(own[:6]), list(base[:6])
    assert energy_ratio(*few, (3.0, 3.0)).interval and energy_ratio(*few, (3.0, 1.0)).interval is None  # type: ignore[union-attr]


@pytest.mark.parametrize(("own", "base"), [([1.0], [1.0]), ([1.0, 2.0], [1.0]), ([0.0, 0.0], [1.0, 2.0])])
def test_a_ratio_that_cannot_be_is_one_sentence(own, base) -> None:
    with pytest.raises(DiffAccelError, match=r"[Tt]urns|means"):
        ratio_of_means(own, base)


def test_readings_of_a_slow_counter_cover_the_energy_that_was_used() -> None:
    """Six calls of 40.1 and 20.2 ticks, without other noise: the same reading in all six says nothing of the tick."""
    draw, covered, ratios = np.random.default_rng(1), 0, 0
    for _ in range(400):
        base, own = (np.floor(draw.random(6) + length) for length in (40.1, 20.2))
        mean, ratio = mean_of_turns(base, of_ticks(4.01)), energy_ratio(list(own), list(base), (2.02, 4.01))
        covered += mean is not None and mean.low <= 40.1 <= mean.high
        ratios += (
            ratio is not None
            and ratio.interval is not None
            and ratio.interval.low <= 20.2 / 40.1 <= ratio.interval.high
        )
    assert covered / 400 >= 0.92 and ratios / 400 >= 0.92


def test_each_side_has_the_tick_of_its_own_length() -> None:
    """Ten readings that agree: a long call beside a short one adds next to nothing to the interval."""
    own, base = [20.0] * 10, [200.0] * 10
    short, long = of_ticks(2.0), of_ticks(20.0)
    half = student_quantile(0.975, 9) / math.sqrt(10)
    ratio, apart = energy_ratio(own, base, (2.0, 20.0)), mean_difference(own, base, (short, long))
    assert ratio is not None and ratio.interval is not None and apart is not None
    assert math.log(ratio.interval.high / 0.1) == pytest.approx(half * math.sqrt(short + long))
    assert apart.high + 180 == pytest.approx(half * math.sqrt(short * 20**2 + long * 200**2))


def test_a_range_holds_the_median_as_often_as_it_says() -> None:
    draw = np.random.default_rng(2)
    samples = draw.exponential(size=(4000, 6))
    held = ((samples.min(1) <= math.log(2)) & (samples.max(1) >= math.log(2))).mean()
    found = range_of_turns(samples[0])
    assert found is not None and found.level == 1 - 2**-5 and held == pytest.approx(found.level, abs=0.01)
    assert (found.value, found.low, found.high) == (samples[0].max(), samples[0].min(), samples[0].max())
    same = range_of_turns([2.0] * 10)
    assert same is not None and same.low == same.high == 2.0 and same.method == "the same in all 10 turns"
    assert range_of_turns([2.0] * 5) is None
