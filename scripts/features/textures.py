"""Procedural pictures by family, with the parameters they were drawn from; nothing is downloaded.

>>> pictures = sample(FAMILIES, count=64, generator=torch.Generator().manual_seed(0))
>>> pictures.images        # (64, 3, 128, 128) float32 in [0, 1]
>>> pictures.family        # (64,) index into FAMILIES
>>> pictures.factors       # (64, FACTORS) in [0, 1], NaN where a family has fewer

A picture depends only on the generator's state, its device and the arguments.
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
    """Pictures of :func:`sample`, family by family."""

    images: Tensor  # (N, 3, S, S) float32 in [0, 1]
    family: Tensor  # (N,) int64
    factors: Tensor  # (N, FACTORS) float32


def sample(families: Mapping[str, Family], *, count: int, generator: torch.Generator, size: int = 128) -> Pictures:
    """Draw ``count`` pictures, spread over ``families`` as evenly as whole numbers allow."""
    images, family, factors = [], [], []
    for i, draw in enumerate(families.values()):
        n = (count + i) // len(families)
        if not n:
            continue
        picture, parameters = draw(Draw(n, size, generator))
        images.append(picture.clamp(0, 1))
        family.append(torch.full((n,), i, device=generator.device))
        unused = torch.full((n,), math.nan, device=generator.device)
        factors.append(torch.stack([*parameters, *[unused] * (FACTORS - len(parameters))], 1))
    return Pictures(torch.cat(images), torch.cat(family), torch.cat(factors))


def _collage(d: Draw) -> tuple[Tensor, list[Tensor]]:
    """Draw four pictures of other families, one per quadrant."""
    families = (patterns.spectrum, patterns.gradient, objects.shapes, objects.strokes, patterns.checker, objects.blobs)
    pictures = torch.stack([draw(Draw(d.n, d.size // 2, d.generator))[0] for draw in families], 1)
    order = d.uniform(0, 1, len(families)).argsort(1)[:, :4]
    quarters = pictures.gather(1, order[:, :, None, None, None].expand(-1, -1, *pictures.shape[2:]))
    top, bottom = torch.cat([quarters[:, 0], quarters[:, 1]], 3), torch.cat([quarters[:, 2], quarters[:, 3]], 3)
    return torch.cat([top, bottom], 2), [order[:, i].float() / len(families) for i in range(4)]


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
