"""Sizes and schedules of fashion-unet: ``full`` for one GPU, ``tiny`` for trying the code."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from diffaccel.errors import unknown
from diffaccel.training.loop import TrainingPlan


@dataclass(frozen=True, kw_only=True)
class FashionRecipe:
    """One size of everything.

    Attributes:
        unet: arguments of diffusers' ``UNet2DModel``.
        classifier: training of the network whose features the Fréchet distance is of; its batch and width.
        teacher: training by flow matching; its batch.
        empty: share of pictures without their label.
        student_seconds: of a student, where ``--last`` does not end it with its call.
        student_turns: number of turns of a student; 0 for as many as fit into its seconds.
        options: of the student's method, beside its preset.
        grid: steps of the teacher on a trajectory that students learn.
        pictures: drawn by each model for its score.
        steps: of the teacher in the table; the first is its own number.
    """

    name: str
    unet: dict[str, Any]
    classifier: TrainingPlan
    classifier_batch: int = 512
    classifier_width: int = 32
    features: int = 128
    teacher: TrainingPlan
    batch: int = 512
    empty: float = 0.1
    student_seconds: float = 440.0
    student_turns: int = 0
    student_batch: int = 256
    options: dict[str, Any] = field(default_factory=dict)
    grid: int = 32
    pictures: int = 50_000
    drawn_at_once: int = 2500
    steps: tuple[int, ...] = (50, 4, 2, 1)


def _unet(channels: tuple[int, ...], layers: int, groups: int, head: int) -> dict[str, Any]:
    plain = len(channels) - 1
    return {
        "sample_size": 32, "in_channels": 1, "out_channels": 1, "block_out_channels": channels,
        "layers_per_block": layers, "norm_num_groups": groups, "attention_head_dim": head, "num_class_embeds": 11,
        "down_block_types": ("DownBlock2D",) * plain + ("AttnDownBlock2D",),
        "up_block_types": ("AttnUpBlock2D",) + ("UpBlock2D",) * plain,
        "resnet_time_scale_shift": "scale_shift",
    }  # fmt: skip


FULL = FashionRecipe(
    name="full",
    unet=_unet((32, 64, 64), layers=2, groups=16, head=16),
    classifier=TrainingPlan(lr=2e-3, samples=1_800_000, warmup=100, flat=0.2, ema=0.998, save_seconds=30.0),
    teacher=TrainingPlan(
        lr=1e-3, seconds=480, betas=(0.9, 0.99), weight_decay=0.0, warmup=300, flat=0.4, ema=0.9995, save_seconds=30.0
    ),
    # bfloat16 outputs have noise of 2^-9; below c, where differences are that small, the distance is a square
    options={"lr": 1e-4, "noise_ratio": 3.0, "c": 0.13, "ema_pictures": 50_000, "save_seconds": 30.0},
)
TINY = FashionRecipe(
    name="tiny",
    unet=_unet((8, 8), layers=1, groups=4, head=4),
    classifier=TrainingPlan(lr=1e-2, samples=64, warmup=2, flat=0.5, ema=0.9),
    classifier_batch=16,
    classifier_width=4,
    features=8,
    teacher=TrainingPlan(lr=1e-3, samples=32, warmup=2, flat=0.5, ema=0.9),
    batch=8,
    student_turns=3,
    student_batch=10,
    options={"lr": 1e-4, "noise_ratio": 3.0, "ema_pictures": 10},
    grid=8,
    pictures=40,
    drawn_at_once=20,
    steps=(2, 1),
)
RECIPES = {recipe.name: recipe for recipe in (FULL, TINY)}


def get(name: str) -> FashionRecipe:
    """Return the recipe of that name."""
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return RECIPES[name]
