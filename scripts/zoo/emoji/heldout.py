"""Scenes and prompts for evaluation: every set but ``seen`` holds one kind of combination that training withholds.

>>> sets = build(world, seed=0, device="cpu")
>>> sets["colour"].plain[i]                    # the prompt
>>> sets["colour"].facts(i)                    # what a picture of it must show
>>> sets["colour"].images([i], 128)            # a real picture of it

Membership follows the SHA-1 rules of ``world``; the seed only chooses among the members and places icons.
"""

from __future__ import annotations

import numpy as np
import torch

from scripts.zoo.emoji import checks
from scripts.zoo.emoji.scenes import FILLED, Row, Scenes, boxes, countable
from scripts.zoo.emoji.world import (
    COLOURS,
    COUNTS,
    World,
    bucket,
    withheld_colour,
    withheld_count,
    withheld_pair,
)

SETS = ("seen", "style", "colour", "count", "pair", "colour_pair")


def build(world: World, seed: int = 0, device: str | torch.device = "cpu", *, size: int = 128) -> dict[str, Scenes]:
    """Build the evaluation sets, each with at most ``size`` scenes."""
    rng = {name: np.random.default_rng([seed, number]) for number, name in enumerate(SETS)}
    rows = {
        "seen": _seen(world),
        "style": _style(world),
        "colour": _colour(world),
        "count": _count(world, rng["count"], countable(world)),
        "pair": _pair(world, rng["pair"], size, coloured=False),
        "colour_pair": _pair(world, rng["colour_pair"], size, coloured=True),
    }
    sets = {name: Scenes(world, scenes[:size], seed=seed, device=device) for name, scenes in rows.items() if scenes}
    return sets | {"count": _measurable(sets["count"])}


def _measurable(counts: Scenes) -> Scenes:
    """Keep the scenes whose real picture passes the count check, so that a failure is the model's."""
    index = torch.arange(len(counts), device=counts.device)
    measured = checks.count(counts.images(index)).tolist()
    rows = [row for row, number in zip(counts.rows, measured, strict=True) if number == len(row.icons)]
    return Scenes(counts.world, rows, seed=counts.seed, device=counts.device)


def _by_hash(world: World, icons: list[int], salt: str) -> list[int]:
    """Sort icons by a hash of their names, so that the order depends on nothing else."""
    labels, styles = world.icon_label.tolist(), world.icon_style.tolist()
    return sorted(icons, key=lambda i: bucket(f"{salt}:{world.labels[labels[i]]}:{styles[i]}", 2**61))


def _single(icon: int) -> Row:
    return Row("single", (icon,), (-1,), FILLED)


def _seen(world: World) -> list[Row]:
    """Choose training icons, each label once."""
    rows, used = [], set()
    for icon in _by_hash(world, world.training.nonzero().flatten().tolist(), "seen"):
        label = int(world.icon_label[icon])
        if label not in used:
            used.add(label)
            rows.append(_single(icon))
    return rows


def _style(world: World) -> list[Row]:
    """Choose every label in the style in which it is withheld."""
    return [_single(icon) for icon in _by_hash(world, (~world.training).nonzero().flatten().tolist(), "style")]


def _colour(world: World) -> list[Row]:
    """Choose the withheld (label, colour), in a style in which training shows the label."""
    rows = []
    for label, name in enumerate(world.labels):
        styles = [s for s in range(len(world.styles)) if world.training[world.icon(label, s)]]
        for colour, word in enumerate(COLOURS):
            if world.recolourable[label] and withheld_colour(name, word):
                style = styles[bucket(f"colour set:{name}:{word}", len(styles))]
                row = Row("colour", (world.icon(label, style),), (colour,), FILLED)
                rows.append((bucket(f"colour order:{name}:{word}", 2**61), row))
    return [row for _, row in sorted(rows, key=lambda item: item[0])]


def _count(world: World, rng: np.random.Generator, is_countable: torch.Tensor) -> list[Row]:
    """Choose the withheld (label, number), of icons that can be counted."""
    combinations = []
    for label, name in enumerate(world.labels):
        icons = [world.icon(label, s) for s in range(len(world.styles))]
        icons = [icon for icon in icons if world.training[icon] and is_countable[icon]]
        for number in COUNTS:
            if icons and withheld_count(name, number):
                order = bucket(f"count order:{name}:{number}", 2**61)
                combinations.append((order, icons[order % len(icons)], number))
    return [Row("count", (i,) * n, (-1,) * n, boxes("count", n, rng)) for _, i, n in sorted(combinations)]


def _pair(world: World, rng: np.random.Generator, size: int, *, coloured: bool) -> list[Row]:
    """Draw withheld pairs of labels; coloured ones get two colours that are far apart."""
    pool = world.training.nonzero().flatten().tolist()
    if coloured:
        pool = [i for i in pool if world.colour_training[world.icon_label[i]].all()]
    by_style = [[i for i in pool if world.icon_style[i] == s] for s in range(len(world.styles))]
    rows: list[Row] = []
    while len(rows) < size:
        icons = tuple(int(i) for i in rng.choice(by_style[len(rows) % len(by_style)], 2, replace=False))
        if not withheld_pair(*(world.labels[int(world.icon_label[i])] for i in icons)):
            continue
        stacked = len(rows) % 3 == 2
        # Red, yellow, green, blue and purple: no two neighbours that a pale picture could confuse.
        colours = tuple(int(c) for c in rng.choice([0, 2, 3, 4, 5], 2, replace=False)) if coloured else (-1, -1)
        kind = "colour_pair" if coloured else "pair"
        rows.append(Row(kind, icons, colours, boxes(kind, 2, rng, stacked=stacked), stacked))
    return rows
