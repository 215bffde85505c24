"""Closed forms of step caches: which steps are real, and what forecasts weigh."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.modules.network_call import NetworkCall, Tally
from diffaccel.modules.step_cache.cache import StepCache
from diffaccel.modules.step_cache.decisions import Decision, EveryNth, FixedSteps, GrowingWindow, Place, StageSteps
from diffaccel.modules.step_cache.forecasts import Chebyshev, Differences, Last
from diffaccel.modules.step_cache.indicators import ChangeBound, filtered, frequency_gain

SPECTRUM_REAL = [0, 1, 2, 3, 4, 6, 8, 11, 15, 20]


def real_steps(decision: Decision, steps: int, look: Callable[[int], Tensor] | None = None) -> list[int]:
    """Which of ``steps`` steps are real, where every skip is possible."""
    real: list[int] = []
    for step in range(steps):
        skipped = step - real[-1] - 1 if real else 0
        if decision.is_real(Place(step, steps, skipped, len(real)), lambda step=step: look(step)):
            real.append(step)
    return real


@pytest.mark.parametrize(
    ("growth", "steps", "expected"),
    [
        (0.75, 50, [*SPECTRUM_REAL, 25, 31, 38, 46]),
        (3.0, 50, [0, 1, 2, 3, 4, 6, 11, 19, 30, 44]),
    ],
)
def test_the_window_grows_as_published(growth: float, steps: int, expected: list[int]) -> None:
    assert real_steps(GrowingWindow(2.0, growth, 5), steps) == expected


def test_shorter_runs_have_the_published_number_of_real_steps() -> None:
    counts = [len(real_steps(GrowingWindow(2.0, growth, 5), 28)) for growth in (0.75, 3.0)]
    assert counts == [11, 8]


def test_every_nth_and_fixed_patterns() -> None:
    assert real_steps(EveryNth(4, 3), 12) == [0, 1, 2, 6, 10]
    assert real_steps(EveryNth(1, 1), 5) == [0, 1, 2, 3, 4]
    assert real_steps(FixedSteps(frozenset({0, 3, 7})), 8) == [0, 3, 7]


def test_a_pattern_of_more_steps_than_there_are() -> None:
    """It is refused where it was made for another call; of several stages a short one makes its first part."""
    decision = FixedSteps(frozenset({0, 3, 9}))
    with pytest.raises(DiffAccelError, match="names step 9, and the call makes 8, from 0 to 7"):
        decision.is_real(Place(0, 8), torch.Tensor)
    assert [decision.is_real(Place(step, 4, stages=2), torch.Tensor) for step in range(4)] == [True, False, False, True]
    with pytest.raises(DiffAccelError, match="names step 4, and stage 1 of the call makes 3"):
        StageSteps.of([0, 4, 0]).is_real(Place(0, 3, stages=2), torch.Tensor)


def test_a_list_with_several_zeros_has_a_pattern_for_each_stage() -> None:
    decision = StageSteps.of([0, 1, 4, 0, 2])
    asked = [
        [decision.is_real(Place(step, 5, stage=stage, stages=2), torch.Tensor) for step in range(5)] for stage in (0, 1)
    ]
    assert asked == [[True, True, False, False, True], [True, False, True, False, False]]
    for stages in (1, 3):
        with pytest.raises(DiffAccelError, match=f"real_steps has steps of 2 stages, and the call has {stages}"):
            decision.is_real(Place(0, 5, stages=stages), torch.Tensor)


# -- forecasts ---------------------------------------------------------------------------------------------------------


def polynomial(degree: int) -> Callable[[Any], Any]:
    return lambda t: sum((0.3 - 0.1 * k) * (t / 25.0) ** k for k in range(degree + 1))


@pytest.mark.parametrize("center", ["last", "none"])
@pytest.mark.parametrize("degree", [0, 1, 2, 3, 4])
def test_a_ridge_without_a_penalty_reproduces_polynomials(degree: int, center: Any) -> None:
    h = polynomial(degree)
    weights = Chebyshev(degree=4, ridge=1e-14, center=center).weights(SPECTRUM_REAL, 25, 50)
    value = torch.tensor([w for w in weights]).float() @ torch.tensor([h(t) for t in SPECTRUM_REAL]).float()
    assert abs(float(value) - h(25)) < 1e-5


def test_only_the_centred_ridge_reproduces_a_constant() -> None:
    def error(center: Any, h: Callable[[float], float]) -> float:
        weights = Chebyshev(center=center).weights(SPECTRUM_REAL, 25, 50)
        return abs(sum(w * h(t) for w, t in zip(weights, SPECTRUM_REAL, strict=True)) - h(25))

    assert error("last", lambda t: 3.0) < 1e-12
    assert error("none", lambda t: 3.0) == pytest.approx(0.46, abs=0.01)


def test_without_its_regression_it_is_linear_extrapolation() -> None:
    expected = Differences(order=1).weights([0, 1, 4, 7], 9, 20)
    assert Chebyshev(blend=0.0).weights([0, 1, 4, 7], 9, 20) == pytest.approx(expected)
    assert expected[2:] == pytest.approx([-2 / 3, 5 / 3]) and expected[:2] == [0.0, 0.0]


def test_time_runs_from_minus_one_to_one_over_the_runs_own_steps() -> None:
    import numpy as np

    assert Chebyshev().basis(np.array([0.0, 28.0]), 28)[:, 1].tolist() == [-1.0, 1.0]


def test_a_window_bounds_what_is_weighed() -> None:
    weights = Chebyshev(window=4).weights(list(range(10)), 12, 50)
    assert weights[:6] == [0.0] * 6 and Chebyshev(window=4).keeps == 4 and all(weights[6:])


@pytest.mark.parametrize("order", [1, 2, 3])
def test_newton_is_exact_for_polynomials_at_any_spacing(order: int) -> None:
    h, real = polynomial(order), [0, 1, 2, 6, 7, 11]
    weights = Differences(order).weights(real, 14, 50)
    assert sum(w * h(t) for w, t in zip(weights, real, strict=True)) == pytest.approx(h(14))
    assert len([w for w in weights if w]) == order + 1


def test_taylor_is_the_published_sum() -> None:
    real, features = [0, 3, 5], [1.0, 2.0, 4.0]
    first = (4.0 - 2.0) / 2
    second = (first - (2.0 - 1.0) / 3) / 2
    weights = Differences(2, "taylor").weights(real, 7, 50)
    assert sum(w * h for w, h in zip(weights, features, strict=True)) == pytest.approx(4 + 2 * first + 2 * second)
    assert Differences(1, "taylor").weights(real, 7, 50) == pytest.approx(Differences(1).weights(real, 7, 50))
    assert Differences(2).weights([4], 7, 50) == [1.0] == Last().weights([4], 7, 50)


# -- indicators --------------------------------------------------------------------------------------------------------


def test_gains_at_both_ends_of_the_noise() -> None:
    clean, noise = (frequency_gain(16, torch.tensor(s), 2.0) for s in (0.0, 1.0))
    assert torch.allclose(clean / clean.mean(), torch.ones(16), atol=1e-4)
    assert noise[0] / noise.sum() > 1 - 1e-4


def test_the_filter_keeps_the_mean_gain_and_zero_noise_changes_nothing() -> None:
    x = torch.randn(1, 2, 8, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(filtered(x, torch.tensor(0.0), 2.0), x, rtol=1e-3, atol=1e-3)
    impulse = torch.zeros(1, 1, 8, 6)
    impulse[..., 0, 0] = 1.0
    for share in (0.2, 0.9):  # the value at the origin of an impulse's response is the mean of the gains
        assert float(filtered(impulse, torch.tensor(share), 2.0)[0, 0, 0, 0]) == pytest.approx(1.0, abs=1e-5)


def test_equal_inputs_are_no_change_and_a_threshold_of_zero_skips_nothing() -> None:
    still = lambda step: torch.ones(3)  # noqa: E731
    assert real_steps(ChangeBound(1e-6, same_step=True), 6, still) == [0, 5]
    assert real_steps(ChangeBound(1e-6), 6, still) == [0, 1, 5]  # its first change is known a step late
    assert real_steps(ChangeBound(0.0), 6, still) == real_steps(ChangeBound(0.0, same_step=True), 6, still)
    assert real_steps(ChangeBound(0.0), 6, still) == list(range(6))
    assert real_steps(ChangeBound(1e9, first=2, last=2, same_step=True), 7, lambda t: torch.tensor(2.0**t)) == [
        0,
        1,
        5,
        6,
    ]
    assert real_steps(ChangeBound(1e-6, last=0, most_skips=2, same_step=True), 7, still) == [0, 3, 6]


@pytest.mark.parametrize("same_step", [True, False])
def test_changes_add_up_until_the_threshold(same_step: bool) -> None:
    """Each step changes the indicator by 10 %: with 0.35 every fourth step is real, late or not."""
    decision = ChangeBound(0.35, last=0, same_step=same_step)
    real = real_steps(decision, 14, lambda step: torch.tensor([1.1**step]))
    assert {b - a for a, b in itertools.pairwise(real[1:])} == {4}


@pytest.mark.parametrize("same_step", [True, False])
def test_changes_from_the_last_real_step(same_step: bool) -> None:
    """The indicator grows by 1 a step from 100: with 0.035 every fourth step is real at first."""
    decision = ChangeBound(0.035, accumulates=False, last=0, same_step=same_step)
    real = real_steps(decision, 12, lambda step: torch.tensor([100.0 + step]))
    assert real[-2:] == ([4, 8] if same_step else [5, 9]) and not math.isnan(real[0])


# -- state -------------------------------------------------------------------------------------------------------------


def call(step: int, context: str = "cond", trajectory: int = 1, tally: Tally | None = None) -> NetworkCall:
    tally = tally or TALLY
    return NetworkCall(step, 10, None, torch.tensor(0.0), context, trajectory, tally)


TALLY = Tally(torch.device("cpu"), ("test",))


def ask(cache: StepCache, at: NetworkCall, given: Tensor, output: Tensor) -> Tensor:
    """What the blocks return for ``given``, where ``output`` is what they compute."""
    asked = cache.begin(at, given)
    if asked.skips:
        return cache.forecast_output(asked)
    cache.finish(asked, output)
    return output


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_last_residual_with_equal_inputs_is_the_last_output(dtype: torch.dtype) -> None:
    given, output = (torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(2))
    cache = StepCache(lambda: FixedSteps(frozenset({0})), Last(), "residual", None)
    assert ask(cache, call(0), given, output) is output
    again = ask(cache, call(1), given, torch.zeros_like(output))
    assert again.dtype == dtype
    assert torch.equal(again, output) if dtype == torch.bfloat16 else torch.allclose(again, output, atol=1e-6)


def test_another_context_trajectory_or_shape_has_no_history() -> None:
    cache = StepCache(lambda: FixedSteps(frozenset({0})), Last(), "output", None)
    one, two = torch.ones(1, 2, 3), torch.full((1, 2, 3), 2.0)
    ask(cache, call(0, "cond"), one, one)
    assert ask(cache, call(0, "uncond"), one, two) is two  # its own first step
    assert torch.equal(ask(cache, call(1, "cond"), one, two), one)
    assert torch.equal(ask(cache, call(1, "uncond"), one, one), two)
    assert ask(cache, call(2, "cond", trajectory=2), one, two) is two
    assert torch.equal(ask(cache, call(3, "cond", trajectory=2), one, one), two)
    wide = torch.ones(1, 4, 3)
    assert ask(cache, call(4, "cond", trajectory=2), wide, wide) is wide
    assert ask(cache, call(0, "cond", trajectory=2), wide, two) is two  # an earlier step again


def test_a_run_ends_with_its_pattern_and_memory_noted_and_nothing_kept() -> None:
    tally = Tally(torch.device("cpu"), ("test",))
    cache = StepCache(lambda: EveryNth(2, 1), Chebyshev(window=3), "output", None)
    x = torch.ones(1, 2, 4)
    for step in range(10):
        with tally.timed():
            ask(cache, call(step, tally=tally), x, x)
    report = tally.report()
    assert report["real_steps"] == {"cond": [0, 1, 2, 4, 6, 8]} and report["history_bytes"] == 3 * 8 * 4
    assert (report["real_calls"], report["skipped_calls"]) == (6, 4)
    assert ask(cache, call(11, tally=tally), x, 2 * x).mean() == 2


def test_a_second_network_goes_on_with_the_pattern_stage_by_stage() -> None:
    """Of Wan 2.2, whose first network may make all of one stage and a part of the next."""
    tally, x = Tally(torch.device("cpu"), ("test",)), torch.ones(1, 2, 4)
    high, low = (StepCache(lambda: EveryNth(1, 1), Last(), "output", None) for _ in range(2))
    for trajectory, step, cache in ((7, 0, high), (7, 1, high), (8, 0, high), (8, 1, low), (8, 2, low)):
        ask(cache, call(step, trajectory=trajectory, tally=tally), x, x)
    assert tally.report()["real_steps"] == {"cond": [0, 1, 0, 1, 2]}


def test_forecasts_of_a_line_are_exact_in_bf16_features() -> None:
    """The sum is in float32: features of whole numbers are extrapolated exactly."""
    cache = StepCache(lambda: FixedSteps(frozenset({0, 1})), Differences(1), "output", None)
    line = lambda t: torch.full((1, 2, 2), 3.0 + 2.0 * t, dtype=torch.bfloat16)  # noqa: E731
    values = [ask(cache, call(step), line(0), line(step)) for step in range(5)]
    assert all(torch.equal(value, line(step)) for step, value in enumerate(values))
