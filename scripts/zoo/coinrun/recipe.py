"""Sizes and schedules: ``full`` for one GPU of 80 GB or more, ``cpu`` for two cores and some minutes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffaccel.distill.next_frame.options import WorldConsistency, WorldForcing
from diffaccel.errors import unknown
from diffaccel.training.loop import TrainingPlan
from scripts.zoo.coinrun.pool import PoolSize
from scripts.zoo.coinrun.simulator import ACTIONS, SIZE


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One size of everything.

    Attributes:
        model: options of the network.
        pool: frames to learn from; made anew from seeds in every job.
        forcing: training of the teacher.
        consistency: distillation of the student.
        dynamics: training of the network that reads actions, and its batch.
        forks: clips of the score, given frames and horizon.
        videos: long videos of the score, and their frames.
        shift: of the sampler's noise levels.
        context_noise: of the sampler.
    """

    name: str
    model: dict[str, Any]
    pool: PoolSize
    forcing: WorldForcing
    consistency: WorldConsistency
    dynamics: TrainingPlan
    dynamics_batch: int = 128
    dynamics_width: int = 32
    forks: int = 512
    given: int = 8
    horizon: int = 8
    videos: int = 16
    video_frames: int = 500
    steps: tuple[int, ...] = (16, 4, 2, 1)
    shift: float = 2.0
    context_noise: float = 0.03


_WORLD = {"in_channels": 3, "height": SIZE, "width": SIZE, "num_actions": len(ACTIONS), "prediction": "sample"}
_FULL = Recipe(
    name="full",
    model={
        **_WORLD, "patch_size": 8, "num_layers": 8, "num_attention_heads": 4, "attention_head_dim": 64, "window": 16,
        "modulation": "shared",
    },
    pool=PoolSize(chunks=80),
    forcing=WorldForcing(
        batch=96,
        plan=TrainingPlan(
            lr=1e-3, seconds=760, betas=(0.9, 0.98), weight_decay=0.02, warmup=300, flat=0.4, floor=0.01, ema=0.9995,
        ),
    ),
    consistency=WorldConsistency(
        batch=32,
        plan=TrainingPlan(
            lr=1e-4, seconds=200, betas=(0.9, 0.99), weight_decay=0.0, warmup=50, flat=0.5, floor=0.05, ema=0.998,
        ),
    ),
    dynamics=TrainingPlan(lr=1e-3, seconds=40, samples=400_000, warmup=100, flat=0.3, ema=0.998),
)  # fmt: skip
_CPU = Recipe(
    name="cpu",
    model={
        **_WORLD, "patch_size": 8, "num_layers": 4, "num_attention_heads": 4, "attention_head_dim": 32, "window": 8,
        "modulation": "shared",
    },
    pool=PoolSize(chunks=4, games=32, steps=256),
    forcing=WorldForcing(
        batch=8,
        frames=12,
        queries=4,
        plan=TrainingPlan(lr=2e-3, seconds=240, warmup=50, flat=0.4, ema=0.995),
    ),
    consistency=WorldConsistency(
        batch=4,
        frames=12,
        queries=4,
        plan=TrainingPlan(lr=1e-4, seconds=60, warmup=20, flat=0.5, floor=0.05, ema=0.98),
    ),
    dynamics=TrainingPlan(lr=1e-3, seconds=40, samples=40_000, warmup=20, flat=0.3, ema=0.98),
    dynamics_batch=32,
    dynamics_width=16,
    forks=64,
    videos=2,
    video_frames=120,
    steps=(4, 1),
)  # fmt: skip
RECIPES = {recipe.name: recipe for recipe in (_FULL, _CPU)}


def get(name: str) -> Recipe:
    """Return the recipe of a name."""
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return RECIPES[name]
