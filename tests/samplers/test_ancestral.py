"""Ancestral sampling: exact limits, parity with diffusers, and moments in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from analytic import BIMODAL, drive, gaussian, network, sample, session, start, stock, walk
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.flow import LINEAR, VE_PATH, VP, Path, transport
from diffaccel.samplers import Ancestral, Euler
from diffaccel.samplers.ancestral import ancestral_std, cps
from diffaccel.schedules import read
from diffaccel.session import Pred

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy's, from inside diffusers
TRAINED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
MEAN, STD = 1.5, 0.6
ONE = gaussian(MEAN, STD, dim=1)
LEVELS = {
    "linear": (LINEAR, torch.linspace(1.0, 0.0, 11, dtype=torch.float64)),
    "ve": (VE_PATH, torch.tensor([8.0, 5.0, 3.0, 2.0, 1.2, 0.7, 0.3, 0.0], dtype=torch.float64)),
}


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _pred(path: Path, x: Tensor, sigma: Tensor, data=ONE) -> Pred:
    return Pred(path, x, sigma, data.velocity(path, x, sigma))


def _f64(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


# -- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(LEVELS))
def test_without_fresh_noise_it_is_euler(name: str) -> None:
    path, sigmas = LEVELS[name]
    x = start(path, float(sigmas[0]))
    ours, euler = (sample(c, BIMODAL, x, sigmas, path).x for c in (Ancestral(eta=0.0), Euler()))
    torch.testing.assert_close(ours, euler, rtol=0.0, atol=1e-13)


def test_without_fresh_noise_no_noise_is_drawn() -> None:
    generator = _generator()
    before = generator.get_state()
    sample(Ancestral(eta=0.0), BIMODAL, start(LINEAR, 1.0), LEVELS["linear"][1], generator=generator)
    assert torch.equal(generator.get_state(), before)


def test_fresh_noise_is_that_of_the_posterior() -> None:
    """``gamma^2 = Var[x' | x, x0]`` of the Gaussian chain: by precisions, ``1 / (1/sigma'^2 + (a/s)^2)``.

    ``x = a x' + s z`` with ``a = alpha/alpha'`` and ``s^2 = sigma^2 - a^2 sigma'^2``.
    """
    for path, levels in LEVELS.values():
        for sigma, sigma_next in pairwise(levels[1:-1]):
            a = path.alpha(sigma) / path.alpha(sigma_next)
            forward = sigma**2 - a**2 * sigma_next**2
            posterior = 1 / (1 / sigma_next**2 + a**2 / forward)
            assert float(ancestral_std(path, sigma, sigma_next)) ** 2 == pytest.approx(float(posterior), rel=1e-12)


def test_fresh_noise_on_the_ve_path_is_that_of_k_diffusion() -> None:
    for sigma, sigma_next in pairwise(LEVELS["ve"][1]):
        up = min(sigma_next, (sigma_next**2 * (sigma**2 - sigma_next**2) / sigma**2) ** 0.5)
        assert float(ancestral_std(VE_PATH, sigma, sigma_next)) == pytest.approx(float(up), abs=1e-14)


def test_from_pure_noise_all_noise_is_fresh() -> None:
    """At ``alpha = 0`` nothing is known of the sample, so nothing of its noise is kept."""
    assert float(ancestral_std(LINEAR, _f64(1.0), _f64(0.7))) == 0.7


def test_first_step_from_pure_noise_is_the_stochastic_step_of_diffusers() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    scheduler.set_timesteps(6)
    schedule = read(scheduler)
    x = start(LINEAR, 1.0, dtype=torch.float32)
    out = network(x, scheduler.timesteps[0])
    torch.manual_seed(3)
    own = scheduler.step(out, scheduler.timesteps[0], x).prev_sample
    torch.manual_seed(3)  # both draw from the global generator
    run = drive(Ancestral().sample(session(x, schedule.sigmas[:2])), lambda x, sigma: out, LINEAR)
    torch.testing.assert_close(run.x, own, rtol=1e-6, atol=1e-6)


def test_all_noise_fresh_is_the_stochastic_sampling_of_diffusers() -> None:
    """``gamma = sigma'`` at every step, over a whole trajectory."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    scheduler.set_timesteps(6)
    schedule, x = read(scheduler), start(LINEAR, 1.0, dtype=torch.float32)
    own, noise = x, _generator(3)
    torch.manual_seed(3)
    for i, t in enumerate(scheduler.timesteps):
        sigma, sigma_next = schedule.sigmas[i], schedule.sigmas[i + 1]
        own = scheduler.step(network(own, t), t, own).prev_sample
        fresh = torch.randn(x.shape, generator=noise)
        x = cps(LINEAR, Pred(LINEAR, x, sigma, network(x, t)), sigma_next, sigma_next, fresh)
        torch.testing.assert_close(x, own, rtol=1e-5, atol=1e-5)


# -- parity with diffusers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_whole_trajectory_of_euler_ancestral(prediction: str) -> None:
    scheduler = EulerAncestralDiscreteScheduler(**TRAINED, prediction_type=prediction)
    scheduler.set_timesteps(12)
    ours = walk(Ancestral(), scheduler, generator=_generator())
    torch.testing.assert_close(ours, stock(scheduler, generator=_generator()), rtol=1e-5, atol=1e-5)


# At zero terminal SNR all noise of the first step is fresh with eta = 1, and rounding decides whether DDIM's own root
# of 1 - alpha' - std^2 is 0 or not a number.
@pytest.mark.parametrize("eta", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("prediction, zero_snr", [("epsilon", False), ("v_prediction", True)])
def test_a_whole_trajectory_of_ddim_with_eta(eta: float, prediction: str, zero_snr: bool) -> None:
    scheduler = DDIMScheduler(
        **TRAINED, prediction_type=prediction, clip_sample=False, timestep_spacing="trailing",
        rescale_betas_zero_snr=zero_snr,
    )  # fmt: skip
    scheduler.set_timesteps(10)
    ours = walk(Ancestral(eta=eta), scheduler, generator=_generator())
    torch.testing.assert_close(ours, stock(scheduler, eta=eta, generator=_generator()), rtol=2e-5, atol=2e-5)


def test_all_noise_is_fresh_at_zero_terminal_snr() -> None:
    scheduler = DDIMScheduler(
        **TRAINED, prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    )  # fmt: skip
    scheduler.set_timesteps(10)
    ours, nearly = (walk(Ancestral(eta=eta), scheduler, generator=_generator()) for eta in (1.0, 1 - 1e-6))
    torch.testing.assert_close(ours, nearly, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
def test_a_whole_trajectory_of_ddpm(prediction: str) -> None:
    scheduler = DDPMScheduler(
        **TRAINED,
        prediction_type=prediction,
        clip_sample=False,
        timestep_spacing="trailing",
        variance_type="fixed_small",
    )
    scheduler.set_timesteps(10)
    ours = walk(Ancestral(), scheduler, generator=_generator())
    # DDPM adds noise of variance 1e-20 where it means none
    torch.testing.assert_close(ours, stock(scheduler, generator=_generator()), rtol=2e-5, atol=2e-5)


# -- moments on Gaussian data ----------------------------------------------------------------------------------------


def _recursion(path: Path, levels: Tensor, gammas: list[float], mean: float, var: float) -> tuple[float, float]:
    """Mean and variance after coefficient-preserving steps, which are affine for ``N(m, s^2)``.

    With ``V = alpha^2 s^2 + sigma^2`` and ``A = alpha' alpha s^2 / V + sqrt(sigma'^2 - gamma^2) sigma / V``:
    ``mean' = alpha' m + A (mean - alpha m)``, ``var' = A^2 var + gamma^2``.
    """
    for (sigma, sigma_next), gamma in zip(pairwise(levels.tolist()), gammas, strict=True):
        alpha, alpha_next = float(path.alpha(sigma)), float(path.alpha(sigma_next))
        total = (alpha * STD) ** 2 + sigma**2
        kept = math.sqrt(max(sigma_next**2 - gamma**2, 0.0))
        a = alpha_next * alpha * STD**2 / total + kept * sigma / total
        mean, var = alpha_next * MEAN + a * (mean - alpha * MEAN), a * a * var + gamma**2
    return mean, var


@pytest.mark.parametrize("eta", [0.5, 1.0])
@pytest.mark.parametrize("name", list(LEVELS))
def test_mean_and_variance_follow_the_recursion(name: str, eta: float) -> None:
    path, levels = LEVELS[name]
    levels = levels[:-1]  # stop before the last step, whose noise is none
    count = 200_000
    first = float(levels[0])
    x = torch.randn(count, 1, 1, 1, generator=_generator(1), dtype=torch.float64) * first
    run = sample(Ancestral(eta=eta), ONE, x, levels, path, _generator(2))
    gammas = []
    for sigma, sigma_next in pairwise(levels.tolist()):
        ratio = float(path.alpha(sigma)) * sigma_next / (float(path.alpha(sigma_next)) * sigma)
        gammas.append(eta * sigma_next * math.sqrt(1 - ratio**2))
    mean, var = _recursion(path, levels, gammas, 0.0, first**2)
    # four standard errors of a Gaussian sample's mean and variance
    assert float(run.x.mean()) == pytest.approx(mean, abs=4 * math.sqrt(var / count))
    assert float(run.x.var()) == pytest.approx(var, abs=4 * var * math.sqrt(2 / count))


def _moments(
    path: Path, levels: Tensor, gamma: Callable[[float, float], float], mean: float, var: float
) -> list[tuple[float, float]]:
    """The same moments from the kernel itself, by its values at two points: the kernel is affine in x."""
    out = []
    for sigma, sigma_next in pairwise(levels):
        g = _f64(gamma(float(sigma), float(sigma_next)))
        points = torch.tensor([mean, mean + 1], dtype=torch.float64).reshape(2, 1, 1, 1)
        low, high = cps(path, _pred(path, points, sigma), sigma_next, g, torch.zeros_like(points)).flatten().tolist()
        mean, var = low, (high - low) ** 2 * var + float(g) ** 2
        out.append((mean, var))
    return out


def _cubic(t: float, t_next: float) -> float:
    """Fresh noise for a diffusion coefficient ``g = 3 t^2``: ``gamma^2 = min(g^2 h, sigma'^2)``."""
    return min(3 * t * t * math.sqrt(t - t_next), t_next)


def test_discretisation_error_is_of_first_order_with_known_size() -> None:
    """Data N(1.5, 0.36), grid even on [0.02, 1]: the largest error of mean or variance along the path."""
    known = {100: 1.02e-2, 200: 5.1e-3, 400: 2.6e-3}
    errors = {}
    for n in known:
        levels = torch.linspace(1.0, 0.02, n + 1, dtype=torch.float64)
        errors[n] = 0.0
        for t, (mean, var) in zip(levels[1:].tolist(), _moments(LINEAR, levels, _cubic, 0.0, 1.0), strict=True):
            exact = ((1 - t) * MEAN, (1 - t) ** 2 * STD**2 + t * t)
            errors[n] = max(errors[n], abs(mean - exact[0]), abs(var - exact[1]))
    assert errors == pytest.approx(known, rel=0.02)
    assert errors[100] / errors[200] == pytest.approx(2.0, abs=0.1)
    assert errors[200] / errors[400] == pytest.approx(2.0, abs=0.1)


def test_agrees_with_the_euler_maruyama_step_to_first_order() -> None:
    """``x - h (u - g^2 score / 2) + g sqrt(h) z`` has the same noise; its mean differs by ``h^2``."""
    t, g = 0.6, 1.0
    x = torch.tensor([-0.4, 0.9, 2.0], dtype=torch.float64).reshape(3, 1, 1, 1)
    pred, apart = _pred(LINEAR, x, _f64(t)), []
    for h in (1e-2, 5e-3, 2.5e-3):
        em = x - h * (pred.v + 0.5 * g * g * pred.eps / t)
        ours = cps(LINEAR, pred, _f64(t - h), _f64(g * math.sqrt(h)), torch.zeros_like(x))
        apart.append((ours - em).abs().max().item())
    assert apart[0] / apart[1] == pytest.approx(4.0, abs=0.1)
    assert apart[1] / apart[2] == pytest.approx(4.0, abs=0.1)


# -- variance-preserving paths are schedules of the linear one ---------------------------------------------------------

VP_PATH = VP(0.1, 20.0)
VP_GRID = torch.tensor([math.sqrt(1 - (k / 10) ** 2) for k in range(11)], dtype=torch.float64)


def _vp_step(x: Tensor, s: Tensor, s_next: Tensor, gamma: float, noise: Tensor) -> Tensor:
    """The coefficient-preserving step in the VP path's own coordinates, written out."""
    alpha, sigma = VP_PATH.alpha(s), VP_PATH.sigma(s)
    x0, eps = BIMODAL.x0(x, alpha, sigma), BIMODAL.eps(x, alpha, sigma)
    kept = torch.sqrt((VP_PATH.sigma(s_next) ** 2 - gamma**2).clamp(min=0))
    return VP_PATH.alpha(s_next) * x0 + kept * eps + gamma * noise


def test_a_vp_step_is_a_linear_step() -> None:
    """With shared noise and a nonlinear predictor, ``x = x'/c`` and ``gamma = gamma'/c'`` (arXiv 2503.19385)."""
    x, generator = start(LINEAR, 1.0), _generator()
    scale = VP_PATH.alpha(VP_GRID) + VP_PATH.sigma(VP_GRID)
    levels = VP_PATH.sigma(VP_GRID) / scale
    linear = x / scale[0]
    for k, (s, s_next) in enumerate(pairwise(VP_GRID)):
        gamma = min(3 * float(s) ** 2 * math.sqrt(float(s - s_next)), float(VP_PATH.sigma(s_next)))
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        pred = _pred(LINEAR, linear, levels[k], BIMODAL)
        linear = cps(LINEAR, pred, levels[k + 1], gamma / scale[k + 1], noise)
        x = _vp_step(x, s, s_next, gamma, noise)
        torch.testing.assert_close(linear * scale[k + 1], x, rtol=0.0, atol=1e-12)


def test_ancestral_noise_does_not_depend_on_the_path() -> None:
    """``eta = 1`` on the VP path, written out, is the sampler on the linear path at the same levels."""
    levels = transport(torch.ones(()), VP_GRID, VP_PATH, LINEAR)[1]
    scale = VP_PATH.alpha(VP_GRID) + VP_PATH.sigma(VP_GRID)
    x, generator = start(LINEAR, 1.0), _generator()
    run = sample(Ancestral(), BIMODAL, x / scale[0], levels, generator=_generator())
    for s, s_next in pairwise(VP_GRID):
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64) if s_next > 0 else torch.zeros_like(x)
        ratio = VP_PATH.alpha(s) * VP_PATH.sigma(s_next) / (VP_PATH.alpha(s_next) * VP_PATH.sigma(s))
        x = _vp_step(x, s, s_next, float(VP_PATH.sigma(s_next) * torch.sqrt(1 - ratio**2)), noise)
    torch.testing.assert_close(run.x, x, rtol=0.0, atol=1e-12)


def test_moments_on_the_ten_step_vp_grid_in_numbers() -> None:
    """One step before the end, from the exact start and with ``g = 3 s^2``: 0.5703 and 0.8830 (exact: 0.9075)."""
    scale = (VP_PATH.alpha(VP_GRID) + VP_PATH.sigma(VP_GRID)).tolist()
    levels = transport(torch.ones(()), VP_GRID, VP_PATH, LINEAR)[1][:-1]
    steps = iter(zip(pairwise(VP_GRID.tolist()), scale[1:], strict=True))

    def gamma(t: float, t_next: float) -> float:
        (s, s_next), c = next(steps)
        return min(3 * s * s * math.sqrt(s - s_next), float(VP_PATH.sigma(s_next))) / c

    first, last = float(levels[0]), float(levels[-1])
    begin = ((1 - first) * MEAN, (1 - first) ** 2 * STD**2 + first**2)
    mean, var = _moments(LINEAR, levels, gamma, *begin)[-1]
    assert ((1 - last) ** 2 * STD**2 + last**2) * scale[9] ** 2 == pytest.approx(0.9075, abs=1e-4)
    assert mean * scale[9] == pytest.approx(0.5703, abs=1e-4)
    assert var * scale[9] ** 2 == pytest.approx(0.8830, abs=1e-4)


# -- the kernel's contract ---------------------------------------------------------------------------------------------


def test_more_fresh_noise_than_there_is_raises() -> None:
    pred = _pred(LINEAR, start(LINEAR, 1.0, (2, 1, 1, 1)), _f64(0.8))
    with pytest.raises(
        DiffAccelError, match=r"gamma = 0\.6\d* exceeds the next noise level 0\.5\d*.*0 <= gamma <= sigma'"
    ):
        cps(LINEAR, pred, _f64(0.5), _f64(0.6), torch.zeros(2, 1, 1, 1))
    assert torch.isfinite(cps(LINEAR, pred, _f64(0.5), _f64(0.5), torch.zeros(2, 1, 1, 1))).all()


def test_one_level_per_row() -> None:
    x, noise = start(LINEAR, 1.0), torch.randn(3, 1, 2, 2, generator=_generator(), dtype=torch.float64)
    sigma, sigma_next, gamma = (
        torch.tensor(v, dtype=torch.float64).reshape(3, 1, 1, 1)
        for v in ([0.9, 0.6, 1.0], [0.7, 0.1, 0.5], [0.2, 0.1, 0.0])
    )
    rows = cps(LINEAR, _pred(LINEAR, x, sigma, BIMODAL), sigma_next, gamma, noise)
    for i in range(3):
        one = slice(i, i + 1)
        level, level_next, fresh = (v[i, 0, 0, 0] for v in (sigma, sigma_next, gamma))
        alone = cps(LINEAR, _pred(LINEAR, x[one], level, BIMODAL), level_next, fresh, noise[one])
        torch.testing.assert_close(rows[one], alone, rtol=0.0, atol=1e-14)
    gamma[1] = 0.2
    with pytest.raises(DiffAccelError, match="exceeds"):
        cps(LINEAR, _pred(LINEAR, x, sigma, BIMODAL), sigma_next, gamma, noise)


@pytest.mark.parametrize("name", list(LEVELS))
def test_a_row_depends_on_its_own_generator_alone(name: str) -> None:
    path, levels = LEVELS[name]
    x = start(path, float(levels[0]))
    together = sample(Ancestral(), BIMODAL, x, levels, path, [_generator(10 + i) for i in range(3)]).x
    for i in range(3):
        alone = sample(Ancestral(), BIMODAL, x[i : i + 1], levels, path, [_generator(10 + i)]).x
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0.0, atol=1e-14)
    other = sample(Ancestral(), BIMODAL, x, levels, path, [_generator(10), _generator(99), _generator(12)]).x
    assert torch.equal(other[[0, 2]], together[[0, 2]])
    assert not torch.equal(other[1], together[1])


@pytest.mark.parametrize("eta", [-0.1, 1.1])
def test_eta_outside_its_range(eta: float) -> None:
    with pytest.raises(DiffAccelError, match=r"Ancestral\.eta is .*\[0, 1\]"):
        Ancestral(eta=eta)
