"""Euler: first order, and the same map as DDIM."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from analytic import BIMODAL, RANGES, gaussian, initial, order, sample, start, stock, walk
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from diffaccel.flow import LINEAR, VE_PATH, VP, transport
from diffaccel.samplers import Euler

TRAINED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy's, from inside diffusers


@pytest.mark.parametrize("name", list(RANGES))
@pytest.mark.parametrize("data", [gaussian(), BIMODAL], ids=["gaussian", "mixture"])
def test_first_order(data, name: str) -> None:
    # fitted over n = 16..128 on smooth flows: 0.98 to 1.01 there
    assert order(Euler(), data, name) == pytest.approx(1.0, abs=0.08)


def test_equals_ddim_on_the_linear_path() -> None:
    """``x' = alpha' x0 + sigma' eps``, from pure noise to none."""
    sigmas = torch.linspace(1.0, 0.0, 11, dtype=torch.float64)
    run = sample(Euler(), BIMODAL, start(LINEAR, 1.0), sigmas)
    x = start(LINEAR, 1.0)
    for sigma, sigma_next in pairwise(sigmas):
        alpha = 1 - sigma
        x = (1 - sigma_next) * BIMODAL.x0(x, alpha, sigma) + sigma_next * BIMODAL.eps(x, alpha, sigma)
    torch.testing.assert_close(run.x, x, rtol=0.0, atol=1e-12)


def test_equals_ddim_on_a_variance_preserving_path() -> None:
    """DDIM's step does not see the path: VP and VE walks are the linear one in other coordinates."""
    path = VP(0.1, 20.0)
    times = torch.linspace(1.0, 0.01, 11, dtype=torch.float64)
    begin = start(LINEAR, 1.0)
    x = begin
    for t, t_next in pairwise(times):
        alpha, sigma = path.alpha(t), path.sigma(t)
        x = path.mix(BIMODAL.x0(x, alpha, sigma), BIMODAL.eps(x, alpha, sigma), t_next)
    for target in (LINEAR, VE_PATH):
        sigmas = transport(begin[0, 0, 0, 0], times, path, target)[1]
        run = sample(Euler(), BIMODAL, transport(begin, times[0], path, target)[0], sigmas, target)
        torch.testing.assert_close(transport(run.x, sigmas[-1], target, path)[0], x, rtol=0.0, atol=1e-11)


def test_exact_where_the_velocity_does_not_change() -> None:
    """All data in one point: the flow is a straight line, and one step is exact."""
    point = gaussian(1.5, 1e-8)
    run = sample(Euler(), point, start(LINEAR, 1.0), torch.tensor([1.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(run.x, torch.full_like(run.x, 1.5), rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("karras", [False, True])
def test_a_whole_trajectory_of_euler_discrete_to_the_bit(prediction: str, karras: bool) -> None:
    scheduler = EulerDiscreteScheduler(**TRAINED, prediction_type=prediction, use_karras_sigmas=karras)
    scheduler.set_timesteps(12)
    assert torch.equal(walk(Euler(), scheduler), stock(scheduler))


@pytest.mark.parametrize("mu", [None, 0.8])
def test_a_whole_trajectory_of_flow_match_euler_to_the_bit(mu: float | None) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=mu is not None)
    scheduler.set_timesteps(12, **({} if mu is None else {"mu": mu}))
    assert torch.equal(walk(Euler(), scheduler), stock(scheduler))


@pytest.mark.parametrize("prediction, zero_snr", [("epsilon", False), ("v_prediction", False), ("v_prediction", True)])
@pytest.mark.parametrize("to_one", [True, False])
def test_a_whole_trajectory_of_ddim(prediction: str, zero_snr: bool, to_one: bool) -> None:
    scheduler = DDIMScheduler(
        **TRAINED, prediction_type=prediction, clip_sample=False, timestep_spacing="trailing", set_alpha_to_one=to_one,
        rescale_betas_zero_snr=zero_snr,
    )  # fmt: skip
    scheduler.set_timesteps(20)  # divides the thousand, as DDIM's own steps need
    # other coordinates: fp32 rounding over twenty steps, on latents of size 3
    torch.testing.assert_close(walk(Euler(), scheduler), stock(scheduler), rtol=2e-5, atol=2e-5)
    assert not torch.equal(stock(scheduler), initial(scheduler))
