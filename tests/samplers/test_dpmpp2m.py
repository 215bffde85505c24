"""DPM-Solver++(2M): second order from one prediction a step."""

from __future__ import annotations

import pytest
import torch
from analytic import BIMODAL, RANGES, gaussian, gaussian_flow, order, sample, start, stock, walk
from diffusers import DPMSolverMultistepScheduler

from diffaccel.flow import LINEAR, VE_PATH, transport
from diffaccel.samplers import DPMpp2M, Euler

TRAINED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy's, from inside diffusers
MIDPOINT = {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"}


@pytest.mark.parametrize("name", list(RANGES))
@pytest.mark.parametrize("data", [gaussian(), BIMODAL], ids=["gaussian", "mixture"])
def test_second_order(data, name: str) -> None:
    # fitted over n = 16..128 on smooth flows: 1.98 to 2.08 there
    assert order(DPMpp2M(), data, name) == pytest.approx(2.0, abs=0.15)


def test_one_prediction_a_step() -> None:
    run = sample(DPMpp2M(), BIMODAL, start(LINEAR, 1.0), torch.linspace(1.0, 0.0, 8, dtype=torch.float64))
    assert len(run.evals) == len(run.steps) == 7


def test_first_step_and_the_step_to_zero_are_those_of_euler() -> None:
    """Without a past, and where ``lambda`` is infinite, ``D = x0``: the step of DDIM."""
    for levels in ([0.9, 0.6], [0.4, 0.0], [1.0, 0.0], [1.0, 0.7]):
        sigmas = torch.tensor(levels, dtype=torch.float64)
        ours, euler = (sample(c, BIMODAL, start(LINEAR, 1.0), sigmas).x for c in (DPMpp2M(), Euler()))
        torch.testing.assert_close(ours, euler, rtol=0.0, atol=1e-13)


def test_the_solver_lives_in_log_snr_and_not_in_a_path() -> None:
    """The exponential integrator gives the same samples in linear and in VE coordinates."""
    sigmas = torch.linspace(0.95, 0.05, 13, dtype=torch.float64)
    linear = sample(DPMpp2M(), BIMODAL, start(LINEAR, 1.0), sigmas).x
    x, _ = transport(start(LINEAR, 1.0), sigmas[0], LINEAR, VE_PATH)
    ve = sample(DPMpp2M(), BIMODAL, x, sigmas / (1 - sigmas), VE_PATH).x
    torch.testing.assert_close(
        transport(ve, sigmas[-1] / (1 - sigmas[-1]), VE_PATH, LINEAR)[0], linear, rtol=0.0, atol=1e-12
    )


@pytest.mark.parametrize("path", [LINEAR, VE_PATH], ids=["linear", "ve"])
def test_exact_where_the_denoiser_does_not_change(path) -> None:
    """All data in one point: the exponential integrator solves the rest exactly, whatever the steps."""
    point, x = gaussian(1.5, 1e-8), start(path, 0.9)
    sigmas = torch.tensor([0.9, 0.85, 0.3, 0.05], dtype=torch.float64)
    run = sample(DPMpp2M(), point, x, sigmas, path)
    torch.testing.assert_close(run.x, gaussian_flow(point, path, x, sigmas[0], sigmas[-1]), rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("steps", [8, 20])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("karras", [False, True])
def test_a_whole_trajectory_of_diffusers_on_a_vp_schedule(steps: int, prediction: str, karras: bool) -> None:
    scheduler = DPMSolverMultistepScheduler(**TRAINED, **MIDPOINT, prediction_type=prediction, use_karras_sigmas=karras)
    scheduler.set_timesteps(steps)
    torch.testing.assert_close(walk(DPMpp2M(), scheduler), stock(scheduler), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("steps", [8, 20])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_whole_trajectory_of_diffusers_on_a_flow_schedule(steps: int, shift: float) -> None:
    scheduler = DPMSolverMultistepScheduler(
        **MIDPOINT, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    scheduler.set_timesteps(steps)
    torch.testing.assert_close(walk(DPMpp2M(), scheduler), stock(scheduler), rtol=1e-5, atol=1e-5)


def test_a_trajectory_that_does_not_end_at_zero() -> None:
    """Then the last step is of second order too, as diffusers takes it from fifteen steps on."""
    scheduler = DPMSolverMultistepScheduler(**TRAINED, **MIDPOINT, final_sigmas_type="sigma_min")
    scheduler.set_timesteps(20)
    torch.testing.assert_close(walk(DPMpp2M(), scheduler), stock(scheduler), rtol=1e-5, atol=1e-5)
