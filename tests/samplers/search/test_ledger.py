"""How searches spend their budgets, by scripted rewards: the ledger of Rollover Budget Forcing and of its baselines."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from search_bed import Script, plan, play

from diffaccel.samplers import RBF, SMC, SVDD, BoN, CoDe, SoP
from diffaccel.samplers.search.budget import Rollover
from diffaccel.samplers.search.particles import Transition

PAPER = {"particles": 2, "initial": 25, "beam": 1, "chunk": 1}  # at a budget of 500 and 10 levels (arXiv 2503.19385)


def never(move: Transition) -> float:
    return -float(move.stage)


def always() -> Script:
    count = itertools.count()
    return lambda move: float(next(count)) if move.stage else -1.0


def every(n: int) -> Script:
    """Every n-th try of each level is better than anything before it."""
    return lambda move: (
        100.0 * move.stage + move.key.attempt if move.stage and (move.key.attempt + 1) % n == 0 else -1.0
    )


@pytest.mark.parametrize(
    "script, each_level, last_level, rollover",
    [
        (lambda: never, 22, 48, [0] * 8),
        (always, 1, 216, [21 * (k + 1) for k in range(8)]),
        (lambda: every(5), 5, 184, [17 * (k + 1) for k in range(8)]),
    ],
    ids=["never improves", "always improves", "improves at every fifth try"],
)
def test_the_paper_s_ledger(
    script: Callable[[], Script], each_level: int, last_level: int, rollover: list[int]
) -> None:
    """500 NFE, two chains of 25 noises and 10 levels: 22 tries a level, 224 a chain, 498 in all."""
    played = play(RBF(**PAPER), 500, plan(10), script())
    assert [played.proposals(chain) for chain in (0, 1)] == [[each_level] * 8 + [last_level]] * 2
    assert played.search.ledger.nfe == 498
    lines = [line for line in played.search.log if line["chain"] == 0]
    assert [line["quota"] - 22 for line in lines[1:-1]] == rollover[:-1]
    assert [line["tried"] for line in lines] == played.proposals(0)
    assert lines[0]["quota"] == 22


def test_a_cap_limits_what_a_level_takes_over_and_the_rest_waits() -> None:
    played = play(RBF(**PAPER, cap=10), 500, plan(10), always())
    quotas = [line["quota"] for line in played.search.log if line["chain"] == 0]
    assert quotas[:8] == [22] + [32] * 7
    assert played.search.ledger.nfe == 498


def test_spread_leftovers_go_in_equal_parts_to_the_levels_that_remain() -> None:
    rule = Rollover(22, 10, "spread")
    assert rule.quota(0) == 22
    rule.close(0, 18)
    assert [rule.quota(1), rule.carried] == [22 + 18 // 9, 16]
    rule.close(1, 0)
    assert [rule.quota(2), rule.carried] == [22 + 16 // 8, 14]
    played = play(RBF(**PAPER, leftover="spread"), 500, plan(10), always())
    quotas = [line["quota"] for line in played.search.log if line["chain"] == 0][:8]
    assert quotas == sorted(quotas) and quotas[1] == 22 + 21 // 9
    assert played.search.ledger.nfe == 498


def test_a_threshold_ends_a_level_and_passes_nothing_on() -> None:
    played = play(RBF(**PAPER, rule="threshold", threshold=0.0), 500, plan(10), lambda m: float(m.key.attempt - 3))
    lines = [line for line in played.search.log if line["chain"] == 0]
    assert [line["tried"] for line in lines] == [4] * 9
    assert [line["quota"] for line in lines[:8]] == [22] * 8
    assert played.search.ledger.nfe == 2 * (25 + 9 * 4)


def test_a_child_must_beat_the_highest_so_far_or_the_state_that_it_comes_from() -> None:
    """The first noise is far above all children; of these the third of each level is above the level before."""

    def script(move: Transition) -> float:
        return 5.0 if not move.stage else float(move.stage + (move.key.attempt == 2)) - 20.0

    assert play(RBF(**PAPER), 500, plan(10), script).proposals() == [22] * 8 + [48]
    last = play(RBF(**PAPER, against="last_accepted"), 500, plan(10), script).proposals()
    assert last == [22] + [3] * 7 + [224 - 22 - 21]


def test_equal_rewards_keep_the_first() -> None:
    played = play(RBF(**PAPER), 500, plan(10), lambda move: 1.0)
    assert played.proposals() == [22] * 8 + [48]
    assert played.search.samples[0].key.attempt == 0
    assert {move.key.attempt for move in played.lineage(played.search.samples[0])} == {0}


CASES: list[Any] = [
    RBF(particles=2, initial=5, chunk=1), RBF(particles=3, initial=4, chunk=8, commit="best"),
    RBF(particles=2, initial=4, chunk=5, commit="first"), RBF(particles=2, initial=1, chunk=4, leftover="spread"),
    RBF(particles=1, initial=2, chunk=3, cap=2), RBF(particles=2, beam=4, begin=0.4, initial=0, chunk=16),
    RBF(particles=1, beam=3, begin=0.3, initial=7, chunk=4, commit="first"),
    SVDD(particles=2), CoDe(particles=2, block=2), SMC(),
]  # fmt: skip
TO_THE_END: list[Any] = [BoN(wave=3), SoP(particles=2)]  # on levels without a tail


@pytest.mark.parametrize(
    "config, tail",
    [(config, tail) for tail in (0, 4) for config in CASES] + [(config, 0) for config in TO_THE_END],
    ids=lambda value: value if isinstance(value, int) else f"{value.name} {getattr(value, 'chunk', '')}",
)
@pytest.mark.parametrize("budget", [120, 200, 333, 500])
def test_no_budget_is_overspent_and_little_is_left(config: Any, budget: int, tail: int) -> None:
    """What stays unspent is what a method's round numbers leave."""
    levels, script = plan(8, tail), lambda move: float((7 * move.key.attempt + 3 * move.stage) % 11)
    played = play(config, budget, levels, script)
    asked = [move for chain in played.moves for move in chain]
    assert played.search.ledger.nfe == sum(move.predict for move in asked) <= budget
    left = budget - played.search.ledger.nfe
    if isinstance(config, RBF):
        least = 2 * config.particles - 1  # the reference's loop ends when one more of each chain would reach the budget
    elif isinstance(config, SoP):
        least = config.walk - 1
    elif isinstance(config, SMC):
        least = levels.stages + levels.tail_nfe - 1
    elif isinstance(config, BoN):
        least = levels.stages - 1
    elif isinstance(config, CoDe):
        least = config.particles * config.block - 1
    else:
        least = 0
    assert left <= least
    assert played.search.ledger.scored == sum(move.score for move in asked)
    assert played.search.samples[0].end
    assert len({(move.parent is None, move.key, move.sigma) for move in asked if not move.end}) == sum(
        not move.end for move in asked
    ), "the same noise twice at one level"


def test_what_nobody_looked_at_is_counted_as_wasted() -> None:
    played = play(RBF(particles=1, initial=1, beam=1, chunk=8, commit="first"), 200, plan(6), always())
    assert played.search.ledger.nfe_wasted == 7 * 4  # the last level takes all
    assert [line["tried"] for line in played.search.log][:4] == [1] * 4
    best = play(RBF(particles=1, initial=1, beam=1, chunk=8, commit="best"), 200, plan(6), always())
    assert best.search.ledger.nfe_wasted == 0
    assert [line["tried"] for line in best.search.log][:4] == [8] * 4


def test_of_a_chunk_the_highest_is_what_the_next_must_beat() -> None:
    """Wherever in the chunk it was: rewards fall within each, and later levels only reach the first one's middle."""

    def script(move: Transition) -> float:
        return 0.0 if not move.stage else (10.0 if move.stage == 1 else 8.0) - move.key.attempt

    played = play(RBF(particles=1, initial=1, beam=1, chunk=4), 200, plan(6), script)
    lines = played.search.log
    assert [line["accepted"] for line in lines] == [True, False, False, False, False]
    assert [line["reward"] for line in lines] == [10.0, 8.0, 8.0, 8.0, 8.0]


def test_wasted_tries_leave_one_for_every_level_after() -> None:
    """What rolls over does not know of the waste; the budget does."""

    def script(move: Transition) -> float:
        return float(move.stage) if 0 < move.stage < 8 else -1.0

    played = play(RBF(particles=1, initial=25, beam=1, chunk=8, commit="first"), 250, plan(10), script)
    assert [line["tried"] for line in played.search.log] == [1] * 7 + [224 - 7 * 8 - 1, 1]
    assert played.search.ledger.nfe == 25 + 224


@pytest.mark.parametrize("chunk", [3, 8])
def test_chunks_of_first_accept_what_one_by_one_would(chunk: int) -> None:
    """Until the budget, which pays for what is wasted too, runs out."""

    def script(move: Transition) -> float:
        return 100.0 * move.stage + move.key.attempt if move.stage and move.key.attempt % 5 == 2 else -1.0

    def accepted(chunk: int) -> list[tuple[int, int]]:
        played = play(RBF(particles=1, initial=1, beam=1, chunk=chunk, commit="first"), 400, plan(8), script)
        return [(line["stage"], line["tried"]) for line in played.search.log][:-1]

    assert accepted(chunk) == accepted(1) == [(stage, 3) for stage in range(6)]


def test_never_improving_is_the_soft_value_decoder_s_way() -> None:
    """With a threshold out of reach a level takes the best of its Q children, as SVDD of K = Q does, level by level."""

    def script(move: Transition) -> float:
        return float((13 * move.key.attempt + 5 * move.stage + 3 * move.key.chain) % 17)

    k, stages, n = 6, 7, 2
    budget = n * k * stages + n * k  # Q = K, and as many first noises
    config = RBF(particles=n, initial=k, beam=1, chunk=1, rule="threshold", threshold=1e9)
    forced = play(config, budget, plan(stages), script)
    soft = play(SVDD(particles=n), n * k * stages, plan(stages), script)
    for chain in range(n):
        a, b = ([x["reward"] for x in p.search.log if x["chain"] == chain] for p in (forced, soft))
        assert a[: stages - 2] == b[1 : stages - 1]
        assert forced.proposals(chain)[: stages - 2] == soft.proposals(chain)[: stages - 2] == [k] * (stages - 2)


def test_always_improving_is_the_plain_stochastic_walk() -> None:
    config = RBF(particles=1, initial=1, beam=1, chunk=1, rule="threshold", threshold=-1e9)
    played = play(config, 100, plan(9, 3), never)
    assert played.proposals() == [1] * 8
    assert played.search.ledger.nfe == 9 + 3


def test_a_beam_goes_on_from_its_best_children_in_turn() -> None:
    """Of six noises three go on; every one of them has a child before a level ends, whoever was better first."""

    def script(move: Transition) -> float:
        return 10.0 * move.stage + (move.key.attempt * 5) % 6 if move.stage < 5 else -1.0

    config = RBF(particles=1, beam=3, initial=6, chunk=1)
    played = play(config, 6 + 6 * 12, plan(6), script)
    asked: dict[int, list[Transition]] = {}
    for move in played.moves[0]:
        if move.predict:
            asked.setdefault(move.stage, []).append(move)
    assert [line["tried"] for line in played.search.log][:4] == [3] * 4
    parents = [[move.parent.key.attempt for move in asked[stage]] for stage in range(1, 6)]  # type: ignore[union-attr]
    # of rewards 0 5 4 3 2 1, and then of the first three of them at every level
    assert parents[:4] == [[1, 2, 3]] + [[1, 2, 0]] * 3
    assert parents[4][:6] == [1, 2, 0] * 2
    whole = play(replace(config, chunk=6), 6 + 6 * 12, plan(6), script)
    assert [line["tried"] for line in whole.search.log][:4] == [6] * 4


@pytest.mark.parametrize("quota, states", [(2, 1), (7, 1), (8, 2), (11, 2), (12, 3), (16, 4), (40, 4)])
def test_every_state_of_a_beam_has_four_tries_a_level(quota: int, states: int) -> None:
    """With fewer there would be nothing to choose from: a small budget has a small beam."""
    stages, n = 6, 2
    played = play(RBF(particles=n, initial=5, beam=4), n * (5 + stages * quota), plan(stages), never)
    parents = {m.parent.key.attempt for m in played.moves[0] if m.parent and m.predict and m.stage == 1}
    assert len(parents) == states
    assert played.search.log[0]["quota"] == quota


@pytest.mark.parametrize("chunk", [3, 8])
def test_chunks_of_first_keep_a_beam_s_decisions(chunk: int) -> None:
    def script(move: Transition) -> float:
        return 100.0 * move.stage + move.key.attempt if move.key.attempt % 5 == 2 else -float(move.key.attempt % 3)

    def states(chunk: int) -> list[Any]:
        config = RBF(particles=1, beam=4, begin=0.3, initial=6, chunk=chunk, commit="first")
        played = play(config, 400, plan(8), script)
        lines = [(line["stage"], line["tried"], line["accepted"]) for line in played.search.log][:-1]
        parents = {(m.stage, m.parent.key) for m in played.moves[0] if m.parent and m.predict and m.stage < 7}
        return [lines, parents]

    assert states(chunk) == states(1)


@pytest.mark.parametrize("begin, walked", [(0.0, 0), (0.1, 0), (0.4, 3), (0.99, 6)])
def test_noises_walk_unseen_to_where_they_are_compared(begin: float, walked: int) -> None:
    """A third of the budget pays for them; the levels before are neither scored nor searched."""
    budget, levels = 400, plan(8, 2)
    played = play(RBF(particles=2, beam=2, begin=begin, initial=0), budget, levels, lambda m: float(m.key.attempt % 7))
    initial = budget // (3 * 2 * (walked + 1))
    for moves in played.moves:
        for stage in range(walked + 1):
            level = [move for move in moves if move.stage == stage]
            assert len(level) == initial and {move.score for move in level} == {stage == walked}
            assert all(move.coefficients == levels.ode(stage - 1) for move in level if stage)
    assert [line["stage"] for line in played.search.log if line["chain"] == 0] == list(range(walked, 7))
    assert budget - 4 < played.search.ledger.nfe <= budget


@pytest.mark.parametrize("config", [SVDD(), CoDe(), SoP(), CoDe(block=3, particles=3)], ids=lambda c: c.name)
@pytest.mark.parametrize("budget", [224, 251, 399])
def test_every_level_has_a_choice_and_none_has_much_more(config: Any, budget: int) -> None:
    """Of 28 levels; what does not divide is spread over them, and the report says how."""
    played = play(config, budget, plan(28), lambda move: float(move.key.attempt % 3))
    (sizes,) = played.search.used.values()
    assert {max(counts) - min(counts) <= 1 for counts in sizes} == {True}
    assert min(min(counts) for counts in sizes) >= 2
    tried = [[line["tried"] for line in played.search.log if line["chain"] == chain] for chain in range(len(sizes))]
    assert tried == sizes


@pytest.mark.parametrize("block, selected", [(1, list(range(8))), (2, [1, 3, 5, 7]), (3, [2, 5, 7])])
def test_code_selects_at_the_end_of_every_block(block: int, selected: list[int]) -> None:
    played = play(CoDe(particles=1, block=block), 8 * 4, plan(8), lambda move: float(move.key.attempt == 2))
    assert [line["stage"] for line in played.search.log] == selected
    assert {move.stage for move in played.moves[0] if move.score and not move.end} == set(selected)
    for move in played.lineage(played.search.samples[0])[1:]:
        # between two selections the best is followed by its own child of the same number
        assert move.key.attempt == 2 or move.stage % block


def test_code_of_blocks_of_one_is_svdd() -> None:
    def script(move: Transition) -> float:
        return float((13 * move.key.attempt + 5 * move.stage) % 17)

    soft, blocks = (play(config, 60, plan(6, 2), script) for config in (SVDD(particles=2), CoDe(particles=2, block=1)))
    assert [x["reward"] for x in soft.search.log] == [x["reward"] for x in blocks.search.log]
    assert soft.search.samples[0].key == blocks.search.samples[0].key


def test_search_over_paths_costs_what_it_says() -> None:
    config = SoP(particles=2, walk=4)
    assert config.rounds == 4  # 0.12 / 0.03
    played = play(config, 4 * 5 * 2 * 5, plan(8), lambda move: 0.0)  # 5 copies, 5 ways of 4 steps, 2 chains
    assert played.search.ledger.nfe == 200
    assert played.search.samples[0].sigma == 0.0


def test_of_equal_samples_the_first_chain_s_wins_whichever_ended_first() -> None:
    levels = plan(5)
    played = play(SVDD(particles=3), 60, levels, lambda move: 1.0, keep=2)
    kept = played.search.samples
    assert [sample.key.chain for sample in kept] == [0, 1, 2]
    assert [sample.key.chain for sample in played.search.ranked(kept[::-1])] == [0, 1, 2]


def test_search_over_paths_goes_on_from_the_best_and_ends_at_the_end() -> None:
    """Way 0 comes down to ``seed_level``, each later one 0.03 lower, and the last at 0 whatever was left."""
    config = SoP(particles=1, walk=3, seed_level=0.1)
    played = play(config, 3 * 5 * 4, plan(8), lambda move: float(move.key.attempt == 2))
    starts = [move for move in played.moves[0] if move.predict and move.coefficients.c > 0]
    assert {move.parent.key.attempt for move in starts} == {2}  # type: ignore[union-attr]
    bottoms = [move.sigma for move in played.moves[0] if not move.predict and not move.end]
    assert bottoms == pytest.approx([0.1, 0.07, 0.04, 0.01], abs=1e-6)
    assert sorted({move.sigma for move in starts}) == pytest.approx([0.79, 0.82, 0.85, 0.88], abs=1e-6)
    last = [move.sigma for move in played.moves[0] if move.predict][-1]
    assert last == pytest.approx(0.79 / 3, abs=1e-6), "the last way's steps are even, down to 0"
    assert played.search.samples[0].reward == 1.0


def test_best_of_n_keeps_the_best_of_all_waves() -> None:
    played = play(BoN(wave=2), 6 * 8, plan(8), lambda move: -abs(move.key.chain - 3.0), keep=2)
    assert [sample.reward for sample in played.search.samples] == [0.0, -1.0, -1.0]
    assert [line["samples"] for line in played.search.log] == [2, 4, 6]


def test_soft_value_decoding_draws_by_its_temperature() -> None:
    """Hot: any child; cold: the best one."""

    def chosen(temperature: float) -> set[float]:
        played = play(SVDD(particles=2, temperature=temperature), 2 * 8 * 6, plan(8), lambda move: move.key.attempt / 5)
        return {line["reward"] for line in played.search.log}

    assert chosen(0.0) == chosen(1e-3) == {1.0}
    assert len(chosen(1e6)) >= 4
