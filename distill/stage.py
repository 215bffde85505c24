"""Options that every stage of distillation has: how long it learns, how fast, and what its student is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from diffaccel.config import Config
from diffaccel.distill.levels import from_ratio
from diffaccel.errors import DiffAccelError

Start = Literal["unit", "scaled"]
LARGEST_BATCH, LARGEST_RATE = 1 << 20, 1000  # more is an error of the hand, and a run without an end or numbers


@dataclass(frozen=True, kw_only=True)
class StageOptions(Config):
    """Options of one stage: it begins with a network, the teacher's or an earlier stage's, and ends with a student.

    Args:
        steps: of the generator.
        batch: pictures in a step, of all processes together.
        lr: learning rate of the generator, constant and then falling linearly to ``floor`` of it.
        flat: share of the steps before the learning rates fall.
        floor: share of the learning rates at the end.
        noise_ratio: noise to signal of the level at which the generator is asked: 2.5 is 0.71 of a flow model.
        start: what the generator is given there: noise of deviation one, as stock pipelines begin with, or "scaled" to
            the level.
        ema_pictures: half-life of the average of weights, in pictures; 0 for none.
        clip: largest norm of a gradient.
        save_seconds, log_seconds: time between checkpoints and between entries of the log.
    """

    fresh_noise: ClassVar[bool] = True  # whether calls after the first are given fresh noise, or go on along their path

    steps: int = 4000
    batch: int = 256
    lr: float = 5e-5
    flat: float = 0.5
    floor: float = 0.04
    noise_ratio: float = 2.5
    start: Start = "unit"
    ema_pictures: int = 50_000
    clip: float = 1.0
    save_seconds: float = 60.0
    log_seconds: float = 5.0

    def validate(self) -> None:
        name = type(self).__name__
        for option, least in (("steps", 1), ("batch", 1), ("ema_pictures", 0)):
            if getattr(self, option) < least:
                raise DiffAccelError(f"{name}.{option} is {getattr(self, option)}; it must be at least {least}.")
        for option in ("lr", "noise_ratio", "clip"):
            if getattr(self, option) <= 0:
                raise DiffAccelError(f"{name}.{option} is {getattr(self, option)}; it must be above 0.")
        for option, most in (("batch", LARGEST_BATCH), ("lr", LARGEST_RATE)):
            if getattr(self, option) > most:
                raise DiffAccelError(f"{name}.{option} is {getattr(self, option)}; it must be at most {most:,}.")
        if not 0 <= self.flat < 1:
            raise DiffAccelError(f"{name}.flat is {self.flat}; it must be in [0, 1).")
        if not 0 <= self.floor <= 1:
            raise DiffAccelError(f"{name}.floor is {self.floor}; it must be in [0, 1].")
        for option in ("save_seconds", "log_seconds"):
            if getattr(self, option) < 0:
                raise DiffAccelError(f"{name}.{option} is {getattr(self, option)}; it must be at least 0, every step.")
        if not 1e-3 <= self.noise_ratio <= 1e3:
            raise DiffAccelError(
                f"{name}.noise_ratio is {self.noise_ratio}; it must be in [0.001, 1000], inside of all noise levels."
            )
        if self.ema_pictures > self.steps * self.batch:
            raise DiffAccelError(
                f"{name}.ema_pictures is {self.ema_pictures}, but the run draws {self.steps * self.batch} pictures, so "
                "the average would still be the teacher. Take a tenth of them or less."
            )

    @property
    def calls(self) -> int:
        """Number of network calls in which the student draws."""
        raise NotImplementedError(f"{type(self).__name__} names no number of calls: subclasses of StageOptions do.")

    @property
    def risk(self) -> str | None:
        """What is known to go wrong with these options, in a sentence."""
        return None

    @property
    def student_levels(self) -> tuple[float, ...]:
        """Levels ``sigma_i = sigma_1 (1 - i / N)`` of the student's network calls ``i < N``, on the linear path."""
        first = from_ratio(self.noise_ratio)
        return tuple(first * (1 - call / self.calls) for call in range(self.calls))
