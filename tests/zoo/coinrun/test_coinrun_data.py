"""CoinRun's data: the copy of the library, frames from seeds, clips, forks of one state."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffaccel.errors import DiffAccelError
from scripts.zoo.coinrun import fetch, policy, pool, simulator

DATA = Path("data/coinrun")
needs_coinrun = pytest.mark.skipif(
    not (DATA / "lib").is_dir(), reason="CoinRun is not here: python -m scripts.zoo.coinrun.fetch --data data/coinrun"
)


def _clips_by_hand(first: torch.Tensor, length: int) -> list[int]:
    rows, steps = first.shape
    return [
        row * steps + step
        for row in range(rows)
        for step in range(steps - length + 1)
        if not first[row, step + 1 : step + length].any()
    ]


@pytest.mark.parametrize("length", [1, 2, 5, 12, 13])
def test_clips_lie_in_one_episode(length):
    first = torch.rand(6, 12, generator=torch.Generator().manual_seed(length)) < 0.15
    assert pool.clip_starts(first, length).tolist() == _clips_by_hand(first, length)


def test_actions_are_held_as_long_as_said():
    games, frames = 500, 1000
    hold = policy.HoldPolicy(games, np.random.default_rng(0))
    actions = np.stack([hold() for _ in range(frames)])
    repeat = (actions[1:] == actions[:-1]).mean(0)
    same = float((policy.SHARES**2).sum())  # a new draw that is the old one
    for group, mean in ((repeat[:100], policy.SHORT), (repeat[100:], policy.LONG)):
        assert abs(group.mean() - (1 - (1 - same) / mean)) < 4 * group.std() / len(group) ** 0.5 + 1e-3
    shares = np.bincount(actions.ravel(), minlength=9) / actions.size
    assert np.abs(shares - policy.SHARES).max() < 0.01


def test_the_blank_picture_is_one_clear_pixel():
    picture = Image.open(io.BytesIO(fetch.blank()))
    assert picture.size == (1, 1) and picture.convert("RGBA").getpixel((0, 0)) == (0, 0, 0, 0)


def test_frames_become_values_and_back():
    frames = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(pool.to_bytes(pool.to_unit(frames)), frames)
    assert pool.to_unit(frames).aminmax() == (-1, 1)


def test_a_missing_copy_says_how_to_make_it(tmp_path):
    with pytest.raises(DiffAccelError, match=r"python -m scripts\.zoo\.coinrun\.fetch"):
        simulator.CoinRun(tmp_path, 1, 0, (0, 10))


@needs_coinrun
def test_a_pool_depends_on_its_seed_alone():
    size = pool.PoolSize(chunks=3, games=4, steps=24)
    one, two = (pool.Pool(DATA, size, pool.TRAINING_LEVELS, 3, 6, "cpu", threads) for threads in (1, 3))
    assert torch.equal(one.frames, two.frames) and torch.equal(one.actions, two.actions)
    assert torch.equal(one.starts, two.starts)
    other = pool.Pool(DATA, size, pool.TRAINING_LEVELS, 4, 6, "cpu", 1)
    assert not torch.equal(one.frames, other.frames)
    draws = [one.draw(5, torch.Generator().manual_seed(0)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*draws, strict=True)) and draws[0][0].shape == (5, 6, 3, 64, 64)


@needs_coinrun
def test_training_never_sees_a_validation_level():
    for levels in (pool.TRAINING_LEVELS, pool.VALIDATION_LEVELS):
        played = pool.record(DATA, levels, 0, 32, 200).levels
        assert played.min() >= levels[0] and played.max() < sum(levels) and len(np.unique(played)) > 40
    assert sum(pool.TRAINING_LEVELS) <= pool.VALIDATION_LEVELS[0]


@needs_coinrun
def test_a_fork_replays_a_branch_exactly_and_another_action_leaves_it():
    game = simulator.CoinRun(DATA, 8, 1, pool.TRAINING_LEVELS)
    for _ in range(10):
        game.step(np.full(8, 7))
    states, branches = game.states(), []
    for action in (8, 8, 1):
        game.restore(states)
        frames = [game.frames.copy()]
        for _ in range(4):
            game.step(np.full(8, action))
            frames.append(game.frames.copy())
        branches.append(np.stack(frames))
    assert np.array_equal(branches[0], branches[1]) and np.array_equal(branches[0][0], branches[2][0])
    assert not np.array_equal(branches[0][1:], branches[2][1:])


@needs_coinrun
def test_the_camera_says_how_the_picture_moves():
    """Shifting a frame by the camera's way gives the next one better than any shift beside it."""
    game = simulator.CoinRun(DATA, 32, 5, pool.TRAINING_LEVELS)
    errors = dict.fromkeys([(0, 0), (2, 0), (-2, 0), (0, 2), (0, -2)], 0.0)
    before, camera = game.frames.astype(float), [simulator.camera(state) for state in game.states()]
    for step in range(24):
        game.step(np.full(32, 7 if step % 8 else 8))
        after, moved = game.frames.astype(float), [simulator.camera(state) for state in game.states()]
        for i in np.flatnonzero(game.first == 0):
            dx, dy = (round(new - old) for new, old in zip(moved[i], camera[i], strict=True))
            for shift in errors:
                rolled = np.roll(before[i], (dy + shift[1], -dx + shift[0]), (0, 1))[12:-12, 12:-12]
                errors[shift] += float(np.square(rolled - after[i, 12:-12, 12:-12]).mean())
        before, camera = after, moved
    assert min(errors, key=errors.__getitem__) == (0, 0)
