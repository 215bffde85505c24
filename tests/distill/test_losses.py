"""The loss against closed forms: Gaussian data, a linear generator, exact scores."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from diffaccel.distill.losses import distance_gradient, generator_loss
from diffaccel.distill.parameterization import KINDS, Kind, clean, factor, scale, target
from diffaccel.distill.sim import SIM
from diffaccel.distill.steps import Draw, matching_loss
from diffaccel.distill.teacher import NetworkTeacher

A, S = 0.8, 0.6  # a^2 + s^2 = 1: one level at which all parameterisations can stand
SCALE, SHIFT, STD, MEAN = 1.7, 0.4, 0.9, -0.3  # generator x0 = SCALE z + SHIFT, data N(MEAN, STD^2)
EDM_DATA = 0.5


def score(x: Tensor, mean: float, std: float) -> Tensor:
    """Of noised N(mean, std^2)."""
    return -(x - A * mean) / (A * A * std * std + S * S)


def raw_output(kind: Kind, x: Tensor, mean: float, std: float) -> Tensor:
    """What a perfect network of a kind returns: the target of its clean estimate."""
    a, s = torch.tensor(A, dtype=x.dtype), torch.tensor(S, dtype=x.dtype)
    x0 = (x + s * s * score(x, mean, std)) / a
    return target(kind, x0, (x - a * x0) / s, x, a, s, EDM_DATA)


def gradients(
    kind: Kind, config: SIM, count: int = 400_000, at: tuple[float, float] | None = None
) -> tuple[float, float]:
    """Return the gradients of the loss by the generator's scale and shift, from antithetic samples in float64."""
    generator = torch.Generator().manual_seed(0)
    half = torch.randn(2, count // 2, 1, generator=generator, dtype=torch.float64)
    z, eps = (torch.cat([part, -part]) for part in half)
    eps = torch.cat([eps[: count // 2], eps[: count // 2]])
    spread, shift = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in at or (SCALE, SHIFT))
    x0 = spread * z + shift
    x_t = A * x0 + S * eps
    teacher = At(kind)
    own = (float(shift.detach()), float(spread.detach()))
    draw = Draw(z, eps, torch.full((count,), 0.5), 0)
    loss, _ = matching_loss(
        teacher, x0, x_t, raw_output(kind, x_t, *own), raw_output(kind, x_t, MEAN, STD), draw, config
    )
    by_spread, by_shift = torch.autograd.grad(loss, (spread, shift))
    return float(by_spread), float(by_shift)


class At(NetworkTeacher):
    """A teacher with one level."""

    def __init__(self, kind: Kind) -> None:
        super().__init__(torch.nn.Identity(), lambda *_: torch.zeros(()), kind, (1,), sigma_data=EDM_DATA)

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        ones = torch.ones(len(sigma), 1, dtype=torch.float64)
        return A * ones, S * ones


def options(**changes: object) -> SIM:
    return SIM(**{"distance": "l2", "space": "score", "ema_pictures": 0, **changes})  # type: ignore[arg-type]


def test_l2_gradient_of_scores_is_the_closed_form() -> None:
    by_scale, by_shift = gradients("epsilon", options())
    assert by_scale == pytest.approx(0.675433, rel=5e-3)
    assert by_shift == pytest.approx(0.230819, rel=5e-3)


def test_pseudo_huber_gradient_is_the_closed_form() -> None:
    by_scale, by_shift = gradients("epsilon", options(distance="huber", c=0.1))
    assert by_scale == pytest.approx(0.431064, rel=1e-2)
    assert by_shift == pytest.approx(0.167635, rel=1e-2)


@pytest.mark.parametrize(("space", "ratio"), [("x0", S**4 / A**2), ("raw", S**2)])
def test_spaces_differ_by_their_factor_squared(space: str, ratio: float) -> None:
    of_score, of_space = gradients("epsilon", options()), gradients("epsilon", options(space=space))
    assert of_space == pytest.approx([ratio * value for value in of_score], rel=1e-9)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "edm"])
def test_every_parameterisation_has_the_same_gradient_in_clean_space(kind: Kind) -> None:
    """The coefficients have unit power, so that one input fits four kinds of networks."""
    for config in (options(space="x0"), options(space="x0", distance="huber", c=0.1), options(space="x0", alpha=0.5)):
        assert gradients(kind, config, 2000) == pytest.approx(gradients("epsilon", config, 2000), rel=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_clean_estimate_inverts_the_target(kind: Kind) -> None:
    x0, eps = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    a, s = (
        (torch.ones(1, dtype=torch.float64), torch.tensor([2.5], dtype=torch.float64))
        if kind == "edm"
        else (
            torch.tensor([A], dtype=torch.float64),
            torch.tensor([S], dtype=torch.float64),
        )
    )
    x_t = a * x0 + s * eps
    out = target(kind, x0, eps, x_t, a, s, EDM_DATA)
    torch.testing.assert_close(clean(kind, out, x_t, a, s, EDM_DATA), x0, rtol=1e-12, atol=1e-12)
    shifted = clean(kind, out + 1, x_t, a, s, EDM_DATA) - x0
    torch.testing.assert_close(shifted, factor(kind, a, s, EDM_DATA).expand_as(x0), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(scale("score", kind, a, s, EDM_DATA), factor(kind, a, s, EDM_DATA) * a / s**2)


def test_detached_estimates_give_the_gradient_of_the_kullback_leibler_divergence() -> None:
    """``dKL/dscale = a^2 (1/V_q - 1/V_p) scale``, ``dKL/dshift = a delta``; this space has them times 1/s^2."""
    by_scale, by_shift = gradients("epsilon", options(grad_through_scores=False))
    own, data = A * A * SCALE**2 + S * S, A * A * STD**2 + S * S
    delta = A * (SHIFT - MEAN) / data
    assert by_scale * S**2 == pytest.approx(A * A * (1 / data - 1 / own) * SCALE, rel=5e-3)
    assert by_shift * S**2 == pytest.approx(A * delta, rel=5e-3)


def test_alpha_one_half_is_the_exact_gradient_of_the_fisher_divergence() -> None:
    """``E|y|^2 / 2`` with ``y = (1/V_q - 1/V_p) u + delta``, u ~ N(0, V_p), differentiated with its sampling law."""

    def divergence(spread: Tensor, shift: Tensor) -> Tensor:
        own, data = A * A * spread**2 + S * S, A * A * STD**2 + S * S
        return 0.5 * ((1 / data - 1 / own) ** 2 * own + (A * (shift - MEAN) / data) ** 2)

    spread, shift = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (SCALE, SHIFT))
    expected = torch.autograd.grad(divergence(spread, shift), (spread, shift))
    assert gradients("epsilon", options(alpha=0.5)) == pytest.approx([float(g) for g in expected], rel=1e-2)


@pytest.mark.parametrize("config", [options(), options(distance="huber", c=0.1), options(distance="huber", c=0.0)])
def test_nothing_moves_where_generator_and_data_agree(config: SIM) -> None:
    """Also with c = 0, where the distance has a corner."""
    assert gradients("epsilon", config, 1000, at=(STD, MEAN)) == pytest.approx((0.0, 0.0), abs=1e-12)


def test_pseudo_huber_limits() -> None:
    v, r = torch.randn(2, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    norm = distance_gradient(v, "huber", 0.0).square().sum(1).sqrt()
    torch.testing.assert_close(norm, torch.ones_like(norm))
    assert math.isfinite(float(distance_gradient(v * 0, "huber", 0.0).sum()))
    large = generator_loss(v, r, alpha=1.0, distance="huber", c=1e6) * 1e6
    torch.testing.assert_close(large, generator_loss(v, r, alpha=1.0, distance="l2", c=0.0), rtol=1e-9, atol=0.0)
