"""Options of the training of a world model, and of its distillation."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from diffaccel.distill.next_frame.consistency import Norm, Tangent
from diffaccel.distill.next_frame.layouts import LONGEST_DRAFT, LevelLaw
from diffaccel.errors import DiffAccelError
from diffaccel.training.loop import TrainingPlan


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """What one step learns from.

    Attributes:
        batch: sequences in a step, over all processes.
        frames: of a sequence, cached ones included.
        queries: noisy frames of a sequence under "cached".
        drafts: shares of steps under "cached" with drafts of 1, 2, ... frames.
        unknown: share of clips whose first frames, up to all, have no known action, as a prompt has.
        fastest: largest frequency, in radians per unit of the noise level, at which the network reads the level; that
            of teacher and student. Derivatives by the level are smooth without the fast ones (arXiv 2410.11081).
        plan: how long and how fast.
    """

    batch: int = 96
    frames: int = 32
    queries: int = 9
    drafts: tuple[float, ...] = (0.55, 0.15, 0.15, 0.15)
    unknown: float = 0.1
    fastest: float = 30.0
    plan: TrainingPlan

    def __post_init__(self) -> None:
        if self.batch < 1 or self.frames < 2:
            raise DiffAccelError(f"batch is {self.batch} and frames {self.frames}; they must be at least 1 and 2.")
        if not 1 <= self.queries <= (self.frames + 1) // 2:
            raise DiffAccelError(f"queries is {self.queries}; it must be in [1, {(self.frames + 1) // 2}].")
        longest = min(LONGEST_DRAFT, self.queries)
        if not 1 <= len(self.drafts) <= longest or not min(self.drafts) >= 0 or not abs(sum(self.drafts) - 1) <= 1e-6:
            raise DiffAccelError(f"drafts is {self.drafts}; it must be 1 to {longest} shares that sum to 1.")
        if not 0 <= self.unknown <= 1:
            raise DiffAccelError(f"unknown is {self.unknown}; it must be in [0, 1].")
        if not self.fastest > 0.1:
            raise DiffAccelError(f"fastest is {self.fastest}; it must be above 0.1, the slowest of all frequencies.")


@dataclass(frozen=True, kw_only=True)
class WorldForcing(Sequences):
    """Flow matching of a world model.

    Attributes:
        cached: share of steps under "cached"; the others are "forcing" (see ``layouts``).
        law: of noise levels.
    """

    cached: float = 0.5
    law: LevelLaw = field(default_factory=lambda: LevelLaw(shift=2.0))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.cached <= 1:
            raise DiffAccelError(f"cached is {self.cached}; it must be in [0, 1].")

    @classmethod
    def paper(cls, **changes: Any) -> Self:
        """Return the published form: levels of all frames independent, logit-normal, and nothing else."""
        law = LevelLaw(mean=0.0, deviation=1.0, shift=1.0, prefix=0.0, tail=0.0)
        return cls(**{"cached": 0.0, "unknown": 0.0, "fastest": 1000.0, "law": law, **changes})


@dataclass(frozen=True, kw_only=True)
class WorldConsistency(Sequences):
    """Consistency distillation of a world model to few steps.

    Attributes:
        situation: "cached": noisy frames move beside a cache that stands, as they are sampled; "forcing": all frames of
            a clip are noisy and move at once, as published.
        sigma_data: standard deviation of the data in the TrigFlow form.
        mean, deviation: of the logarithm of ``sigma_data tan(t)``, which is the logit of the noise level.
        context: largest noise level of cached frames.
        tangent: "jvp": exact derivative by forward mode; "secant": difference quotient over ``step`` of angle; "solve":
            no derivative, the end of the teacher's path in ``solver_steps`` steps is the target.
        norm: over what the tangent is normalised.
        warmup: share of the run in which r rises to 1.
        anchor: noise level below which the student keeps to the teacher's velocity (r is 0 there, and has its value at
            twice this level): there is little left to jump over, and tangents are mostly the network's own errors.
        adversarial: weight of the adversarial term; 0 leaves it out.
    """

    situation: Literal["cached", "forcing"] = "cached"
    sigma_data: float = 0.5
    mean: float = 1.5
    deviation: float = 1.6
    context: float = 0.1
    tangent: Tangent = "solve"
    step: float = 0.1
    solver_steps: int = 6
    norm: Norm = "frame"
    warmup: float = 0.3
    anchor: float = 0.1
    adversarial: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (
            ("situation", ("cached", "forcing")), ("tangent", ("jvp", "secant", "solve")), ("norm", ("clip", "frame")),
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                choice = " or ".join(map(repr, allowed))
                raise DiffAccelError(f"{name} is {getattr(self, name)!r}; it must be {choice}.")
        finite = all(math.isfinite(value) for value in (self.sigma_data, self.deviation, self.mean))
        if not (finite and self.sigma_data > 0 and self.deviation > 0 and 0 < self.step <= 0.2):
            raise DiffAccelError(
                f"sigma_data is {self.sigma_data}, deviation {self.deviation}, mean {self.mean} and step {self.step}; "
                "they must be finite, all but the mean above 0, and step at most 0.2."
            )
        for name, high in (("warmup", 1), ("context", 0.5), ("anchor", 0.5)):
            if not 0 <= getattr(self, name) <= high:
                raise DiffAccelError(f"{name} is {getattr(self, name)}; it must be in [0, {high}].")
        if self.solver_steps < 1:
            raise DiffAccelError(f"solver_steps is {self.solver_steps}; it must be 1 or more.")
        if not 0 <= self.adversarial < math.inf:
            raise DiffAccelError(f"adversarial is {self.adversarial}; it must not be below 0, which leaves it out.")

    @classmethod
    def paper(cls, **changes: Any) -> Self:
        """Return the published form: all frames move, one tangent norm over the clip, an adversarial term."""
        published: dict[str, Any] = {
            "situation": "forcing", "norm": "clip", "adversarial": 0.1, "unknown": 0.0, "mean": 0.0, "deviation": 1.6,
            "tangent": "jvp", "anchor": 0.0,
        }  # fmt: skip
        return cls(**{**published, **changes})
