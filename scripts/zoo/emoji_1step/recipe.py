"""Sizes of emoji-flux-1step: ``full`` for one GPU, ``tiny`` for trying the code."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from diffaccel.errors import unknown


@dataclass(frozen=True, kw_only=True)
class OneStepRecipe:
    """What is distilled, and how.

    Attributes:
        prompts: in training.
        seconds: of the run, where ``--last`` does not end it with its call.
        turns: of the run; 0 for as many as fit into its seconds.
        looked: pictures of an evaluation in training.
        scored: pictures of the score.
        teacher_steps: of the table; the first is the teacher's own number.
        options: of the method.
    """

    name: str
    size: int = 128
    prompts: int = 8192
    seconds: float = 620.0
    turns: int = 0
    looked: int = 128
    scored: int = 1000
    batch: int = 100
    teacher_steps: tuple[int, ...] = (28, 8, 4, 2, 1)
    options: dict[str, Any] = field(default_factory=dict)


FULL = OneStepRecipe(
    name="full",
    options={
        "batch": 256, "rank": 20, "lr": 2e-4, "assistant_lr": 5e-5, "c": 0.26, "ema_pictures": 50_000,
        "save_seconds": 60.0,
    },
)  # fmt: skip
TINY = OneStepRecipe(
    name="tiny", size=64, prompts=8, turns=2, looked=2, scored=4, batch=2, teacher_steps=(2, 1),
    options={"batch": 2, "rank": 4, "ema_pictures": 0},
)  # fmt: skip
RECIPES = {recipe.name: recipe for recipe in (FULL, TINY)}


def get(name: str) -> OneStepRecipe:
    """Return the recipe of that name."""
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return RECIPES[name]
