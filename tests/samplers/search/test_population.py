"""What a search hands back: draws by weight among its finished samples, and several images of one search."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from analytic import BIMODAL
from search_bed import Found, found, latent_reward, plan, play, stand_in
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.flow import LINEAR
from diffaccel.samplers import RBF, SMC, SVDD, BoN, Drafts
from diffaccel.samplers.search.chains import Search
from diffaccel.samplers.search.particles import Key, Particle
from diffaccel.samplers.search.population import handed_back
from diffaccel.samplers.search.resampling import softmax
from diffaccel.samplers.smc import beside_rewards

LEVELS = torch.tensor([1.0, 0.9, 0.75, 0.55, 0.35, 0.15, 0.0])
REWARDS = [1.0, 0.4, 0.0, -2.0]


def score(x0: Tensor) -> Tensor:
    return x0.flatten(1).double().sum(1)


def run(config: Any, rows: int, prompts: int) -> Found:
    x = torch.randn(rows, 1, 2, 2, generator=torch.Generator().manual_seed(5))
    here = stand_in(x, LEVELS, prompts=[f"prompt {i}" for i in range(prompts)])
    return found(
        replace(config, reward=latent_reward(score)), here, lambda x, sigma: BIMODAL.velocity(LINEAR, x, sigma)
    )


def samples(rewards: list[float]) -> list[Particle]:
    return [Particle(0.0, 1, Key(0, 0, i), reward=reward, end=True, number=i) for i, reward in enumerate(rewards)]


@pytest.mark.parametrize("beside", [{}, {0: -1.0, 3: 2.0}])
def test_draws_follow_the_weights(beside: dict[int, float]) -> None:
    """The first image follows ``w exp(r / T)``, and the second the same among those that are left."""
    temperature, count = 0.7, 1500
    chance = softmax([reward / temperature + beside.get(i, 0.0) for i, reward in enumerate(REWARDS)])
    pairs: list[tuple[int, ...]] = []
    for seed in range(count):
        search = Search(0, "", seed, plan(4), 10, log_weights=beside)
        order = handed_back(search, samples(REWARDS), 2, temperature)
        assert sorted(p.number for p in order) == [0, 1, 2, 3] and [p.number for p in order[2:]] == sorted(
            p.number for p in order[2:]
        )
        pairs.append(tuple(p.number for p in order[:2]))
    for a, b in itertools.permutations(range(4), 2):
        expected = chance[a] * chance[b] / (1 - chance[a])
        assert abs(pairs.count((a, b)) / count - expected) < 4 * (expected * (1 - expected) / count) ** 0.5


def test_without_a_temperature_the_best_come_first() -> None:
    search = Search(0, "", 0, plan(4), 10)
    repeated = [*samples(REWARDS)[:1] * 2, *samples(REWARDS)[1:]]
    assert [p.number for p in handed_back(search, repeated, 3, 0.0)] == [0, 1, 2, 3]
    with pytest.raises(DiffAccelError, match="ended with 4 different samples, and the call asks for 5 images"):
        handed_back(search, repeated, 5, 0.0)


def test_particles_are_drawn_by_the_weights_that_they_have() -> None:
    """``log w = beside + r / T``; at another temperature only the reward's part changes. A repeated sample sums up."""
    particles = samples(REWARDS)
    listed, weights = [particles[0], particles[2], particles[2]], [0.5, 0.3, 0.2]
    beside = beside_rewards(listed, weights, 0.5)
    assert set(beside) == {0, 2}
    assert beside[0] + REWARDS[0] / 0.5 == pytest.approx(math.log(0.5))
    assert beside[2] + REWARDS[2] / 0.5 == pytest.approx(math.log(0.5))
    played = play(SMC(temperature=0.5, resample=0.0), 60, plan(6), lambda move: float(move.key.chain % 3), keep=9)
    values = [played.search.log_weights[p.number] for p in played.search.samples]
    assert max(values) - min(values) < 1e-9, "nothing drawn anew: importance weights are rewards alone"


def test_images_of_one_prompt_are_the_best_of_one_search() -> None:
    """Three images of each of two prompts: one search each, with three budgets, on the first image's noise and seed."""
    together = run(BoN(budget=24, population=True), 6, 2)
    assert len(together.pictures) == 2 and [p["budget"] for p in together.pictures] == [72, 72]
    assert [p["prompt"] for p in together.pictures] == ["prompt 0", "prompt 1"]
    rewards = score(together.x).tolist()
    for number, picture in enumerate(together.pictures):
        assert rewards[3 * number : 3 * number + 3] == pytest.approx(picture["rewards"], abs=1e-5)
        assert picture["rewards"] == sorted(picture["rewards"], reverse=True) and len(set(picture["rewards"])) == 3
    apart = run(BoN(budget=72, keep=2), 6, 6)
    assert apart.pictures[0]["rewards"] == together.pictures[0]["rewards"]
    assert apart.pictures[3]["rewards"] == together.pictures[1]["rewards"]


@pytest.mark.parametrize("config", [BoN(budget=60), RBF(budget=60), SVDD(budget=60, particles=3), SMC(budget=60)])
def test_a_cold_draw_is_the_best_and_a_hot_one_another(config: Any) -> None:
    best, cold, hot = (run(replace(config, draw=t), 2, 2) for t in (0.0, 1e-6, 1e6))
    assert torch.equal(best.x, cold.x)
    assert all(len(picture["rewards"]) == 1 for picture in hot.pictures)
    assert torch.equal(run(replace(config, draw=1e6), 2, 2).x, hot.x), "a function of the seed"


def test_what_cannot_be_handed_back() -> None:
    with pytest.raises(DiffAccelError, match=r"Call the pipeline with num_images_per_prompt=2 or more"):
        run(BoN(budget=24, population=True), 2, 2)
    with pytest.raises(DiffAccelError, match="2 different samples, and the call asks for 3 images"):
        run(SVDD(budget=60, particles=2, population=True), 3, 1)
    with pytest.raises(DiffAccelError, match=r"BoN\.draw is -1"):
        BoN(draw=-1.0)
    with pytest.raises(DiffAccelError, match=r"Drafts\.draw is 0\.5, which has no effect: drafts hand back the best"):
        Drafts(draw=0.5)
    assert not {"draw", "population"} & set(BoN().to_dict())
