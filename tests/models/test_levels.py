"""Levels and rules of a step, against the closed form of a Gaussian whose mean depends on the action."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SCMScheduler

from diffaccel.errors import DiffAccelError
from diffaccel.models.next_frame.levels import levels, step


def exact_velocity(x, t, mu, s):
    """``E[eps - x0 | x]`` for ``x0 ~ N(mu, s^2)`` and ``x = (1 - t) x0 + t eps``."""
    variance = (1 - t) ** 2 * s**2 + t**2
    return (t - (1 - t) * s**2) * (x - (1 - t) * mu) / variance - mu


@pytest.mark.parametrize("mu", [-1.5, 0.5])
def test_many_steps_recover_mean_and_deviation(mu):
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sigmas = levels(200, shift=1.0)
    for sigma, sigma_next in itertools.pairwise(sigmas):
        x = step("euler", x, exact_velocity(x, sigma, mu, 0.3), sigma, sigma_next, None)
    assert float(x.mean()) == pytest.approx(mu, abs=0.01) and float(x.std()) == pytest.approx(0.3, rel=0.02)


@pytest.mark.parametrize("rule", ["euler", "consistency"])
def test_without_deviation_one_step_is_exact(rule):
    x = torch.tensor([1.2, -0.4], dtype=torch.float64)
    v = exact_velocity(x, 1.0, 0.7, 0.0)
    torch.testing.assert_close(step(rule, x, v, 1.0, 0.0, None), torch.full_like(x, 0.7))


def test_a_consistency_step_mixes_new_noise_into_the_clean_estimate():
    x, noise = torch.tensor([1.2, -0.4], dtype=torch.float64), torch.tensor([0.3, 2.0], dtype=torch.float64)
    v = exact_velocity(x, 0.8, 0.7, 0.0)
    torch.testing.assert_close(step("consistency", x, v, 0.8, 0.5, noise), 0.5 * 0.7 + 0.5 * noise)


@pytest.mark.parametrize("t", [0.1, 0.7, 1.3, 1.5])
def test_a_velocity_is_a_trigflow_prediction_at_an_equal_ratio(t):
    """At ``tf = sin t / (sin t + cos t)`` the clean frames of both parameterizations are the same."""
    sd, mu, s = 0.5, 0.4, 0.3
    z = torch.tensor([0.2, -0.6], dtype=torch.float64)
    tf = math.sin(t) / (math.sin(t) + math.cos(t))
    norm = math.hypot(tf, 1 - tf)
    x = z / sd * norm
    v = exact_velocity(x, tf, mu / sd, s / sd)
    prediction = ((1 - 2 * tf) * x + (1 - 2 * tf + 2 * tf**2) * v) / norm
    clean = sd * (x - tf * v)
    torch.testing.assert_close(math.cos(t) * z - math.sin(t) * sd * prediction, clean)
    scheduler = SCMScheduler(prediction_type="trigflow", sigma_data=sd)
    scheduler.set_timesteps(1, timesteps=[t, 0.0], max_timesteps=None, intermediate_timesteps=None)
    stepped = scheduler.step(sd * prediction, scheduler.timesteps[0], z).pred_original_sample
    torch.testing.assert_close(stepped, clean, rtol=1e-5, atol=1e-6)


def test_levels_are_those_of_diffusers_with_the_same_shift():
    for shift in (1.0, 3.0):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
        torch.testing.assert_close(torch.tensor(levels(4, shift)), scheduler.sigmas, rtol=1e-6, atol=1e-7)
    assert levels(1) == (1.0, 0.0)


def test_a_step_is_that_of_diffusers_with_one_level_for_all():
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1.0, 0.5])
    x, v = torch.randn(2, 4), torch.randn(2, 4)
    expected = scheduler.step(v, scheduler.timesteps[0], x).prev_sample
    torch.testing.assert_close(step("euler", x, v, 1.0, 0.5, None), expected)


@pytest.mark.parametrize(("arguments", "sentence"), [((0,), "steps is 0"), ((4, -1.0), "shift is -1")])
def test_levels_that_cannot_be_are_named(arguments, sentence):
    with pytest.raises(DiffAccelError, match=sentence):
        levels(*arguments)
