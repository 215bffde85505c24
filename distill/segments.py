"""Options of consistency distillation along the segments of a teacher's trajectories."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffaccel.distill.levels import from_ratio
from diffaccel.distill.stage import StageOptions
from diffaccel.errors import DiffAccelError

LONGEST_GRID = 10_000


@dataclass(frozen=True, kw_only=True)
class Segments(StageOptions):
    """Options of distillation by consistency inside of segments of the teacher's trajectories.

    Args:
        noise_ratio: noise to signal of the level at which trajectories begin: 1000 is 0.999 of a flow model. Models of
            diffusion end at less: 14.6 is the last level of Stable Diffusion 1.5.
        segments: numbers of segments, one after another for equal shares of the steps. A student draws in as many
            network calls as the last one says.
        grid: steps of the teacher from noise to a picture, on levels that fall evenly; a multiple of every number of
            segments.
        c: scale below which the pseudo-Huber distance is a square; in 16 bits, not below the noise of two outputs.
        target_decay: decay a step of the averaged weights whose output is the goal; 0 for the weights as they are.
        momentum: first beta of Adam.
    """

    fresh_noise: ClassVar[bool] = False

    noise_ratio: float = 1000.0
    segments: tuple[int, ...] = (8, 4, 2, 1)
    grid: int = 32
    c: float = 0.1
    target_decay: float = 0.95
    momentum: float = 0.9

    def validate(self) -> None:
        super().validate()
        name = type(self).__name__
        if not self.segments or min(self.segments) < 1:
            raise DiffAccelError(f"{name}.segments is {list(self.segments)}; it needs numbers of at least 1.")
        if any(later >= before for before, later in zip(self.segments, self.segments[1:], strict=False)):
            raise DiffAccelError(f"{name}.segments is {list(self.segments)}; the numbers must fall, such as 8,4,2,1.")
        if not 1 <= self.grid <= LONGEST_GRID:
            raise DiffAccelError(f"{name}.grid is {self.grid}; it must be from 1 to {LONGEST_GRID:,} steps.")
        if bad := [count for count in self.segments if self.grid % count]:
            raise DiffAccelError(
                f"{name}.grid is {self.grid}, which {bad[0]} segments do not divide. Take a multiple of all of "
                f"{list(self.segments)}."
            )
        if len(self.segments) > self.steps:
            raise DiffAccelError(
                f"{name}.segments has {len(self.segments)} numbers for {self.steps} steps. Take fewer, or more steps."
            )
        for option in ("target_decay", "momentum"):
            if not 0 <= getattr(self, option) < 1:
                raise DiffAccelError(f"{name}.{option} is {getattr(self, option)}; it must be in [0, 1).")
        if self.c < 0:
            raise DiffAccelError(f"{name}.c is {self.c}; it must not be below 0.")

    @property
    def calls(self) -> int:
        """Number of network calls in which the student draws."""
        return self.segments[-1]

    @property
    def levels(self) -> tuple[float, ...]:
        """Levels ``sigma_1 (1 - n / grid)`` of a trajectory's points ``n <= grid``, on the linear path."""
        first = from_ratio(self.noise_ratio)
        return tuple(first * (1 - place / self.grid) for place in range(self.grid + 1))

    def segments_at(self, step: int) -> int:
        """Return the number of segments at a step."""
        return self.segments[min(step * len(self.segments) // self.steps, len(self.segments) - 1)]
