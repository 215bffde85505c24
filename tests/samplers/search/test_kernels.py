"""Kernels and noise levels of searches against closed forms: conversions of paths, and known samplers as limits."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from analytic import BIMODAL, SHAPE, start
from diffusers import FlowMatchEulerDiscreteScheduler
from search_bed import schedule
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.flow import LINEAR, VE_PATH, VP, Path
from diffaccel.samplers import ancestral
from diffaccel.samplers.search import plan, transitions
from diffaccel.samplers.search.transitions import Coefficients
from diffaccel.session import Pred

CURVED = VP(0.1, 20.0)
PATHS = [pytest.param(LINEAR, id="linear"), pytest.param(VE_PATH, id="ve")]
LEVELS = {"linear": [1.0, 0.97, 0.8, 0.55, 0.3, 0.1, 0.0], "ve": [14.6, 6.0, 2.5, 1.0, 0.4, 0.1, 0.0]}
on_both_paths = pytest.mark.parametrize("path", PATHS)


def levels(path: Path) -> list[float]:
    return LEVELS["ve" if path is VE_PATH else "linear"]


def apply(kernel: Coefficients, x: Tensor, v: Tensor, z: Tensor | float = 0.0) -> Tensor:
    return kernel.a * x + kernel.b * v + kernel.c * z


def noise(seed: int = 7) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def nonlinear(x: Tensor, t: float) -> Tensor:
    """A velocity of the linear path that no closed form is behind."""
    return torch.tanh(1.3 * x + 0.4 * x.flip(-1) - 0.3) * (0.6 + t) + 0.2 * x * t


@on_both_paths
@pytest.mark.parametrize("sigma", [0.02, 0.4, 0.97])
def test_moves_are_affine_in_the_clean_sample_and_the_noise(path: Path, sigma: float) -> None:
    x, v, z = start(path, sigma), noise(1), noise(2)
    moved = apply(transitions.affine(path, sigma, 0.7, -0.3, 0.2), x, v, z)
    expected = 0.7 * path.x0(x, v, sigma) - 0.3 * path.eps(x, v, sigma) + 0.2 * z
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-12)


@on_both_paths
def test_the_score_of_known_data_is_what_euler_maruyama_adds(path: Path) -> None:
    """``-eps / sigma`` is the gradient of ``log p``; the kernel's noise and its drift differ by ``g^2 h`` times it."""
    sigma = 0.6
    x = start(path, sigma).requires_grad_()
    alpha = float(path.alpha(sigma))
    (score,) = torch.autograd.grad(BIMODAL.log_density(x, alpha, sigma).sum(), x)
    eps = BIMODAL.eps(x.detach(), alpha, sigma)
    torch.testing.assert_close(-eps / sigma, score, rtol=0, atol=1e-12)
    if path is LINEAR:
        g, t = 1.3, 0.45
        of_x0, of_eps, c = plan._em(LINEAR, sigma, t, g)
        v = BIMODAL.velocity(path, x.detach(), sigma)
        moved = apply(transitions.affine(path, sigma, of_x0, of_eps), x.detach(), v)
        h = sigma - t
        torch.testing.assert_close(moved, x.detach() - h * (v - 0.5 * g**2 * score), rtol=0, atol=1e-12)
        assert c == pytest.approx(g * h**0.5, abs=1e-15)


@on_both_paths
def test_without_fresh_noise_a_move_is_euler_s_to_the_bit(path: Path) -> None:
    sigmas = [float(sigma) for sigma in torch.tensor(levels(path))]
    for sigma, sigma_next in pairwise(sigmas):
        assert transitions.cps(path, sigma, sigma_next) == Coefficients(1.0, sigma_next - sigma, 0.0)
    still = plan.make_plan(schedule(path, levels(path)), path="linear", norm=0.0)
    assert not still.stochastic
    assert list(still.kernels) == [Coefficients(1.0, b - a, 0.0) for a, b in pairwise(sigmas[:-1])]
    x, v = (t.float() for t in (start(path, sigmas[0]), noise()))
    for level, kernel in enumerate(still.kernels):
        a, b, _ = (torch.tensor(c) for c in kernel)
        euler = x + (torch.tensor(sigmas[level + 1]) - torch.tensor(sigmas[level])) * v
        assert torch.equal(a * x + b * v, euler)
        assert still.ode(level) == kernel


@pytest.mark.parametrize("scale", [*plan.SCALES, "ancestral"])
@pytest.mark.parametrize("name", ["linear", "vp"])
def test_every_scale_without_a_norm_is_the_deterministic_walk(name: Any, scale: Any) -> None:
    still = plan.make_plan(schedule(LINEAR, levels(LINEAR)), path=name, scale=scale, norm=0.0)
    assert all(kernel == transitions.cps(LINEAR, *pair) for kernel, pair in
               zip(still.kernels, pairwise(still.sigmas), strict=True))  # fmt: skip
    if scale != "ancestral" and name == "linear":
        euler = plan.make_plan(schedule(LINEAR, levels(LINEAR)), path="linear", kernel="em", scale=scale, norm=0.0)
        for kernel, same in zip(euler.kernels, still.kernels, strict=True):
            assert kernel == pytest.approx(same, abs=1e-15)


@on_both_paths
def test_the_ancestral_share_is_the_ancestral_sampler_s(path: Path) -> None:
    sigmas = torch.tensor(levels(path)).tolist()
    native = plan.make_plan(schedule(path, levels(path)), path="native", norm=1.0)
    for (sigma, sigma_next), kernel in zip(pairwise(sigmas[:-1]), native.kernels, strict=True):
        x, v, z = start(path, sigma), noise(1), noise(2)
        pred = Pred(path, x, torch.tensor(sigma, dtype=torch.float64), v)
        to = torch.tensor(sigma_next, dtype=torch.float64)
        gamma = ancestral.ancestral_std(path, pred.sigma, to)
        theirs = ancestral.cps(path, pred, to, gamma, z)
        torch.testing.assert_close(apply(kernel, x, v, z), theirs, rtol=0, atol=1e-12)


def test_all_noise_fresh_is_the_stochastic_sampling_of_flow_matching() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    scheduler.set_timesteps(sigmas=[0.9, 0.6, 0.3])
    x, v = start(LINEAR, 0.9, dtype=torch.float32), noise().float()
    for i, (sigma, sigma_next) in enumerate(pairwise(scheduler.sigmas.tolist())):
        torch.manual_seed(3)
        theirs = scheduler.step(v, scheduler.timesteps[i], x).prev_sample
        torch.manual_seed(3)
        ours = apply(transitions.cps(LINEAR, sigma, sigma_next, sigma_next), x, v, torch.randn_like(x))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-7)
        x = theirs


@on_both_paths
def test_noise_is_added_as_the_path_adds_it(path: Path) -> None:
    """Of clean data: to a level at once, or by way of another."""
    low, mid, high = (0.1, 0.5, 0.9) if path is LINEAR else (0.1, 2.0, 9.0)
    a, b, c = (transitions.forward(path, *pair) for pair in ((low, mid), (mid, high), (low, high)))
    assert b.a * a.a == pytest.approx(c.a, abs=1e-15)
    assert (b.a * a.c) ** 2 + b.c**2 == pytest.approx(c.c**2, rel=1e-13)
    assert (c.a * low) ** 2 + c.c**2 == pytest.approx(high**2, rel=1e-13)
    assert c.a * float(path.alpha(low)) == pytest.approx(float(path.alpha(high)), abs=1e-15)
    with pytest.raises(DiffAccelError, match="Go to a higher level"):
        transitions.forward(path, high, low)


@pytest.mark.parametrize("gamma", [-0.1, 0.31])
def test_more_fresh_noise_than_there_is_noise_is_refused(gamma: float) -> None:
    with pytest.raises(DiffAccelError, match=r"between 0 and the next noise level 0\.3"):
        transitions.cps(LINEAR, 0.6, 0.3, gamma)


# -- the variance-preserving path as one on the linear path ------------------------------------------------------------


def test_vp_levels_are_those_of_the_paper() -> None:
    """``s_k = sqrt(1 - (k/10)^2)`` as levels of the linear path (arXiv 2503.19385, with beta from 0.1 to 20)."""
    made = plan.make_plan(schedule(LINEAR, levels(LINEAR)), path="vp", stages=10, tail_steps=0)
    expected = [0.9935, 0.9931, 0.9920, 0.9898, 0.9856, 0.9776, 0.9617, 0.9289, 0.8591, 0.7087]
    assert made.sigmas == pytest.approx(expected, abs=5e-5)
    assert (made.stages, made.tail_nfe, made.tail, made.kind) == (10, 0, (0.0,), "posterior_mean")
    assert made.start == pytest.approx(1 / 1.006550, abs=1e-6)


def test_vp_begins_where_the_call_s_own_noise_is() -> None:
    """A model that was trained up to a level below pure noise is not asked above it."""
    made = plan.make_plan(schedule(LINEAR, [0.93, 0.5, 0.0]), path="vp", stages=5)
    assert made.sigmas[0] == pytest.approx(0.93, abs=1e-6)
    assert all(a > b for a, b in pairwise(made.sigmas))
    ve = plan.make_plan(schedule(VE_PATH, levels(VE_PATH)), path="vp", stages=5)
    assert ve.sigmas[0] == pytest.approx(14.6, rel=1e-5)
    assert ve.start is None


@on_both_paths
@pytest.mark.parametrize("stages", [2, 10, 40])
def test_tails_go_down_to_the_end(path: Path, stages: int) -> None:
    own = plan.make_plan(schedule(path, levels(path)), path="vp", stages=stages)
    assert list(own.tail) == [s for s in torch.tensor(levels(path)).tolist() if s < own.sigmas[-1]]
    even = plan.make_plan(schedule(path, levels(path)), path="vp", stages=stages, tail_steps=4)
    assert (len(even.tail), even.tail_nfe, even.tail[-1], even.kind) == (4, 3, 0.0, "tail")
    linear = [plan._linear(path, s) for s in (even.sigmas[-1], *even.tail)]
    steps = [a - b for a, b in pairwise(linear)]
    assert steps == pytest.approx([steps[0]] * 4, abs=1e-6)


def test_a_tail_does_not_begin_where_the_search_ended() -> None:
    last = plan.make_plan(schedule(LINEAR, [1.0, 0.5, 0.0]), path="vp", stages=10).sigmas[-1]
    made = plan.make_plan(schedule(LINEAR, [1.0, last, 0.4, 0.0]), path="vp", stages=10)
    assert made.tail == pytest.approx((0.4, 0.0))


def test_a_walk_on_the_vp_path_is_one_on_the_linear_path() -> None:
    """The identity of the coefficient-preserving kernel: other levels, and ``gamma / c`` (arXiv 2503.19385, 4.2)."""
    times, gammas = [0.97, 0.8, 0.6, 0.4, 0.2, 0.05], [0.5, 0.3, 0.3, 0.2, 0.02]
    curved = start(LINEAR, 1.0)
    straight = curved / plan._sum(CURVED, times[0])
    for i, ((s, s_next), gamma) in enumerate(zip(pairwise(times), gammas, strict=True)):
        t, t_next, c = plan._share(CURVED, s), plan._share(CURVED, s_next), plan._sum(CURVED, s)
        v = nonlinear(curved / c, t)
        x0, eps = LINEAR.x0(curved / c, v, t), LINEAR.eps(curved / c, v, t)
        kept = torch.sqrt(CURVED.sigma(s_next) ** 2 - gamma**2)
        curved = CURVED.alpha(s_next) * x0 + kept * eps + gamma * noise(i)
        kernel = transitions.cps(LINEAR, t, t_next, gamma * plan._onto(CURVED, s_next, LINEAR))
        straight = apply(kernel, straight, nonlinear(straight, t), noise(i))
        torch.testing.assert_close(straight, curved / plan._sum(CURVED, s_next), rtol=0, atol=1e-12)


def test_a_walk_in_ve_coordinates_is_one_on_the_linear_path() -> None:
    """``x / alpha``, ``sigma / alpha`` and ``gamma / alpha``."""
    times, gammas = [0.95, 0.7, 0.4, 0.1], [0.5, 0.3, 0.05]
    straight = start(LINEAR, 1.0)
    exploding = straight / (1 - times[0])
    for i, ((t, t_next), gamma) in enumerate(zip(pairwise(times), gammas, strict=True)):
        sigma, sigma_next = plan._session(VE_PATH, t), plan._session(VE_PATH, t_next)
        v = nonlinear(straight, t)
        eps = LINEAR.eps(straight, v, t)
        straight = apply(transitions.cps(LINEAR, t, t_next, gamma), straight, v, noise(i))
        exploding = apply(transitions.cps(VE_PATH, sigma, sigma_next, gamma / (1 - t_next)), exploding, eps, noise(i))
        torch.testing.assert_close(exploding, straight / (1 - t_next), rtol=1e-12, atol=1e-12)
        assert plan._linear(VE_PATH, sigma) == pytest.approx(t, abs=1e-15)


@pytest.mark.parametrize("kernel", ["cps", "em"])
@pytest.mark.parametrize("name", ["linear", "vp"])
def test_plans_in_ve_coordinates_are_plans_of_the_linear_path(name: Any, kernel: Any) -> None:
    """The same levels in two coordinates: the same kernels, up to the rounding of the levels to float32."""
    shares = [0.935, 0.7, 0.45, 0.2, 0.05, 0.0]
    flow = plan.make_plan(schedule(LINEAR, shares), path=name, kernel=kernel, scale="square", norm=1.2, stages=6)
    ve_levels = [t / (1 - t) for t in shares]
    ve = plan.make_plan(schedule(VE_PATH, ve_levels), path=name, kernel=kernel, scale="square", norm=1.2, stages=6)
    assert [plan._linear(VE_PATH, s) for s in ve.sigmas] == pytest.approx(flow.sigmas, abs=1e-6)
    for i, (a, b) in enumerate(zip(flow.kernels, ve.kernels, strict=True)):
        t, t_next = flow.sigmas[i : i + 2]
        x, v, z = start(LINEAR, 1.0), noise(1), noise(2)
        straight = apply(a, x, v, z)
        exploding = apply(b, x / (1 - t), LINEAR.eps(x, v, t), z)
        torch.testing.assert_close(exploding * (1 - t_next), straight, rtol=0, atol=3e-5)


def test_kernels_of_a_vp_plan_follow_the_vp_path() -> None:
    """``gamma^2 = min(g^2 h, sigma'^2)`` with ``g = 3 s^2`` on the VP path, over ``c``."""
    whole = schedule(LINEAR, levels(LINEAR))
    made = plan.make_plan(whole, path="vp", scale="square", norm=3.0, stages=10, tail_steps=0)
    times = [(1 - (k / 10) ** 2) ** 0.5 for k in range(10)]
    for (s, s_next), kernel in zip(pairwise(times), made.kernels, strict=True):
        gamma = min(3 * s**2 * (s - s_next) ** 0.5, float(CURVED.sigma(s_next)))
        assert kernel.c == pytest.approx(gamma / plan._sum(CURVED, s_next), rel=1e-12)
