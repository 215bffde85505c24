"""How the games are played: actions that are held for a while, mostly to the right."""

from __future__ import annotations

import numpy as np

SHARES = np.array([0.02, 0.10, 0.06, 0.04, 0.12, 0.10, 0.04, 0.30, 0.22])  # of ``simulator.ACTIONS``
LONG, SHORT = 10.0, 3.0  # mean frames for which an action is held
SHORT_GAMES = 0.2  # share of games with short holds, so that quick changes are learnt too


class HoldPolicy:
    """Draws an action, holds it for a geometric number of frames, and draws again; four of five games hold long."""

    def __init__(self, games: int, random: np.random.Generator) -> None:
        self._random = random
        self._change = np.where(np.arange(games) < SHORT_GAMES * games, 1 / SHORT, 1 / LONG)
        self._actions = self._new()

    def _new(self) -> np.ndarray:
        return self._random.choice(len(SHARES), len(self._change), p=SHARES)

    def __call__(self) -> np.ndarray:
        """Return the next action of every game, ``(games,)``."""
        change = self._random.random(len(self._change)) < self._change
        self._actions = np.where(change, self._new(), self._actions)
        return self._actions
