"""Scenes for the training stages: a function from indices to pictures, over all or part of the world."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from diffaccel.errors import DiffAccelError
from scripts.zoo.emoji.draw import CANVAS
from scripts.zoo.emoji.scenes import Scenes
from scripts.zoo.emoji.world import World


def pictures(scenes: Scenes) -> Callable[[Tensor, int], Tensor]:
    """Draw all scenes once at 128 px, and return a function from indices and a size to pictures, pooled if smaller."""
    scenes.keep(CANVAS)

    def images(index: Tensor, size: int) -> Tensor:
        x = scenes.images(index, CANVAS)
        return F.avg_pool2d(x, CANVAS // size) if size < CANVAS else x

    return images


def restrict(whole: World, labels: tuple[str, ...]) -> World:
    """Restrict the world to these labels, for models too small to learn all of it."""
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
