"""Score implicit matching: a student that draws in one network call, from a teacher and prompts alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

from diffaccel.distill.options import Matching
from diffaccel.errors import unknown


@dataclass(frozen=True, kw_only=True)
class SIM(Matching):
    """One-step distillation by score implicit matching: no pictures, no samples of the teacher, no discriminator.

    A generator ``G`` draws in one network call, or in a few (``student_steps``). An assistant ``F`` learns the scores
    of what ``G`` draws by denoising it, and ``G`` follows the difference between the assistant's and the teacher's
    scores, in turns. All three begin as the teacher.
    """

    name: ClassVar[str] = "sim"
    added: ClassVar[tuple[str, ...]] = ("student_steps", "student_match", "rank")
    trainer: ClassVar[str] = "diffaccel.distill.train:distil"
    citation: ClassVar[str] = "One-Step Diffusion Distillation through Score Implicit Matching, arXiv 2410.16794"

    @classmethod
    def paper(cls, **changes: Any) -> Self:
        """Return the published settings: clean estimates, log-normal levels, input scaled to ratio 2.5."""
        published: dict[str, Any] = {
            "space": "x0", "start": "scaled", "lr": 1e-5, "flat": 0.999, "levels": "log_normal", "mean": -1.2,
            "deviation": 1.2, "assistant_levels": "log_normal", "assistant_mean": -1.2, "assistant_deviation": 1.2,
            "ema_pictures": 500_000, "clip": 1e6,
        }  # fmt: skip
        return cls(**{**published, **changes})

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """Return the settings of a method of the family: "sim", "sid", "diff-instruct", "dmd" or "fgm"."""
        if name not in PRESETS:
            raise unknown("preset", name, PRESETS)
        return cls(**{**PRESETS[name], **changes})


PRESETS: dict[str, dict[str, Any]] = {
    "sim": {},
    "sid": {"alpha": 1.2, "distance": "l2", "space": "x0", "weight": "teacher", "levels": "karras", "high": 0.8},
    "diff-instruct": {"distance": "l2", "space": "score", "grad_through_scores": False},
    "dmd": {"distance": "l2", "space": "x0", "weight": "teacher", "grad_through_scores": False, "assistant_steps": 5},
    "fgm": {"alpha": 0.5, "distance": "l2", "space": "raw"},
}  # each beside the defaults, so that a table compares losses alone
