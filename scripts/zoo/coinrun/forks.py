"""What the model is measured on: games of levels that training never sees, forked at one state into branches.

All branches of a game begin with the same frames; the simulator then follows the policy ("true"), goes on with the
present action ("repeat"), or takes random actions ("random"). So the truth is known for actions that were not taken.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from scripts.zoo.coinrun.policy import HoldPolicy
from scripts.zoo.coinrun.pool import VALIDATION_LEVELS
from scripts.zoo.coinrun.simulator import NULL_ACTION, CoinRun, camera

_GAMES = 128
_BEGIN = 12  # frames of an episode before the given ones, so that the games stand at different places


@dataclass(frozen=True)
class Forks:
    """Games at a fork.

    Attributes:
        given: ``(N, P, 3, 64, 64)`` uint8 frames before the fork, and ``given_actions (N, P)`` that produced them.
        frames: by branch, ``(N, H, 3, 64, 64)`` uint8 frames after it.
        actions: by branch, ``(N, H)``.
        given_camera: ``(N, P, 2)`` x and y in pixels.
        camera: ``(N, H, 2)`` of the branch "true".
    """

    given: Tensor
    given_actions: Tensor
    frames: dict[str, Tensor]
    actions: dict[str, Tensor]
    given_camera: Tensor
    camera: Tensor

    def __len__(self) -> int:
        return len(self.given)


def make_forks(folder: Path, count: int, given: int, horizon: int, seed: int = 0) -> Forks:
    """Play until ``count`` games have ``given`` frames of one episode and ``horizon`` more in each branch."""
    random = np.random.default_rng(seed)
    game = CoinRun(folder, _GAMES, seed, VALIDATION_LEVELS)
    policy = HoldPolicy(_GAMES, random)
    parts: list[dict[str, np.ndarray]] = []
    try:
        while sum(len(part["given"]) for part in parts) < count:
            for _ in range(int(random.integers(_BEGIN, 6 * _BEGIN))):
                game.step(policy())
            parts.append(_fork(game, policy, given, horizon, random))
    finally:
        game.close()
    arrays = {name: torch.from_numpy(np.concatenate([part[name] for part in parts])[:count]) for name in parts[0]}
    names = ("true", "repeat", "random")
    return Forks(
        _pictures(arrays["given"]), arrays["given_actions"],
        {name: _pictures(arrays[f"{name}_frames"]) for name in names},
        {name: arrays[f"{name}_actions"] for name in names}, arrays["given_camera"], arrays["camera"],
    )  # fmt: skip


def _pictures(frames: Tensor) -> Tensor:
    return frames.permute(0, 1, 4, 2, 3).contiguous()


def _play(game: CoinRun, actions: Callable[[], np.ndarray], steps: int) -> dict[str, np.ndarray]:
    """Play ``steps`` frames, and return arrays ``(games, steps, ...)``."""
    rows: dict[str, list[np.ndarray]] = {"frames": [], "actions": [], "first": [], "camera": []}
    for _ in range(steps):
        taken = actions()
        game.step(taken)
        first = game.first.astype(bool)
        rows["frames"].append(game.frames.copy())
        rows["actions"].append(np.where(first, NULL_ACTION, taken).astype(np.int64))
        rows["first"].append(first)
        rows["camera"].append(np.array([camera(state) for state in game.states()]))
    return {name: np.stack(row, 1) for name, row in rows.items()}


def _fork(
    game: CoinRun, policy: HoldPolicy, given: int, horizon: int, random: np.random.Generator
) -> dict[str, np.ndarray]:
    """Play the given frames and all branches, and return those games in which no episode ends."""
    before = _play(game, policy, given)
    states, present = game.states(), before["actions"][:, -1].clip(max=NULL_ACTION - 1)
    draws = random.integers(0, NULL_ACTION, (horizon, game.count))
    branches = {"true": _play(game, policy, horizon)}
    end = game.states()
    game.restore(states)
    branches["repeat"] = _play(game, lambda: present, horizon)
    game.restore(states)
    rest = iter(draws)
    branches["random"] = _play(game, lambda: next(rest), horizon)
    game.restore(end)
    ended = before["first"][:, 1:].any(1) | np.any([branch["first"].any(1) for branch in branches.values()], 0)
    whole = ~ended
    arrays = {"given": before["frames"], "given_actions": before["actions"], "given_camera": before["camera"]}
    arrays["camera"] = branches["true"]["camera"]
    for name, branch in branches.items():
        arrays |= {f"{name}_frames": branch["frames"], f"{name}_actions": branch["actions"]}
    return {name: array[whole] for name, array in arrays.items()}


def policy_actions(count: int, frames: int, seed: int) -> Tensor:
    """Return actions ``(count, frames)`` of the policy, for long videos without a truth."""
    policy = HoldPolicy(count, np.random.default_rng(seed))
    return torch.from_numpy(np.stack([policy() for _ in range(frames)], 1))
