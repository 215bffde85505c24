"""Searches as published, beside our defaults: presets, and the options that they need."""

from __future__ import annotations

import pytest
import torch
from search_bed import found, latent_reward, plan, play, stand_in

from diffaccel.errors import DiffAccelError
from diffaccel.samplers import RBF, SMC, SVDD, CoDe, SoP
from diffaccel.samplers.search.particles import Transition


def test_the_published_form_is_a_preset_that_options_override() -> None:
    paper = RBF.paper(budget=500)
    assert paper == RBF(
        preset="paper", budget=500, path="vp", kernel="em", tail_steps=0, particles=2, initial=25, beam=1, chunk=1
    )
    assert (paper.path, paper.kernel, paper.tail_steps, paper.initial, paper.beam, paper.chunk) == (
        "vp", "em", 0, 25, 1, 1
    )  # fmt: skip
    assert RBF.paper(kernel="em", beam=2).beam == 2 and RBF.paper(initial=5).initial == 5
    assert RBF.from_dict(paper.to_dict()) == paper
    assert "preset" not in RBF().to_dict() and RBF().path == "native"


def test_its_ledger_is_the_published_one() -> None:
    """500 predictions, 2 chains of 25 noises, 10 levels: a quota of 22 and 224 children a chain."""
    played = play(RBF.paper(budget=500), 500, plan(10), lambda move: -float(move.stage))
    assert played.search.used["quota"] == 22
    assert played.proposals()[:-1] == [22] * 8 and abs(sum(played.proposals()) - 224) <= 1


def hashed(move: Transition) -> float:
    return float((13 * move.key.attempt + 29 * move.key.chain + 5 * move.stage) % 17)


# -- FK steering ------------------------


@pytest.mark.parametrize("levels, scored", [(100, {20, 40, 60, 80, 99}), (10, {2, 4, 6, 8, 9}), (8, {1, 3, 5, 7})])
def test_fk_steering_weighs_at_its_interval_within_its_range(levels: int, scored: set[int]) -> None:
    """Steps 20 to 80 of 100, every 20th, and the last; scaled to the number of levels."""
    paper = SMC.paper(budget=4 * levels)
    assert (paper.potential, paper.temperature, paper.resample) == ("max", 0.1, 1.0)
    played = play(paper, 4 * levels, plan(levels), hashed, first=levels // 5, until=levels * 8 // 10)
    assert {line["stage"] for line in played.search.log[:-1]} == scored
    assert {move.stage for move in played.moves[0] if move.score and not move.end} == scored
    assert played.search.used["particles"] == 4 and played.search.ledger.scored == 4 * len(scored) + len(
        {move.parent for move in played.moves[0] if move.end}
    )


def test_a_range_of_one_level_is_importance_sampling_until_the_end() -> None:
    """Nothing is drawn anew between the first and the last level, so all particles keep their own number."""
    config = SMC(temperature=1e-3, resample=1.0, score_to=0.0)
    played = play(config, 60, plan(6), lambda move: 0.0 if move.stage < 5 else hashed(move), first=0, until=0)
    late = [move for move in played.moves[0] if 0 < move.stage < 6]
    assert all(move.parent.key.chain == move.key.chain for move in late if move.parent is not None)


# -- one first noise -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [SVDD.paper(), CoDe.paper(), CoDe.paper(block=1), CoDe(one_noise=True, particles=2)])
@pytest.mark.parametrize("score_from", [0.0, 0.4])
def test_all_trajectories_begin_at_one_noise(config: SVDD | CoDe, score_from: float) -> None:
    chains = config.particles
    played = play(config, 100, plan(8), hashed, first=int(8 * score_from))
    for moves in played.moves:
        starts = [move for move in moves if move.parent is None]
        assert [(move.key.attempt, move.score) for move in starts] == [(0, False)]
        assert len([move for move in moves if move.stage == 1]) >= (100 // chains - 1) // 7
    assert 100 - 8 * chains < played.search.ledger.nfe <= 100
    assert type(config).from_dict(config.to_dict()) == config and "one_noise" not in type(config)().to_dict()


def test_blocks_of_one_from_one_noise_are_svdd_from_one() -> None:
    soft, blocks = (play(config, 60, plan(6, 2), hashed) for config in (SVDD.paper(), CoDe.paper(block=1)))
    assert [x["reward"] for x in soft.search.log] == [x["reward"] for x in blocks.search.log]
    assert soft.search.samples[0].key == blocks.search.samples[0].key


def test_the_one_noise_is_the_call_s_own() -> None:
    x = torch.randn(2, 1, 2, 2, generator=torch.Generator().manual_seed(5))
    config = SVDD.paper(reward=latent_reward(lambda x0: x0.flatten(1).sum(1)), budget=21)
    run = found(config, stand_in(x, torch.linspace(1, 0, 6)), lambda x, sigma: -x)
    assert torch.equal(run.evals[0].x, x) and len(run.evals[1].x) == 2 * 5


def test_one_noise_needs_a_budget_for_two_children_a_level() -> None:
    with pytest.raises(DiffAccelError, match=r"it takes 15\b"):
        play(SVDD.paper(), 14, plan(8), hashed)
    assert play(SVDD.paper(), 15, plan(8), hashed).search.ledger.nfe == 15


# -- the best of all ways back ---------------------------------------------------------------------------------------


def test_search_over_paths_keeps_the_best_of_all() -> None:
    """Two first noises, and in every round the two best of all ways back go on: by hand."""
    config = SoP.paper(particles=2)
    assert config.top == "all" and config.rounds == 4
    played = play(config, 4 * (2 + 4 * 6), plan(8), hashed)  # 6 ways back in each of 4 rounds
    (moves,) = played.moves
    assert played.search.used == {"ways": [[2, 6, 6, 6, 6]]} and played.search.ledger.nfe == 104
    scored = [move for move in moves if move.score and not move.end]
    assert len(scored) == 24
    rewards = {particle.key: particle.reward for particle, move in played.came_by.items() if move in scored}
    for number in range(1, 4):
        stage = 5 * number + 3  # of the last prediction of a way
        ways = sorted(((-reward, key) for key, reward in rewards.items() if key.stage == stage))
        best = {key.attempt for _, key in ways[:2]}
        noised = [move for move in moves if move.stage == 5 * (number + 1) and move.parent is not None]
        assert len(noised) == 6
        assert {move.parent.key.attempt for move in noised if move.parent is not None} == best
    with pytest.raises(DiffAccelError, match="Give at least 72"):
        play(config, 71, plan(8), hashed)


def test_ranges_that_cannot_be() -> None:
    with pytest.raises(DiffAccelError, match=r"score_to is 0\.2; it is a share of the levels, from score_from"):
        SMC(score_from=0.5, score_to=0.2)
    assert SMC.from_dict(SMC.paper().to_dict()) == SMC.paper() and "score_to" not in SMC().to_dict()
