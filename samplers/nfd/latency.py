"""Whether a wish for a short time from an action to its frame is met; where it is not, that is said once."""

from __future__ import annotations

import logging
import math
from collections import deque

from diffaccel.samplers.nfd.policy import longest_delay

logger = logging.getLogger(__name__)

MEMORY, ENOUGH = 1024, 32  # rounds that the percentile is of, and after how many a video tells while it runs


class LatencyWatch:
    """Measures the time of rounds against the longest that was asked for.

    Args:
        asked: longest time in milliseconds from an action to its frame; None for no limit.
        steps: of a round.
    """

    def __init__(self, asked: float | None, steps: int) -> None:
        self.asked, self.steps = asked, steps
        self._first: float | None = None  # the first round, which also loads what all rounds need
        self._delays: deque[float] = deque(maxlen=MEMORY)
        self._is_told = False

    @property
    def p99(self) -> float | None:
        """Milliseconds from an action to its frame that 99 % of the rounds stay below, a running step included."""
        delays = sorted(self._delays) or ([] if self._first is None else [self._first])
        return delays[math.ceil(0.99 * len(delays)) - 1] if delays else None

    def note(self, seconds: float) -> float | None:
        """Take the time of a round into account, and return the percentile."""
        delay = 1000 * longest_delay(self.steps, seconds / self.steps)
        if self._first is None:
            self._first = delay
        else:
            self._delays.append(delay)
        if len(self._delays) >= ENOUGH:
            self.tell(f"p99 of the last {len(self._delays)} rounds")
        return self.p99

    def tell_of_steps(self, seconds_per_step: float) -> None:
        """Say once that even rounds of one frame take longer than asked, by the measured time of a step."""
        self._tell(1000 * longest_delay(self.steps, seconds_per_step), "rounds of one frame, measured before the video")

    def tell(self, of_what: str = "p99 of all rounds") -> None:
        """Say once that rounds take longer than asked, where they do."""
        if (p99 := self.p99) is not None:
            self._tell(p99, of_what)

    def _tell(self, delay: float, of_what: str) -> None:
        if self.asked is None or delay <= self.asked or self._is_told:
            return
        self._is_told = True
        logger.warning(
            "latency=%g ms was asked for from an action to its frame, and it takes %.4g ms (%s, with %d steps). Take "
            "fewer steps, draft=1, a smaller window or model, a GPU, or ask for %d ms.",
            self.asked, delay, of_what, self.steps, math.ceil(delay),
        )  # fmt: skip
