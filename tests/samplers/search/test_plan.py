"""Where a search goes on models of few steps: their own levels, or the tail that their own steps make."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from diffaccel import schedules
from diffaccel.samplers.search import plan


def schedule(steps: int, shift: float = 1.0) -> schedules.Schedule:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    return schedules.read(scheduler)


def test_a_distilled_model_is_searched_at_its_own_four_levels() -> None:
    found = plan.make_plan(schedule(4), path="native")
    own = [float(sigma) for sigma in schedule(4).sigmas]
    assert list(found.sigmas) == own[:-1] and found.tail == (0.0,) and found.kind == "t0"
    assert found.tail_nfe == 0 and found.stages == 4 and found.stochastic


def test_on_the_vp_path_its_own_last_steps_are_the_tail() -> None:
    found = plan.make_plan(schedule(4), path="vp", stages=10)
    own = [float(sigma) for sigma in schedule(4).sigmas]
    assert found.stages == 10 and found.kind == "tail"
    assert list(found.tail) == [sigma for sigma in own if sigma < found.sigmas[-1]]
    assert found.sigmas[-1] == pytest.approx(0.7087, abs=1e-4)
    bare = plan.make_plan(schedule(4), path="vp", stages=10, tail_steps=0)
    assert bare.tail == (0.0,) and bare.tail_nfe == 0 and bare.kind == "posterior_mean"


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_tail_of_equal_steps(steps: int) -> None:
    found = plan.make_plan(schedule(28, shift=3.0), path="vp", tail_steps=steps)
    levels = [found.sigmas[-1], *found.tail]
    falls = [a - b for a, b in pairwise(levels)]
    assert falls == pytest.approx([found.sigmas[-1] / steps] * steps, rel=1e-5)
    assert found.tail_nfe == steps - 1


def test_the_published_grid() -> None:
    """The ten levels of the VP path as times of the linear one (arXiv 2503.19385)."""
    found = plan.make_plan(schedule(8), path="vp", stages=10)
    published = [0.9935, 0.9931, 0.9920, 0.9898, 0.9856, 0.9776, 0.9617, 0.9289, 0.8591, 0.7087]
    assert list(found.sigmas) == pytest.approx(published, abs=5e-5)


@pytest.mark.parametrize("cls", [DDIMScheduler, EulerDiscreteScheduler], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("kernel", ["cps", "em"])
@pytest.mark.parametrize("path", ["native", "linear", "vp"])
def test_a_call_that_begins_without_any_signal(path: Any, kernel: Any, cls: Any) -> None:
    """Zero terminal SNR (arXiv 2305.08891): the VP path, which has some, begins where it begins itself."""
    options = {"clip_sample": False} if cls is DDIMScheduler else {}
    zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    scheduler = cls(**zero, **options)
    scheduler.set_timesteps(8)
    found = plan.make_plan(schedules.read(scheduler), path=path, kernel="cps" if path == "native" else kernel)
    numbers = [*found.sigmas, *found.tail, *(number for kernel in found.kernels for number in kernel)]
    assert all(map(math.isfinite, numbers)) and list(found.sigmas) == sorted(found.sigmas, reverse=True)
    if path == "vp" and cls is DDIMScheduler:
        assert found.sigmas[0] == pytest.approx(0.993471, abs=1e-5)
        assert found.start == pytest.approx(1 / 1.006550, abs=1e-5)
