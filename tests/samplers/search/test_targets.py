"""Sequential Monte Carlo against the distribution that it targets, in closed form, and what searches rank by.

Every kernel is affine on Gaussian data, so what the deterministic tail of a few levels leaves is Gaussian too, with a
mean and a variance that follow by recursion; weighted by ``exp(r / temperature)`` it is Gaussian again.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from analytic import gaussian
from search_bed import Found, found, gaussian_moments, gaussian_move, latent_reward, plan, play, stand_in
from torch import Tensor

from diffaccel.flow import LINEAR
from diffaccel.samplers import SMC
from diffaccel.samplers.search.plan import SearchPlan
from diffaccel.samplers.search.resampling import draw, effective_size, softmax, systematic, uniform
from diffaccel.samplers.search.transitions import cps

MEAN, STD = 1.5, 0.6
DATA = gaussian(MEAN, STD, dim=1)
LEVELS = torch.tensor([1.0, 0.9, 0.75, 0.55, 0.35, 0.15, 0.0])
PARTICLES = 3000
# of the target; those that count a reward more than once pull the particles past it, and need it milder
POTENTIALS = {"difference": 0.5, "last": 0.5, "max": 1.5, "sum": 2.5}


def linear(x: Tensor) -> Tensor:
    return x.flatten(1).double().sum(1)


def quadratic(x: Tensor) -> Tensor:
    return linear(x) - linear(x) ** 2


def search(
    reward: Any, potential: Any, resample: float = 0.5, kernel: Any = "cps", guide: float = 0.0, **levels_of: Any
) -> tuple[Found, SearchPlan]:
    config = SMC(
        reward=latent_reward(reward, differentiable=True), budget=PARTICLES * (len(LEVELS) - 1), guide=guide,
        temperature=POTENTIALS[potential], potential=potential, resample=resample, path="linear", kernel=kernel,
        scale="square", norm=1.5, **levels_of,
    )  # fmt: skip
    here = stand_in(torch.full((1, 1, 1, 1), 0.3), LEVELS)
    levels = config.plan(here)
    return found(config, here, lambda x, sigma: DATA.velocity(LINEAR, x, sigma)), levels


def moments(levels: SearchPlan) -> tuple[float, float]:
    """Mean and variance of the samples that the kernels and the last move lead to, from unit noise."""
    last = levels.sigmas[-1]
    return gaussian_move(cps(LINEAR, last, levels.tail[0]), last, MEAN, STD, gaussian_moments(levels, MEAN, STD)[-1])


def weighted(run: Found) -> tuple[list[float], list[float]]:
    line = run.pictures[0]["decisions"][-1]
    return line["samples"], line["weights"]


def independent(potential: str, weights: list[float]) -> float:
    """About how many independent particles these are worth: those drawn anew late share what they came from."""
    return effective_size(weights) / (1 if potential == "last" else 5)


def mean_and_variance(values: list[float], weights: list[float]) -> tuple[float, float]:
    mean = math.fsum(v * w for v, w in zip(values, weights, strict=True))
    return mean, math.fsum((v - mean) ** 2 * w for v, w in zip(values, weights, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("resample", [0.5, 1.0])
@pytest.mark.parametrize("potential", POTENTIALS)
def test_particles_of_a_linear_reward_follow_the_tilted_gaussian(potential: Any, resample: float) -> None:
    """``N(m, v) exp(x / t)`` is ``N(m + v / t, v)``, whatever the potential and however often they are drawn anew."""
    run, levels = search(linear, potential, resample)
    mean, variance = moments(levels)
    values, weights = weighted(run)
    got_mean, got_variance = mean_and_variance(values, weights)
    effective = independent(potential, weights)
    assert abs(got_mean - (mean + variance / POTENTIALS[potential])) < 4 * (variance / effective) ** 0.5
    assert abs(got_variance - variance) < 4 * variance * (2 / effective) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize("potential", POTENTIALS)
@pytest.mark.parametrize("range_and_interval", [{}, {"score_from": 0.3, "score_to": 0.7, "score_every": 2}])
def test_particles_of_a_quadratic_reward_follow_theirs(potential: Any, range_and_interval: Any) -> None:
    """``r = x - k x^2 / 2`` adds ``k / t`` to the precision; the mean reward under it is known."""
    run, levels = search(quadratic, potential, **range_and_interval)
    mean, variance = moments(levels)
    temperature = POTENTIALS[potential]
    precision = 1 / variance + 2 / temperature
    tilted = (mean / variance + 1 / temperature) / precision
    expected = tilted - (tilted**2 + 1 / precision)
    values, weights = weighted(run)
    got, spread = mean_and_variance(values, weights)
    assert abs(got - expected) < 4 * (spread / independent(potential, weights)) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize("reward, kernel", [(linear, "cps"), (quadratic, "em")])
@pytest.mark.parametrize("guide", [0.3, 1.0])
def test_guided_particles_follow_the_same_target(guide: float, reward: Any, kernel: Any) -> None:
    """Weights have the ratio of the plain and the guided kernel; what moves without noise is not guided."""
    run, levels = search(reward, "difference", 0.5, kernel, guide)
    plain, _ = search(reward, "difference", 0.5, kernel)
    assert not torch.equal(run.evals[1].x, plain.evals[1].x)
    values, weights = weighted(run)
    got, spread = mean_and_variance(values, weights)
    mean, variance = moments(levels)
    temperature = POTENTIALS["difference"]
    precision = 1 / variance + (2 / temperature if reward is quadratic else 0)
    tilted = (mean / variance + 1 / temperature) / precision
    expected = tilted - (tilted**2 + 1 / precision if reward is quadratic else 0)
    assert abs(got - expected) < 4 * (spread / independent("difference", weights)) ** 0.5
    assert effective_size(weights) > PARTICLES / 2


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["cps", "em"])
def test_particles_that_nobody_weighs_follow_the_kernels(kernel: Any) -> None:
    """A sampled run is within its statistical error of the recursion."""
    run, levels = search(linear, "last", 0.0, kernel)
    mean, variance = moments(levels)
    values, _ = weighted(run)
    found = mean_and_variance(values, [1 / PARTICLES] * PARTICLES)
    assert abs(found[0] - mean) < 4 * (variance / PARTICLES) ** 0.5
    assert abs(found[1] - variance) < 4 * variance * (2 / PARTICLES) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize("potential", POTENTIALS)
def test_without_resampling_weights_are_those_of_importance_sampling(potential: Any) -> None:
    run, _ = search(linear, potential, 0.0)
    values, weights = weighted(run)
    assert weights == pytest.approx(softmax([value / POTENTIALS[potential] for value in values]), rel=1e-9)
    assert len(set(values)) == PARTICLES, "all particles went their own way"


def test_a_high_temperature_draws_nobody_anew() -> None:
    played = play(SMC(temperature=1e9), 60, plan(6), lambda move: float(move.key.chain % 3))
    assert [line["effective"] for line in played.search.log[:-1]] == pytest.approx([10.0] * 6)
    ends = [move for move in played.moves[0] if move.end]
    chains = [move.parent.key.chain for move in ends]  # type: ignore[union-attr]
    assert chains == list(range(10))


def test_a_low_temperature_keeps_the_best_alone() -> None:
    played = play(SMC(temperature=1e-3), 60, plan(6), lambda move: float(move.key.chain + move.key.attempt))
    assert played.search.log[0]["effective"] == pytest.approx(1.0)
    assert len([move for move in played.moves[0] if move.end]) == 1, "equal particles go down the tail together"
    assert len(played.search.log[-1]["samples"]) == 10


@pytest.mark.parametrize("potential", POTENTIALS)
@pytest.mark.parametrize("resample", [0.0, 0.5, 1.0])
def test_a_picture_without_a_reward_on_the_way_is_no_end(potential: Any, resample: float) -> None:
    """A NaN comes as -inf: such a particle has no weight there, and the search goes on."""
    for bad in (lambda m: m.stage == 2 and m.key.chain == 1, lambda m: m.stage == 2, lambda m: m.stage < 3):
        played = play(
            SMC(temperature=0.5, potential=potential, resample=resample), 60, plan(6),
            lambda m, bad=bad: -math.inf if bad(m) else float(m.key.chain % 3),
        )  # fmt: skip
        assert all(math.isfinite(line["effective"]) for line in played.search.log[:-1])
        weights = played.search.log[-1]["weights"]
        assert all(math.isfinite(w) for w in weights) and math.fsum(weights) == pytest.approx(1)
        assert played.search.samples[0].reward == 2.0


# -- draws -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("u", [1e-6, 0.3, 0.999])
def test_systematic_draws_are_the_weights_rounded(u: float) -> None:
    weights = softmax([0.0, 1.0, -2.0, 0.5, 3.0])
    chosen = systematic(weights, u)
    assert chosen == sorted(chosen)
    for i, weight in enumerate(weights):
        assert math.floor(5 * weight) <= chosen.count(i) <= math.ceil(5 * weight)
    assert systematic([0.2] * 5, u) == list(range(5))


def test_systematic_draws_are_unbiased() -> None:
    weights, counts = softmax([0.0, 1.0, -2.0]), [0, 0, 0]
    grid = [(i + 0.5) / 3000 for i in range(3000)]
    for u in grid:
        for i in systematic(weights, u):
            counts[i] += 1
    assert [count / 9000 for count in counts] == pytest.approx(weights, abs=1e-3)


def test_effective_sizes() -> None:
    assert effective_size([0.25] * 4) == pytest.approx(4)
    assert effective_size([1.0, 0.0, 0.0]) == pytest.approx(1)
    assert softmax([-math.inf, -math.inf]) == [0.5, 0.5]
    assert softmax([1e4, 1e4 - 1000]) == [1.0, 0.0]


def test_draws_by_temperature() -> None:
    rewards = [0.1, 0.5, 0.5, -1.0]
    assert draw(rewards, 0.0, 1, 0, 0) == 1, "the first of equal ones"
    picks = [draw(rewards, 0.4, seed, 0, 3) for seed in range(4000)]
    for i, weight in enumerate(softmax([r / 0.4 for r in rewards])):
        assert abs(picks.count(i) / 4000 - weight) < 4 * (weight * (1 - weight) / 4000) ** 0.5
    assert picks[0] == draw(rewards, 0.4, 0, 0, 3), "a function of the seed and the place"
    assert len({uniform(seed, chain, stage) for seed in (0, 1) for chain in (0, 1) for stage in (0, 1)}) == 8


# -- what a search ranks by -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.3, 0.8])
@pytest.mark.parametrize("k, w", [(0.0, 1.0), (2.0, 0.0)])
def test_rewards_of_the_posterior_mean_rank_as_soft_values_do(sigma: float, k: float, w: float) -> None:
    """``log E[exp(r(x0) / t) | x]`` of ``r = w x0 - k x0^2 / 2``, integrated over the posterior, rises with the reward
    of its mean."""
    x, temperature = torch.linspace(-2, 3, 9, dtype=torch.float64)[:, None], 0.5
    mean = DATA.x0(x, 1 - sigma, sigma)
    variance = STD**2 * sigma**2 / ((1 - sigma) ** 2 * STD**2 + sigma**2)
    z = torch.linspace(-9, 9, 4001, dtype=torch.float64)[None]
    x0 = mean + variance**0.5 * z
    density = torch.exp(-0.5 * z**2) / math.sqrt(2 * math.pi) * (18 / 4000)
    value = torch.log((torch.exp((w * x0 - 0.5 * k * x0**2) / temperature) * density).sum(1))
    if k == 0:
        closed = w * mean[:, 0] / temperature + w**2 * variance / (2 * temperature**2)
    else:
        shrink = 1 + k * variance / temperature
        closed = -0.5 * math.log(shrink) - k * mean[:, 0] ** 2 / (2 * temperature * shrink)
    torch.testing.assert_close(value, closed, rtol=0, atol=1e-9)
    rewards = w * mean[:, 0] - 0.5 * k * mean[:, 0] ** 2
    assert rewards.argsort().tolist() == value.argsort().tolist()
