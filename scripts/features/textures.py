"""Procedural pictures by family, with the numbers that made them; nothing is downloaded.

>>> pictures = sample(FAMILIES, count=64, generator=torch.Generator().manual_seed(0))
>>> pictures.images        # (64, 3, 128, 128) float32 in [0, 1]
>>> pictures.family        # (64,) index into FAMILIES
>>> pictures.factors       # (64, FACTORS) in [0, 1], NaN where a family has fewer

A picture depends on the generator's state, its device and the arguments alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from scripts.features import objects, patterns
from scripts.features.canvas import Draw, Family

FACTORS = 6


@dataclass(frozen=True)
class Pictures:
    """What :func:`sample` drew, families in turn."""

    images: Tensor  # (N, 3, S, S) float32 in [0, 1]
    family: Tensor  # (N,) int64
    factors: Tensor  # (N, FACTORS) float32


def sample(families: Mapping[str, Family], *, count: int, generator: torch.Generator, size: int = 128) -> Pictures:
    """``count`` pictures, as evenly spread over ``families`` as whole numbers allow."""
    images, family, factors = [], [], []
    for i, draw_one in enumerate(families.values()):
        n = (count + i) // len(families)
        if not n:
            continue
        picture, numbers = draw_one(Draw(n, size, generator))
        images.append(picture.clamp(0, 1))
        family.append(torch.full((n,), i, device=generator.device))
        unused = torch.full((n,), math.nan, device=generator.device)
        factors.append(torch.stack([*numbers, *[unused] * (FACTORS - len(numbers))], 1))
    return Pictures(torch.cat(images), torch.cat(family), torch.cat(factors))


def _collage(d: Draw) -> tuple[Tensor, list[Tensor]]:
    """Four pictures of other families, a quadrant each."""
    makers = (patterns.spectrum, patterns.gradient, objects.shapes, objects.strokes, patterns.checker, objects.blobs)
    first = torch.stack([make(Draw(d.n, d.size // 2, d.generator))[0] for make in makers], 1)
    order = d.uniform(0, 1, len(makers)).argsort(1)[:, :4]
    quarters = first.gather(1, order[:, :, None, None, None].expand(-1, -1, *first.shape[2:]))
    top, bottom = torch.cat([quarters[:, 0], quarters[:, 1]], 3), torch.cat([quarters[:, 2], quarters[:, 3]], 3)
    return torch.cat([top, bottom], 2), [order[:, i].float() / len(makers) for i in range(4)]


FAMILIES: dict[str, Family] = {
    "spectrum": patterns.spectrum,
    "gratings": patterns.gratings,
    "checker": patterns.checker,
    "bricks": patterns.bricks,
    "gradient": patterns.gradient,
    "cells": patterns.cells,
    "blobs": objects.blobs,
    "shapes": objects.shapes,
    "badge": objects.badge,
    "strokes": objects.strokes,
    "glyphs": objects.glyphs,
    "waves": patterns.waves,
    "dots": patterns.dots,
    "landscape": objects.landscape,
    "spheres": objects.spheres,
    "collage": _collage,
}
