"""Rankings of drafts: Elo ratings by hand, and judges of pairs that are never wrong."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest

from diffaccel.samplers.drafts.judging import factor
from diffaccel.samplers.drafts.ranking import (
    ByElo,
    ByInsertion,
    ByReward,
    Drafted,
    Pair,
    Ranking,
    by_chances,
    chances,
)


def drafted(scores: list[float], begin: int = 0) -> list[Drafted]:
    search: Any = None  # a ranking does not look at it
    return [Drafted(search, begin + i, score=score) for i, score in enumerate(scores)]


class Script:
    """A judge that answers from a table of better numbers, and notes what it was asked."""

    def __init__(self, better: Callable[[int, int], float], sure: float = 1.0) -> None:
        self.better, self.sure, self.asked = better, sure, list[tuple[int, int]]()

    def __call__(self, pairs: list[Pair]) -> list[tuple[float, float]]:
        self.asked += [(a.index, b.index) for a, b in pairs]
        return [(self.better(a.index, b.index), self.sure) for a, b in pairs]


def test_ratings_of_one_pair_are_as_by_hand() -> None:
    ranking, (a, b) = ByElo(), drafted([6.0, 5.0])
    ranking.add([a, b], Script(lambda a, b: 0.0, sure=1.2))  # the favourite loses twice
    # 1600 : 1500, E = 1 / (1 + 10^-0.25) = 0.640065; the neighbours' game, then the same pair as finalists
    first = 32 * 1.2 * 0.6400649998
    one, two = 1600 - first, 1500 + first
    expected = 1 / (1 + 10 ** ((two - one) / 400))
    assert (a.rating, b.rating) == pytest.approx((one - 38.4 * expected, two + 38.4 * expected), abs=1e-6)
    assert first == pytest.approx(24.578496, abs=1e-6)
    assert [draft.index for draft in ranking.order] == [0, 1], "1553.4 to 1546.6"


def test_a_tie_moves_ratings_together_and_keeps_their_sum() -> None:
    ranking, (a, b) = ByElo(k=16), drafted([7.0, 5.0])
    a.rating = 1700.0
    ranking.play([(a, b)], Script(lambda a, b: 0.5))
    change = 16 * (0.5 - 1 / (1 + 10 ** (-200 / 400)))
    assert (a.rating, b.rating) == pytest.approx((1700 + change, 1500 - change))


def test_a_batch_of_eight_plays_the_published_games() -> None:
    judge, ranking = Script(lambda a, b: float(a < b)), ByElo()
    ranking.add(drafted([10.0, 9, 8, 7, 6, 5, 4, 3]), judge)
    # the better four, three pairs of neighbours; the better two, one pair
    assert judge.asked == [(0, 1), (1, 2), (2, 3), (0, 1)]
    judge.asked.clear()
    ranking.add(drafted([9.5, 1, 1, 1, 1, 1, 1, 1], begin=8), judge)
    assert judge.asked[-3:] == [(8, 0), (8, 1), (8, 2)], "the winner meets the best three so far"
    assert len(judge.asked) == 3 + 1 + 3


@pytest.mark.parametrize("confidence, expected", [(1.0, 1.2), (0.67, 1.2), (0.5, 1.0), (0.34, 1.0), (0.2, 0.7)])
def test_the_confidence_is_a_factor_of_k(confidence: float, expected: float) -> None:
    assert factor(confidence) == expected


def hits(make: Callable[[], Ranking], count: int, score: Callable[[float], float], trials: int = 200) -> float:
    """The share of random orders of 64 drafts whose best ``count`` a ranking finds, by a judge that is never wrong."""
    found = 0
    for seed in range(trials):
        quality = random.Random(seed).sample(range(1000), 64)
        judge, ranking = Script(lambda a, b, q=quality: float(q[a] > q[b])), make()  # type: ignore[misc]
        drafts = drafted([score(q / 100) for q in quality])
        for begin in range(0, 64, 8):
            ranking.add(drafts[begin : begin + 8], judge)
        ranking.settle(count + 4, judge)
        best = sorted(range(64), key=lambda i: -quality[i])[:count]
        found += {draft.index for draft in ranking.order[:count]} == set(best)
    return found / trials


@pytest.mark.parametrize("count", [1, 4])
def test_a_perfect_judge_returns_the_true_best(count: int) -> None:
    assert hits(lambda: ByInsertion(count + 4), count, lambda q: math.nan) == 1.0
    assert hits(ByElo, count, round) >= 0.95, "with scores in whole points"


def test_pairs_by_chances_and_rewards_by_number() -> None:
    drafts = drafted([1.0, 3.0, 3.0])
    assert [d.index for d in by_chances(chances(drafts, Script(lambda a, b: float(a > b))))] == [2, 1, 0]
    ranking = ByReward()
    ranking.add(drafts, Script(lambda a, b: math.nan))
    assert [draft.index for draft in ranking.order] == [1, 2, 0]
