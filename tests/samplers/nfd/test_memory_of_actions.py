"""What a sampler remembers of actions is its own: no array that is used again, and no state, changes a video."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffaccel.errors import DiffAccelError
from diffaccel.samplers.nfd.sampler import NextFrameSampler
from tests.support.worlds import tiny_world


def sampler(draft=2, **options) -> NextFrameSampler:
    made = NextFrameSampler(tiny_world(), 2, draft=draft, **options)
    made.reset()
    return made


@pytest.mark.parametrize("action", [torch.tensor(1), np.array([1])], ids=["tensor", "array"])
def test_an_action_in_memory_that_is_used_again_is_the_new_one(action):
    """Players' loops write each action into one buffer; a draft of the one before must not pass for the new one."""
    plain, made = sampler(), sampler()
    for value in (1, 2, 2, 0, 3):
        action[...] = value
        assert torch.equal(made.step(action), plain.step(value))
        assert made.action == [value]
    assert made.stats.discarded == plain.stats.discarded > 0


def test_a_poll_that_changes_the_action_in_place_is_noticed():
    action, made = torch.tensor([1]), sampler()
    made.step(action, poll=lambda: action.fill_(2))
    assert made.stats.discarded == 1


def test_prepared_frames_are_part_of_a_state():
    made = sampler(1, fan_out=3)
    made.step(0)
    made.prepare([1, 2, 3])
    state, expected = made.state_dict(), [made.step(action) for action in (2, 1)]
    other = sampler(1, fan_out=3)
    other.load_state_dict(state)
    assert all(torch.equal(other.step(action), frame) for action, frame in zip((2, 1), expected, strict=True))
    assert other.stats.discarded == 2
    with pytest.raises(DiffAccelError, match="3 prepared frames; the sampler's fan_out is 2"):
        sampler(1, fan_out=2).load_state_dict(state)


def test_a_state_has_how_many_actions_the_share_of_held_ones_is_of():
    """Else "auto" takes other numbers of drafts after a load, and the video is another one."""
    made = sampler(1)
    for action in (0, 0, 1, 1, 1):
        made.step(action)
    other = sampler(1)
    other.load_state_dict(made.state_dict())
    made.step(0), other.step(0)
    assert other.held.repeats == made.held.repeats


def test_counts_of_a_rollout_stay_while_the_video_goes_on():
    made = sampler(1)
    first = made.rollout([0, 1])
    made.rollout([2, 2, 2])
    assert (first.stats.rounds, first.stats.drafts, made.stats.rounds) == (2, {1: 2}, 5)
