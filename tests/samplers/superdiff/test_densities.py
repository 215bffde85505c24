"""The density estimator: exact for Gaussians, of order one half for mixtures, whatever drives the state."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from analytic import Mixture, gaussian
from density_bed import VP_PATH, A, B, levels, superpose
from diffusers import DDIMScheduler, DDPMScheduler, EulerAncestralDiscreteScheduler
from torch import Tensor

from diffaccel import flow, schedules
from diffaccel.flow import LINEAR, VE_PATH, Path
from diffaccel.samplers import SuperDiff
from diffaccel.samplers.superdiff.transitions import growth, log_density_step, reverse_kernels

PATHS = [VP_PATH, VE_PATH, LINEAR]


def of_first_level(data: Mixture, path: Path, times: Tensor, rows: int, std: float) -> tuple[Tensor, Tensor]:
    """Exact draws of a Gaussian's noised density at the first level, and their log-densities."""
    a, s = (float(f(float(times[0]))) for f in (path.alpha, path.sigma))
    mean = torch.tensor(data.means[0], dtype=torch.float64).reshape(-1, 1, 1)
    noise = torch.randn(rows, len(mean), 1, 1, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    x = a * mean + math.hypot(a * std, s) * noise
    return x, data.log_density(x, a, s)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
@pytest.mark.parametrize("steps", [8, 64])
def test_a_gaussian_is_exact_at_any_number_of_steps(path: Path, steps: int) -> None:
    times, data = levels(path, steps), gaussian(0.5, 0.6, 4)
    begin, log_density = of_first_level(data, path, times, 40, 0.6)
    run = superpose(SuperDiff(op="or", data_std=0.6), [data], path, times, 40, dim=4, begin=begin, initial=log_density)
    assert (run.tracked() - run.true([data], float(times[-1]))).abs().max() <= 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("path", [VP_PATH, VE_PATH], ids=lambda path: type(path).__name__)
def test_the_noise_of_the_euler_form_is_as_predicted(path: Path) -> None:
    """Its error is ``sum_k (V/2)(tr H - z' H z)`` with ``H = -I/v``: std ``sqrt(d/2 sum_k (V_k / v_k)^2)``."""
    times, data, dim, steps = levels(path, 1024), gaussian(0.0, 1.0, 8), 8, 1024
    begin, log_density = of_first_level(data, path, times, 800, 1.0)
    config = SuperDiff(op="or", kernel="euler")
    run = superpose(config, [data], path, times, 800, dim=dim, begin=begin, initial=log_density)
    error = (run.tracked() - run.true([data], float(times[-1])))[:, 0]
    variances = [float(path.alpha(t)) ** 2 + float(path.sigma(t)) ** 2 for t in times.tolist()[:steps]]
    kernels = reverse_kernels(path, times.tolist(), "euler")
    predicted = math.sqrt(dim / 2 * sum((k.variance / v) ** 2 for k, v in zip(kernels, variances, strict=True)))
    assert float(error.std()) == pytest.approx(predicted, rel=0.1)


def rms(path: Path, steps: int, config: SuperDiff, edit: Any = lambda x: x, **options: Any) -> float:
    times = levels(path, steps)
    run = superpose(config, [A, B], path, times, 250, edit=edit, **options)
    assert run.x.isfinite().all()
    true = run.true([A, B], float(times[-1]))
    best = true.argmax(1, keepdim=True)
    return float((run.tracked() - true).gather(1, best).square().mean().sqrt())


@pytest.mark.slow
@pytest.mark.parametrize("steps", [64, pytest.param(256, marks=pytest.mark.slow)])
@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
def test_the_error_of_mixtures_halves_at_four_times_the_steps(path: Path, steps: int) -> None:
    config = SuperDiff(op="or", data_std=1.5)
    assert 1.7 <= rms(path, steps, config) / rms(path, 4 * steps, config) <= 2.5


@pytest.mark.slow
def test_any_adapted_drift_keeps_the_estimator() -> None:
    """Weights of an average steer the state, and not what its densities are."""
    config = SuperDiff(op="average", data_std=1.5, weights=(0.9, 0.1))
    assert 1.7 <= rms(VP_PATH, 64, config) / rms(VP_PATH, 256, config) <= 2.6


@pytest.mark.slow
def test_guidance_is_a_drift_like_any_other() -> None:
    null = Mixture((0.5, 0.5), ((0.0, 1.0), (0.0, -1.0)), (1.6, 1.6))
    errors = []
    for steps in (32, 128):
        times = levels(VP_PATH, steps)
        run = superpose(SuperDiff(op="or", data_std=1.5), [A, B, null], VP_PATH, times, 400, guidance=2.0)
        true = run.true([A, B], float(times[-1]))
        best = true.argmax(1, keepdim=True)
        errors.append(float((run.tracked()[:, :2] - true).gather(1, best).abs().median()))
    assert errors[1] < 0.75 * errors[0]


def test_guidance_of_one_is_none() -> None:
    times = levels(LINEAR, 12)
    plain = superpose(SuperDiff(), [A, B], LINEAR, times, 20)
    guided = superpose(SuperDiff(), [A, B, gaussian(0.0, 1.0, 2)], LINEAR, times, 20, guidance=1.0)
    assert torch.equal(plain.x, guided.x) and len(plain.evals) == len(guided.evals) == 24


def test_the_reference_form_of_one_step() -> None:
    """What the sampler tracks in inner products is the two Gaussians' log-ratio, written out."""
    times = levels(LINEAR, 5)
    run = superpose(SuperDiff(op="or", data_std=1.5), [A, B], LINEAR, times[:2], 6)
    kernel = reverse_kernels(LINEAR, times.tolist()[:2], "matched", 1.5)[0]
    x = run.evals[0].x
    v = A.velocity(LINEAR, x, times[0])
    start = -0.5 * (x.flatten(1).square().sum(1) + 2 * math.log(2 * math.pi))
    expected = start + log_density_step(kernel, x, run.x, v)
    torch.testing.assert_close(run.tracked()[:, 0], expected, rtol=1e-12, atol=1e-12)


# -- against the schedulers of diffusers -------------------------------------------------------------------------------

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("cls", [DDIMScheduler, DDPMScheduler, EulerAncestralDiscreteScheduler])
def test_mean_and_variance_are_those_of_the_schedulers(cls: Any, prediction: str) -> None:
    """The posterior kernel is DDIM's of ``eta = 1``, DDPM's and the ancestral Euler step, in all prediction types."""
    plain = {} if cls is EulerAncestralDiscreteScheduler else {"clip_sample": False}
    scheduler = cls(prediction_type=prediction, **BETAS, **plain)
    if cls is EulerAncestralDiscreteScheduler and prediction == "sample":
        pytest.skip("the scheduler does not implement it")
    scheduler.set_timesteps(10)
    schedule = schedules.read(scheduler)
    kernels = reverse_kernels(schedule.path, [float(s) for s in schedule.sigmas], "posterior")
    draw = torch.Generator().manual_seed(3)
    for index in (2, 6):
        sample, out = (torch.randn(2, 1, 2, 2, generator=draw) for _ in range(2))
        sigma, sigma_next = schedule.sigmas[index], schedule.sigmas[index + 1]
        x = sample * schedule.state_scale(sigma)
        scheduler._step_index = index
        fed = scheduler.scale_model_input(sample, scheduler.timesteps[index])
        torch.testing.assert_close(schedule.network_input(x, sigma), fed, rtol=1e-5, atol=1e-5)
        v = schedule.velocity(out, x, sigma)
        kernel = kernels[index]
        mean = kernel.of_x * x + kernel.of_v * v
        expected, variance = one_step(scheduler, index, out, sample)
        scale = schedule.state_scale(sigma_next)
        torch.testing.assert_close(mean / scale, expected, rtol=1e-5, atol=2e-5)
        assert kernel.variance / float(scale) ** 2 == pytest.approx(variance, rel=1e-4)


def one_step(scheduler: Any, index: int, out: Tensor, sample: Tensor) -> tuple[Tensor, float]:
    """Mean and variance of a scheduler's stochastic step, from two generators that differ in nothing but noise."""
    t = scheduler.timesteps[index]
    options = {"eta": 1.0} if isinstance(scheduler, DDIMScheduler) else {}
    if isinstance(scheduler, DDIMScheduler):
        zero = torch.zeros_like(sample)
        mean = scheduler.step(out, t, sample, variance_noise=zero, **options).prev_sample
        unit = scheduler.step(out, t, sample, variance_noise=torch.ones_like(sample), **options).prev_sample
        return mean, float((unit - mean).square().mean())
    stepped, noise = [], []
    for seed in (0, 1):
        scheduler._step_index = index
        stepped.append(scheduler.step(out, t, sample, generator=torch.Generator().manual_seed(seed)).prev_sample)
        noise.append(torch.randn(sample.shape, generator=torch.Generator().manual_seed(seed)))
    std = float((stepped[0] - stepped[1]).norm() / (noise[0] - noise[1]).norm())
    return stepped[0] - std * noise[0], std**2


def test_all_prediction_types_give_one_trajectory() -> None:
    """Velocity, v and noise predictions of the same exact score give the same samples."""
    times, results = torch.linspace(0.95, 0.05, 11, dtype=torch.float64), []
    for kind in ("velocity", "v_prediction", "epsilon", "sample"):

        def model(path: Path, x: Tensor, sigma: Tensor, kind: Any = kind) -> Tensor:
            a, s = 1 - sigma, sigma
            norm = 1.0 if kind != "v_prediction" else float((a * a + s * s) ** 0.5)
            out = flow.output(kind, A.x0(x, a, s), A.eps(x, a, s), a / norm, s / norm)
            x0, eps = flow.x0_eps(kind, out, x / norm, a / norm, s / norm)
            return path.velocity(x0, eps, sigma)

        results.append(superpose(SuperDiff(op="or"), [model, B], LINEAR, times, 10).x)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-5, atol=1e-5)


def test_unstable_euler_maruyama_steps_are_foreseen() -> None:
    """The growth is that of Gaussian data under the steps themselves."""
    random = torch.Generator("cpu").manual_seed(0)
    levels = [0.99, 0.5, 0.2, 0.0]
    kernels = reverse_kernels(LINEAR, levels, "euler")
    start = torch.randn(20_000, generator=random, dtype=torch.float64)
    x = start * (levels[0] ** 2 + (1 - levels[0]) ** 2) ** 0.5
    for kernel, t in zip(kernels, levels, strict=False):
        v = (t - (1 - t)) / ((1 - t) ** 2 + t * t) * x  # E[eps - x0 | x]
        noise = 0.0 if kernel.is_last else kernel.variance**0.5
        x = kernel.of_x * x + kernel.of_v * v + noise * torch.randn(len(x), generator=random, dtype=torch.float64)
    assert growth(LINEAR, levels, kernels) == pytest.approx(float(x.std()), rel=0.03) and x.std() > 5
    fine = torch.linspace(1, 0, 1001, dtype=torch.float64).tolist()
    fine[0] = 0.9995
    assert growth(LINEAR, fine, reverse_kernels(LINEAR, fine, "euler")) == pytest.approx(1, abs=0.02)
    for kind in ("matched", "posterior"):
        assert growth(LINEAR, levels, reverse_kernels(LINEAR, levels, kind)) == pytest.approx(1, abs=0.5)
