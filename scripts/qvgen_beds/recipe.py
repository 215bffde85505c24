"""Sizes of the comparison: ``full`` for a GPU, ``cpu`` for two cores and an hour, ``tiny`` to try the code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffaccel.errors import unknown
from diffaccel.training.loop import TrainingPlan
from scripts.zoo.coinrun.pool import PoolSize


@dataclass(frozen=True, kw_only=True)
class Size:
    """One size of everything.

    Attributes:
        pool, held_pool: frames to learn from, and of levels that training never sees.
        clips, held: number of clips that are learnt from, and that are measured.
        context, queries: frames of a world model's clip that are looked back at, and that are noise.
        forks: games in which drawn videos are measured.
        frames: of a Wan-architecture model's clip.
        wan: options of that network.
        plan, plan_batch: of the training of that network in full precision.
        batch, steps: of quantization-aware training.
        rank: of the side branch.
        curve: number of times in a run that the distance to the full-precision network is measured.
    """

    name: str
    pool: PoolSize
    held_pool: PoolSize
    clips: int
    held: int
    context: int
    queries: int
    forks: int
    frames: int
    wan: dict[str, Any]
    plan: TrainingPlan
    plan_batch: int
    batch: int
    steps: int
    rank: int = 32
    curve: int = 10


FULL = Size(
    name="full", pool=PoolSize(chunks=8), held_pool=PoolSize(chunks=1, steps=256), clips=16_384, held=256,
    context=16, queries=8, forks=512, frames=8,
    wan={"num_attention_heads": 6, "attention_head_dim": 64, "num_layers": 6, "ffn_dim": 1536},
    plan=TrainingPlan(lr=6e-4, seconds=400, betas=(0.9, 0.98), weight_decay=0.02, warmup=300, flat=0.4, ema=0.9995),
    plan_batch=48, batch=16, steps=1000,
)  # fmt: skip
CPU = Size(
    name="cpu", pool=PoolSize(chunks=1, games=16, steps=256), held_pool=PoolSize(chunks=1, games=8, steps=128),
    clips=1024, held=16, context=8, queries=4, forks=16, frames=4,
    wan={"num_attention_heads": 4, "attention_head_dim": 24, "num_layers": 3, "ffn_dim": 288},
    plan=TrainingPlan(lr=2e-3, seconds=240, warmup=50, flat=0.4, ema=0.995), plan_batch=8, batch=4, steps=120, rank=16,
)  # fmt: skip
TINY = Size(
    name="tiny", pool=PoolSize(chunks=1, games=2, steps=96), held_pool=PoolSize(chunks=1, games=2, steps=96),
    clips=4, held=4, context=2, queries=1, forks=4, frames=2,
    wan={"num_attention_heads": 1, "attention_head_dim": 16, "num_layers": 1, "ffn_dim": 32},
    plan=TrainingPlan(lr=1e-3, samples=4, warmup=1, ema=0.5), plan_batch=2, batch=2, steps=4, rank=2, curve=2,
)  # fmt: skip
SIZES = {size.name: size for size in (FULL, CPU, TINY)}


def get(name: str) -> Size:
    """Return the sizes of a name."""
    if name not in SIZES:
        raise unknown("recipe", name, SIZES)
    return SIZES[name]
