"""What a rollout cost: rounds, drafts, kept and discarded frames, time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class RolloutStats:
    """Counts since a video began.

    Attributes:
        rounds: rounds that were begun.
        computed: frames that rounds drew, or began to draw.
        accepted: frames that became part of the video.
        discarded: frames that were thrown away, since the action was another one.
        evaluations: network calls.
        restarts: rounds that were given up between two steps.
        seconds: time of the calls.
        drafts: number of rounds by their number of frames.
        latency_asked: longest time in milliseconds from an action to its frame that was asked for; None for no limit.
        latency_p99: that time as measured with a limit: of 99 % of the rounds, with the step that may be running.
        is_oracle: whether drafts knew the actions to come, which live play cannot: an upper bound.
    """

    rounds: int = 0
    computed: int = 0
    accepted: int = 0
    discarded: int = 0
    evaluations: int = 0
    restarts: int = 0
    seconds: float = 0.0
    drafts: dict[int, int] = field(default_factory=dict)
    is_oracle: bool = False
    latency_asked: float | None = None
    latency_p99: float | None = None

    @property
    def fps(self) -> float:
        """Frames a second."""
        return self.accepted / self.seconds if self.seconds else 0.0

    @property
    def discard_rate(self) -> float:
        """Share of the computed frames that were thrown away."""
        return self.discarded / self.computed if self.computed else 0.0

    def begin(self, frames: int) -> None:
        """Count a new round."""
        self.rounds += 1
        self.computed += frames
        self.drafts[frames] = self.drafts.get(frames, 0) + 1

    def to_dict(self) -> dict[str, Any]:
        """Return all counts, JSON-ready."""
        drafts = {str(count): rounds for count, rounds in sorted(self.drafts.items())}
        values = {**vars(self), "drafts": drafts, "fps": self.fps, "discard_rate": self.discard_rate}
        return values


@dataclass(frozen=True)
class Rollout:
    """A drawn video.

    Attributes:
        frames: ``(B, T, C, H, W)`` in [-1, 1].
        stats: what it cost.
    """

    frames: Tensor
    stats: RolloutStats
