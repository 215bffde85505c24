"""A search of sets of real steps: what every proposal keeps, and the optimum of losses in closed form."""

from __future__ import annotations

import pytest

from scripts.pattern_annealing import PatternSearch, Steps

WANTED = frozenset({0, 1, 5, 9, 14, 19})


def distance(real: Steps) -> float:
    """Return how far a set's steps are from the wanted ones, one by one in order."""
    return sum(abs(a - b) for a, b in zip(sorted(real), sorted(WANTED), strict=True)) / 20


def test_every_set_has_its_size_and_its_prefix_and_the_best_is_found_again_with_the_same_seed():
    seen: list[Steps] = []

    def loss(real: Steps) -> float:
        seen.append(real)
        return distance(real)

    search = PatternSearch(loss, 20, 6, 600, prefix=2, seed=3)
    assert search.run() == WANTED
    assert all(len(real) == 6 and {0, 1} <= real and max(real) < 20 for real in seen)
    assert len(seen) == len(set(seen)) == len(search.measured) and search.hits > 0
    again = PatternSearch(distance, 20, 6, 600, prefix=2, seed=3)
    assert again.run() == WANTED and list(again.measured) == seen


def test_the_prefix_is_a_quarter_of_the_budget_and_all_steps_need_no_search():
    assert [PatternSearch(distance, 28, n, 5).first for n in (2, 10, 28)] == [1, 2, 7]
    assert PatternSearch(distance, 6, 6, 5).run() == frozenset(range(6))
    with pytest.raises(ValueError, match="7 real steps of 6"):
        PatternSearch(distance, 6, 7, 5)


def test_what_is_found_is_no_worse_than_the_start_when_evaluations_run_out():
    for seed in range(5):
        search = PatternSearch(distance, 20, 6, 9, seed=seed)
        found = search.run()
        assert len(search.measured) <= 9
        assert search.measured[found] == min(search.measured.values()) <= next(iter(search.measured.values()))
