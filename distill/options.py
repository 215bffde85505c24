"""Options of distillation by matching scores, and what is known of them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from diffaccel.distill.levels import Law, Levels
from diffaccel.distill.losses import Distance, Weight
from diffaccel.distill.parameterization import Space
from diffaccel.distill.stage import LARGEST_RATE, StageOptions
from diffaccel.errors import DiffAccelError

Match = Literal["mixture", "last"]
MOST_CALLS = 1000


@dataclass(frozen=True, kw_only=True)
class Matching(StageOptions):
    """Options of one-step distillation by matching the scores of a generator and a teacher.

    A generator ``G`` draws in one network call. An assistant ``F`` learns the scores of what ``G`` draws by denoising
    it, and ``G`` follows the difference between the assistant's and the teacher's scores, in turns. All three begin as
    the teacher.

    Args:
        student_steps: network calls in which the student draws. Those after the first are given its last drawing with
            fresh noise, at levels that fall evenly.
        student_match: of a student of several steps, whether drawings of all calls are matched, each picture's at a
            call drawn for it, so that their mixture becomes the teacher's; or those of the "last" alone, which are what
            a user sees, while earlier calls change with the weights that they share.
        rank: of the generator's change of every matrix; 0 for any. The assistant is free.
        assistant_lr: of the assistant; 0 for that of the generator.
        momentum, assistant_momentum: first beta of Adam. Momentum in an assistant that makes one step a turn destroys
            training.
        assistant_steps: of the assistant before each of the generator.
        alpha: 1 is score implicit matching, 1.2 SiD, 0.5 the Fisher divergence.
        distance: "huber" (pseudo-Huber of ``c``) or "l2".
        c: scale below which the pseudo-Huber distance is a square; 0 normalises every sample's gradient.
        space: in which differences are taken: clean estimates, raw outputs, or scores.
        weight: of a sample: 1, or one over the teacher's mean absolute error.
        grad_through_scores: whether gradients also run through both networks to their input; False is Diff-Instruct.
        levels, low, high, mean, deviation: law of the generator's noise levels, see ``Levels``.
        assistant_levels, assistant_mean, assistant_deviation: of the assistant's.
        shift: moves both towards noise.
        sequential: keep one network's activations at a time: a third of the memory for two more forwards.
    """

    student_steps: int = 1
    student_match: Match = "mixture"
    rank: int = 0
    assistant_lr: float = 0.0
    momentum: float = 0.0
    assistant_momentum: float = 0.0
    assistant_steps: int = 1
    alpha: float = 1.0
    distance: Distance = "huber"
    c: float = 0.0
    space: Space = "raw"
    weight: Weight = "one"
    grad_through_scores: bool = True
    levels: Law = "uniform"
    low: float = 0.02
    high: float = 0.98
    mean: float = 0.0
    deviation: float = 1.0
    assistant_levels: Law = "logit_normal"
    assistant_mean: float = 0.0
    assistant_deviation: float = 1.0
    shift: float = 1.0
    sequential: bool = False

    def validate(self) -> None:
        super().validate()
        name = type(self).__name__
        for option, least in (("student_steps", 1), ("assistant_steps", 1), ("rank", 0)):
            if getattr(self, option) < least:
                raise DiffAccelError(f"{name}.{option} is {getattr(self, option)}; it must be at least {least}.")
        for option, most in (("student_steps", MOST_CALLS), ("assistant_lr", LARGEST_RATE)):
            if getattr(self, option) > most:
                raise DiffAccelError(f"{name}.{option} is {getattr(self, option)}; it must be at most {most:,}.")
        for option in ("shift", "deviation", "assistant_deviation"):
            if getattr(self, option) <= 0:
                raise DiffAccelError(f"{name}.{option} is {getattr(self, option)}; it must be above 0.")
        for option in ("momentum", "assistant_momentum"):
            if not 0 <= getattr(self, option) < 1:
                raise DiffAccelError(f"{name}.{option} is {getattr(self, option)}; it must be in [0, 1).")
        for option in ("c", "assistant_lr"):
            if getattr(self, option) < 0:
                raise DiffAccelError(f"{name}.{option} is {getattr(self, option)}; it must not be below 0.")
        if not 0 < self.low < self.high <= 1:
            raise DiffAccelError(f"{name}.low and high are {self.low} and {self.high}; they need 0 < low < high <= 1.")
        self._refuse_idle()

    def _refuse_idle(self) -> None:
        """Raise for an option that was changed and has no effect beside the others."""
        laws = {"levels": self.levels, "assistant_levels": self.assistant_levels}
        normal = {name: law in ("logit_normal", "log_normal") for name, law in laws.items()}
        works = {
            "student_match": (self.student_steps > 1, "student_steps=1"),
            "c": (self.distance == "huber", "distance='l2'"),
            "alpha": (self.grad_through_scores, "grad_through_scores=False"),
            "low": (
                "uniform" in laws.values(),
                f"levels={self.levels!r} and assistant_levels={self.assistant_levels!r}",
            ),
            "high": (
                not all(normal.values()),
                f"levels={self.levels!r} and assistant_levels={self.assistant_levels!r}",
            ),
            "mean": (normal["levels"], f"levels={self.levels!r}"),
            "deviation": (normal["levels"], f"levels={self.levels!r}"),
            "assistant_mean": (normal["assistant_levels"], f"assistant_levels={self.assistant_levels!r}"),
            "assistant_deviation": (normal["assistant_levels"], f"assistant_levels={self.assistant_levels!r}"),
        }
        defaults = {field.name: field.default for field in fields(self)}
        for option, (effective, beside) in works.items():
            if not effective and getattr(self, option) != defaults[option]:
                raise DiffAccelError(
                    f"{type(self).__name__}.{option} is {getattr(self, option)}, which has no effect with {beside}. "
                    f"Leave it at {defaults[option]}, or change that."
                )

    @property
    def calls(self) -> int:
        """Number of network calls in which the student draws."""
        return self.student_steps

    @property
    def generator_law(self) -> Levels:
        return Levels(self.levels, self.low, self.high, self.mean, self.deviation, self.shift)

    @property
    def assistant_law(self) -> Levels:
        law = self.assistant_levels
        return Levels(law, self.low, self.high, self.assistant_mean, self.assistant_deviation, self.shift)

    @property
    def risk(self) -> str | None:
        """What is known to go wrong with these options, in a sentence."""
        if self.assistant_momentum >= 0.5 and self.assistant_steps < 5:
            return (
                f"assistant_momentum={self.assistant_momentum} with assistant_steps={self.assistant_steps} is known to "
                "destroy training; use 0, or 5 assistant steps."
            )
        return None
