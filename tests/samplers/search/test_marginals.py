"""Kernels of searches keep the marginals of their path, up to an error of first order in the step.

On Gaussian data ``N(m, s^2)`` every kernel is affine, so means and variances follow by recursion (arXiv 2503.19385 for
the stochastic walk, arXiv 2509.05952 for the coefficient-preserving kernel).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from search_bed import gaussian_moments, schedule

from diffaccel.flow import LINEAR, VP, Path
from diffaccel.samplers.search import plan

CURVED = VP(0.1, 20.0)
MEAN, STD = 1.5, 0.6


def move(
    path: Path, kernel: str, scale: str, norm: float, t: float, t_next: float, at: tuple[float, float]
) -> tuple[float, float]:
    """Mean and variance after one move on the path itself."""
    alpha, sigma, sigma_next = float(path.alpha(t)), float(path.sigma(t)), float(path.sigma(t_next))
    if kernel == "em":
        of_x0, of_eps, c = plan._em(path, t, t_next, plan._strength(path, t, scale, norm))
    else:
        c = plan._fresh(path, t, t_next, scale, norm)
        of_x0, of_eps = float(path.alpha(t_next)), math.sqrt(sigma_next**2 - c**2)
    factor = (of_x0 * alpha * STD**2 + of_eps * sigma) / (alpha**2 * STD**2 + sigma**2)
    return of_x0 * MEAN + factor * (at[0] - alpha * MEAN), factor**2 * at[1] + c**2


def exact(path: Path, t: float) -> tuple[float, float]:
    """Mean and variance of the marginal."""
    alpha, sigma = float(path.alpha(t)), float(path.sigma(t))
    return alpha * MEAN, alpha**2 * STD**2 + sigma**2


def apart(a: tuple[float, float], b: tuple[float, float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def error(path: Path, kernel: str, scale: str, norm: float, times: Sequence[float]) -> float:
    """The largest error of the mean or of the variance along the way."""
    at, worst = exact(path, times[0]), 0.0
    for t, t_next in pairwise(times):
        at = move(path, kernel, scale, norm, t, t_next, at)
        worst = max(worst, apart(at, exact(path, t_next)))
    return worst


def even(n: int) -> list[float]:
    return torch.linspace(1.0, 0.02, n + 1, dtype=torch.float64).tolist()


@pytest.mark.parametrize(
    "path, kernel, scale, norm, errors",
    [
        (LINEAR, "em", "square", 3.0, [1.49e-2, 7.2e-3, 3.6e-3]),
        (LINEAR, "cps", "square", 3.0, [1.02e-2, 5.1e-3, 2.6e-3]),
        (CURVED, "em", "square", 3.0, [1.30e-2, 6.4e-3, 3.2e-3]),
        (CURVED, "cps", "square", 3.0, [1.51e-2, 7.6e-3, 3.8e-3]),
        (CURVED, "em", "beta", 1.0, [4.4e-2, 2.1e-2, 1.1e-2]),
    ],
    ids=["linear em", "linear cps", "vp em", "vp cps", "vp em beta"],
)
def test_errors_are_the_known_ones(path: Path, kernel: str, scale: str, norm: float, errors: list[float]) -> None:
    assert [error(path, kernel, scale, norm, even(n)) for n in (100, 200, 400)] == pytest.approx(errors, rel=0.06)


NORMS = {
    "linear": 1.0, "square": 3.0, "beta": 1.0, "constant": 1.0, "sine": 1.0, "sigma": 1.0, "bump": 1.0, "flow-grpo": 0.7
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("scale", NORMS)
@pytest.mark.parametrize("kernel", ["em", "cps"])
@pytest.mark.parametrize("path", [LINEAR, CURVED], ids=["linear", "vp"])
def test_half_the_step_is_half_the_error(path: Path, kernel: str, scale: str) -> None:
    times = [0.95 - 0.85 * k / 1600 for k in range(1601)]  # away from the poles of some scales
    errors = [error(path, kernel, scale, NORMS[scale], times[::every]) for every in (4, 2, 1)]
    assert [a / b for a, b in pairwise(errors)] == pytest.approx([2.0, 2.0], abs=0.1)


@pytest.mark.parametrize("path", [LINEAR, CURVED], ids=["linear", "vp"])
def test_without_fresh_noise_both_kernels_are_of_first_order_too(path: Path) -> None:
    for kernel in ("em", "cps"):
        errors = [error(path, kernel, "square", 0.0, even(n)) for n in (200, 400)]
        assert errors[0] / errors[1] == pytest.approx(2.0, abs=0.1)


@pytest.mark.parametrize("kernel", ["em", "cps"])
@pytest.mark.parametrize("scale, norm", [("square", 3.0), ("sigma", 1.0)])
def test_plans_of_the_vp_path_are_of_first_order(kernel: Any, scale: Any, norm: float) -> None:
    """The levels and kernels that a search walks on, in the coordinates of the linear path: down to s = 0.44, since the
    last steps of this grid shrink with the root of their number only."""
    whole = schedule(LINEAR, [1.0, 0.5, 0.0])

    def worst(stages: int) -> float:
        made = plan.make_plan(whole, path="vp", kernel=kernel, scale=scale, norm=norm, stages=stages)
        found = gaussian_moments(made, MEAN, STD, exact(LINEAR, made.sigmas[0]))
        pairs = list(zip(found, made.sigmas, strict=True))[: stages * 9 // 10 + 1]
        return max(apart(at, exact(LINEAR, sigma)) for at, sigma in pairs)

    errors = [worst(n) for n in (200, 400, 800)]
    assert [a / b for a, b in pairwise(errors)] == pytest.approx([2.0, 2.0], abs=0.1)


@pytest.mark.parametrize("kernel, end", [("em", (0.4359, 1.0239)), ("cps", (0.5703, 0.8830))])
def test_ten_levels_of_the_vp_path(kernel: str, end: tuple[float, float]) -> None:
    """From the marginal on to the last level: exact there are 0.5703 and 0.9075. The coefficient-preserving kernel has
    that mean; Euler-Maruyama is far off with so few steps."""
    times = [math.sqrt(1 - (k / 10) ** 2) for k in range(10)]
    at = exact(CURVED, 1.0)
    for t, t_next in pairwise(times):
        at = move(CURVED, kernel, "square", 3.0, t, t_next, at)
    assert exact(CURVED, times[-1]) == pytest.approx((0.5703, 0.9075), abs=1e-4)
    assert at == pytest.approx(end, abs=1e-4)
