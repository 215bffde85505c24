"""Train the compiled network for a few steps on random frames; fail, or crash, if that fails.

python -m scripts.zoo.coinrun.probe full
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace

import torch
from torch import Tensor

from diffaccel.distill.next_frame.train import train_forcing
from diffaccel.models.next_frame.transformer import NextFrameTransformer
from diffaccel.training.loop import TrainingPlan
from scripts.zoo.coinrun import recipe as recipes

_STEPS = 6


class RandomClips:
    """Clips without sense, of the right shapes."""

    def __init__(self, recipe: recipes.Recipe) -> None:
        self.recipe = recipe

    def draw(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return uint8 frames and actions."""
        model, device, frames = self.recipe.model, generator.device, self.recipe.forcing.frames
        shape = (count, frames, model["in_channels"], model["height"], model["width"])
        pictures = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator, device=device)
        return pictures, torch.randint(0, model["num_actions"], shape[:2], generator=generator, device=device)


def main(name: str, device: str) -> None:
    recipe = recipes.get(name)
    plan = TrainingPlan(lr=1e-4, samples=_STEPS * recipe.forcing.batch)
    with tempfile.TemporaryDirectory() as folder:
        run = train_forcing(
            NextFrameTransformer(**recipe.model).to(device), RandomClips(recipe), replace(recipe.forcing, plan=plan),
            folder, dtype=torch.bfloat16, compiled=True, tell=print,
        )  # fmt: skip
    if not all(bool(p.isfinite().all()) for p in run.parameters):
        raise FloatingPointError("weights that are not finite after compiled steps")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "cuda")
