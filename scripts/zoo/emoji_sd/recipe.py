"""Sizes and schedules of emoji-sd's UNet: ``full`` for a GPU, ``tiny`` for trying the code on two cores."""

from __future__ import annotations

from dataclasses import dataclass, field

from diffaccel.errors import unknown
from diffaccel.training.loop import TrainingPlan
from scripts.zoo.emoji import recipe as data_recipe
from scripts.zoo.emoji.recipe import SceneCounts


@dataclass(frozen=True, kw_only=True)
class UNetRecipe:
    """The UNet, what it learns from, and how.

    Attributes:
        channels: of each level, multiples of 64, as int8 products want them.
        head: channels of an attention head.
        groups: of group norms.
        batch: pictures in a step.
        empty: share of empty prompts, for classifier-free guidance.
        gamma: of the min-SNR weight of v-prediction, ``min(SNR, gamma) / (SNR + 1)`` (arXiv 2303.09556).
        shares: probability of each kind of scene.
        label_count: labels that it learns, the first of the world; None for all.
        scenes: number of scenes of each kind.
        guidance: of calls; with more of it a picture has the wrong number of things more often.
    """

    name: str
    channels: tuple[int, ...]
    head: int = 32
    groups: int = 32
    batch: int
    empty: float = 0.1
    gamma: float = 5.0
    shares: dict[str, float] = field(
        default_factory=lambda: {"single": 0.40, "colour": 0.14, "pair": 0.14, "colour_pair": 0.10, "count": 0.22}
    )
    label_count: int | None = None
    scenes: SceneCounts = data_recipe.FULL.scenes
    size: int = 128
    steps: int = 20
    guidance: float = 2.5
    compiled: bool = False
    plan: TrainingPlan


FULL = UNetRecipe(
    name="full",
    channels=(64, 128, 128),
    batch=1024,
    compiled=True,
    plan=TrainingPlan(lr=1e-3, seconds=1500, weight_decay=0.01, warmup=300, flat=0.4, ema=0.9995),
)
TINY = UNetRecipe(
    name="tiny",
    channels=(64, 64),
    batch=4,
    label_count=16,
    scenes=SceneCounts(variants=1, exact=1, colour=4, pair=4, colour_pair=4, count=4),
    size=64,
    steps=4,
    plan=TrainingPlan(lr=1e-3, samples=8, warmup=2, flat=0.5, ema=0.9),
)
RECIPES = {recipe.name: recipe for recipe in (FULL, TINY)}


def get(name: str) -> UNetRecipe:
    """Return the recipe of that name."""
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return RECIPES[name]
