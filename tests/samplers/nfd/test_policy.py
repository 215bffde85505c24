"""How many drafts pay: the closed forms, and simulated streams of actions."""

from __future__ import annotations

import random

import pytest

from diffaccel.samplers.nfd.policy import HeldActions, best_drafts, expected_kept, longest_delay, speedup


@pytest.mark.parametrize("repeats", [0.0, 0.5, 0.8, 0.9, 0.95, 1.0])
@pytest.mark.parametrize("drafts", [1, 2, 4, 8])
def test_the_mean_number_of_kept_frames(repeats, drafts):
    """20,000 rounds of a stream whose actions repeat independently: within four standard errors."""
    draw, rounds = random.Random(1), 20_000
    kept = []
    for _ in range(rounds):
        count = 1
        while count < drafts and draw.random() < repeats:
            count += 1
        kept.append(count)
    mean = sum(kept) / rounds
    error = (sum((count - mean) ** 2 for count in kept) / rounds / rounds) ** 0.5
    assert abs(mean - expected_kept(drafts, repeats)) <= 4 * error + 1e-12
    if repeats < 1:
        assert expected_kept(drafts, repeats) == pytest.approx((1 - repeats**drafts) / (1 - repeats))


def test_two_drafts_pay_where_the_second_costs_less_than_actions_repeat():
    for cost in (0.1, 0.5, 0.9):
        assert (speedup(2, 0.6, 1 + cost) > 1) == (0.6 > cost)


def test_the_best_number_of_drafts():
    seconds = {1: 1.0, 2: 1.2, 4: 1.6, 8: 4.0}
    assert best_drafts(seconds, 0.0, 4, None) == 1
    assert best_drafts(seconds, 0.5, 4, None) == 2
    assert best_drafts(seconds, 0.95, 4, None) == 4
    assert best_drafts(seconds, 0.95, 4, longest_delay(4, 1.2)) == 2
    assert best_drafts(seconds, 0.95, 4, 0.1) == 1


def test_the_estimate_follows_the_actions():
    held = HeldActions()
    for _ in range(200):
        held.note(True)
    assert held.repeats > 0.99
    for number in range(2000):
        held.note(number % 4 != 0)
    assert held.repeats == pytest.approx(0.75, abs=0.05)
