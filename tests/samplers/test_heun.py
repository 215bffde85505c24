"""Heun: second order, two predictions a step but the last."""

from __future__ import annotations

import pytest
import torch
from analytic import BIMODAL, RANGES, gaussian, order, sample, start, stock, walk
from diffusers import FlowMatchHeunDiscreteScheduler, HeunDiscreteScheduler

from diffaccel.flow import LINEAR
from diffaccel.samplers import Heun

TRAINED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy's, from inside diffusers


@pytest.mark.parametrize("name", list(RANGES))
@pytest.mark.parametrize("data", [gaussian(), BIMODAL], ids=["gaussian", "mixture"])
def test_second_order(data, name: str) -> None:
    # fitted over n = 16..128 on smooth flows: 1.94 to 2.03 there
    assert order(Heun(), data, name) == pytest.approx(2.0, abs=0.15)


def test_second_order_down_to_zero_noise() -> None:
    """The last step is Euler's: one error of order ``h^2``, which does not lower the order."""
    errors = []
    for n in (32, 64):
        x = start(LINEAR, 1.0)
        run = sample(Heun(), gaussian(), x, torch.linspace(1.0, 0.0, n + 1, dtype=torch.float64))
        exact = 1.5 + 0.6 * x  # the affine flow from N(0, 1) to N(1.5, 0.6^2)
        errors.append(float((run.x - exact).abs().max()))
    assert errors[0] / errors[1] == pytest.approx(4.0, abs=0.5)


def test_one_step_by_hand() -> None:
    x, sigma, sigma_next = start(LINEAR, 1.0), 0.8, 0.5
    run = sample(Heun(), BIMODAL, x, torch.tensor([sigma, sigma_next], dtype=torch.float64))
    v = BIMODAL.velocity(LINEAR, x, sigma)
    v_next = BIMODAL.velocity(LINEAR, x + (sigma_next - sigma) * v, sigma_next)
    torch.testing.assert_close(run.x, x + (sigma_next - sigma) * 0.5 * (v + v_next), rtol=0.0, atol=1e-14)


def test_predictions_are_two_a_step_and_one_for_the_last() -> None:
    run = sample(Heun(), BIMODAL, start(LINEAR, 1.0), torch.linspace(1.0, 0.0, 6, dtype=torch.float64))
    assert [round(float(e.sigma), 6) for e in run.evals] == [1.0, 0.8, 0.8, 0.6, 0.6, 0.4, 0.4, 0.2, 0.2]
    run = sample(Heun(), BIMODAL, start(LINEAR, 1.0), torch.linspace(1.0, 0.5, 6, dtype=torch.float64))
    assert len(run.evals) == 10


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("karras", [False, True])
def test_a_whole_trajectory_of_heun_discrete(prediction: str, karras: bool) -> None:
    scheduler = HeunDiscreteScheduler(**TRAINED, prediction_type=prediction, use_karras_sigmas=karras)
    scheduler.set_timesteps(12)
    torch.testing.assert_close(walk(Heun(), scheduler), stock(scheduler), rtol=1e-5, atol=1e-5)


def test_a_whole_trajectory_of_flow_match_heun() -> None:
    scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(12)
    torch.testing.assert_close(walk(Heun(), scheduler), stock(scheduler), rtol=1e-5, atol=1e-5)
