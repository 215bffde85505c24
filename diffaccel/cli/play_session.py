"""One game of a world model: the action that is wanted now, the next picture, and what is told about it."""

from __future__ import annotations

import io
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from diffaccel.cli.world import as_picture
from diffaccel.errors import DiffAccelError
from diffaccel.models.next_frame.beginnings import GREY, Beginning

if TYPE_CHECKING:
    from diffaccel.samplers.nfd.sampler import NextFrameSampler

ARROWS = 9  # number of actions of (left, none, right) times (down, none, up), in this order: CoinRun's


class PlaySession:
    """Draws pictures under the action that is wanted now, which another thread may change.

    Args:
        sampler: with a video begun.
        start: what it began with.

    Attributes:
        action: what is wanted.
    """

    def __init__(self, sampler: NextFrameSampler, start: Beginning = GREY) -> None:
        self.sampler, self.start = sampler, start
        self.actions = sampler.model.null_action
        self.rest = ARROWS // 2 if self.actions == ARROWS else 0
        self.action = self.rest
        self._changed: float | None = None  # when another action was asked for that no frame has shown
        self._latency: float | None = None
        self._times: deque[float] = deque(maxlen=60)
        self._alone = threading.Lock()  # a player who left may still be drawing, in a thread that nobody waits for

    def describe(self) -> dict[str, Any]:
        """Return what the page needs to know before the first frame."""
        _, height, width = self.sampler.model.frame_shape
        return {
            "width": width, "height": height, "actions": self.actions, "rest": self.rest,
            "arrows": self.actions == ARROWS,
        }  # fmt: skip

    def want(self, action: Any) -> None:
        """Ask for another action.

        Raises:
            DiffAccelError: for an action that the model does not have.
        """
        if isinstance(action, bool) or not isinstance(action, int) or not 0 <= action < self.actions:
            raise DiffAccelError(f"action is {action!r}; it must be an integer from 0 to {self.actions - 1}.")
        if action != self.action:
            self.action, self._changed = action, time.perf_counter()

    def let_go(self) -> None:
        """Hold no key of an earlier player."""
        self.action, self._changed, self._latency = self.rest, None, None
        self._times.clear()

    def begin_again(self) -> None:
        """Begin with the first frame again."""
        with self._alone:
            self.sampler.reset(*self.start, truncate=True)

    def next_picture(self) -> bytes:
        """Return the next frame as PNG."""
        with self._alone:
            return self._next_picture()

    def _next_picture(self) -> bytes:
        changed, action = self._changed, self.action
        frame = self.sampler.step(action, poll=lambda: self.action)
        data = io.BytesIO()
        as_picture(frame[0]).save(data, "PNG", compress_level=1)
        now = time.perf_counter()
        self._times.append(now)
        if changed is not None and self._changed == changed:
            self._latency, self._changed = 1000 * (now - changed), None
        return data.getvalue()

    def stats(self) -> dict[str, Any]:
        """Return frames a second, counts of drafts, and the milliseconds from the last changed action to its frame."""
        elapsed = self._times[-1] - self._times[0] if len(self._times) > 1 else 0.0
        counts = self.sampler.stats
        return {
            "fps": (len(self._times) - 1) / elapsed if elapsed else 0.0, "accepted": counts.accepted,
            "computed": counts.computed, "discarded": counts.discarded, "latency": self._latency,
            "action": self.action,
        }  # fmt: skip
