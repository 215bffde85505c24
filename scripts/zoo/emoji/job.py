"""One call of a training machine: run the stages that are not finished, as far as the time goes.

    python -m scripts.zoo.emoji.job --recipe full --minutes 9 --data data/emoji --work /tmp/emoji --out OUT

Say the same again and it continues where it was killed or ran out of time; a finished stage is skipped. ``--resume``
starts an empty work folder from packed models (those of ``diffaccel/zoo``), when the machine that trained them and
its optimiser state are gone.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from diffaccel.errors import DiffAccelError, unknown
from scripts.zoo.emoji import recipe as data_recipe
from scripts.zoo.emoji import recipe_flow, scenes, vae, world
from scripts.zoo.training import Deadline


def pictures(made: scenes.Scenes) -> Callable[[Tensor, int], Tensor]:
    """Scenes by index and size, drawn once at 128 px: smaller ones are pooled, which is how a scene is drawn small."""
    made.keep(vae.SIZE)

    def images(index: Tensor, size: int) -> Tensor:
        x = made.images(index, vae.SIZE)
        return F.avg_pool2d(x, vae.SIZE // size) if size < vae.SIZE else x

    return images


def restrict(whole: world.World, labels: tuple[str, ...]) -> world.World:
    """The world with these labels only, for models too small to hold all of it."""
    if missing := set(labels) - set(whole.labels):
        raise DiffAccelError(f"The recipe names labels that the data lacks: {sorted(missing)}; fetch the data again.")
    chosen = [i for i, label in enumerate(whole.labels) if label in set(labels)]
    icons = torch.tensor([whole.icon(i, style) for style in range(len(whole.styles)) for i in chosen])
    return dataclasses.replace(
        whole,
        labels=[whole.labels[i] for i in chosen],
        tags=[whole.tags[i] for i in chosen],
        category=[whole.category[i] for i in chosen],
        group=[whole.group[i] for i in chosen],
        icons=whole.icons[icons],
        icon_label=torch.arange(len(chosen)).repeat(len(whole.styles)),
        icon_style=whole.icon_style[icons],
    )


class Job:
    """The state of one call: recipes, folders, deadline, and the data when a stage asks for it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.recipe = recipe_flow.get(options.recipe)
        self.data_recipe = data_recipe.get(options.recipe)
        self.data, self.work, self.out = options.data, options.work, options.out
        self.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.seed = options.seed
        self.deadline = Deadline(60 * options.minutes)
        self.work.mkdir(parents=True, exist_ok=True)

    @cached_property
    def world(self) -> world.World:
        return world.load(self.data)

    @cached_property
    def scenes(self) -> scenes.Scenes:
        return scenes.build(self.world, self.data_recipe, self.seed, self.device)

    @cached_property
    def images(self) -> Callable[[Tensor, int], Tensor]:
        return pictures(self.scenes)

    def vae(self) -> None:
        if vae.load(self.work, "cpu") is None:
            vae.train(
                self.images,
                len(self.scenes),
                self.work,
                self.recipe.vae,
                deadline=self.deadline,
                device=self.device,
                seed=self.seed,
            )


STAGES = ("vae",)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", required=True, help="full (a GPU) or cpu (two cores)")
    parser.add_argument("--stages", default=",".join(STAGES), help="which, in this order; default: all")
    parser.add_argument("--minutes", type=float, required=True, help="time this call may take")
    parser.add_argument("--data", type=Path, default=Path("data/emoji"), help="world.json.xz and icons.zip")
    parser.add_argument("--work", type=Path, required=True, help="checkpoints; kept from call to call")
    parser.add_argument("--out", type=Path, help="where results are written; default: the work folder")
    parser.add_argument("--device", help="default: cuda if there is one")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    stages = options.stages.split(",")
    for stage in stages:
        if stage not in STAGES:
            raise unknown("stage", stage, STAGES)
    job = Job(options)
    for stage in (s for s in STAGES if s in stages):
        getattr(job, stage)()


if __name__ == "__main__":
    main()
