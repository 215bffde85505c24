"""Sizes and schedules of the rivals: ``full`` for one GPU, ``tiny`` for trying the code."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from diffaccel.errors import unknown
from diffaccel.training.loop import TrainingPlan


@dataclass(frozen=True, kw_only=True)
class RivalRecipe:
    """One size of everything; the network, its batch of pictures and the judge are those of fashion-unet's recipe.

    Attributes:
        plans: of the methods that learn by seconds; the learning rate and the seconds are filled in.
        rates: learning rates that each method tries, inside its own seconds.
        trial: share of the seconds that one of these tries gets.
        looked: pictures by which tries are compared.
        jvp_rows: of MeanFlow's batch, the share whose two times differ.
        a_class: of Drifting's batch, drawings of one class, and as many real pictures.
        grid: noise levels of LCM's trajectories.
        options: of DMD2 beside the preset "dmd".
        turns: of DMD2; 0 for as many as fit into its seconds.
    """

    plans: dict[str, TrainingPlan]
    rates: dict[str, tuple[float, ...]]
    trial: float = 0.08
    looked: int = 5000
    batch: int = 512
    jvp_rows: float = 0.25
    a_class: int = 64
    grid: int = 50
    options: dict[str, Any] = field(default_factory=dict)
    turns: int = 0


_PLAN = TrainingPlan(lr=1.0, seconds=1.0, betas=(0.9, 0.99), weight_decay=0.0, warmup=300, flat=0.4, save_seconds=30.0)
FULL = RivalRecipe(
    plans={"meanflow": _PLAN, "drifting": _PLAN, "lcm": _PLAN},
    rates={
        "meanflow": (3e-4, 1e-3, 2e-3),
        "drifting": (3e-4, 1e-3, 2e-3),
        "lcm": (1e-4, 3e-4, 1e-3),
        "dmd2": (5e-5, 1e-4, 2e-4),
    },
    options={"noise_ratio": 3.0, "save_seconds": 30.0},
)
_TINY_PLAN = TrainingPlan(lr=1.0, samples=32, warmup=2, flat=0.5, ema=0.9)
TINY = RivalRecipe(
    plans={"meanflow": _TINY_PLAN, "drifting": _TINY_PLAN, "lcm": _TINY_PLAN},
    rates={name: (1e-3, 2e-3) for name in ("meanflow", "drifting", "lcm", "dmd2")},
    looked=20,
    batch=8,
    a_class=4,
    grid=4,
    options={"noise_ratio": 3.0, "assistant_steps": 1},
    turns=1,
)
RECIPES = {"full": FULL, "tiny": TINY}


def get(name: str) -> RivalRecipe:
    """Return the recipe of that name."""
    if name not in RECIPES:
        raise unknown("recipe", name, RECIPES)
    return RECIPES[name]
