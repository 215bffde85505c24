"""Scenes and prompts for evaluation: each set holds one thing that training never showed (but for ``seen``).

>>> sets = build(world, seed=0, device="cpu")
>>> sets["colour"].plain[i]                    # the prompt
>>> sets["colour"].facts(i)                    # what a picture of it must show
>>> sets["colour"].images([i], 128)            # a real picture of it

Membership follows the SHA-1 rules of ``world``; the seed only places icons and picks among the members.
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
    """The evaluation sets, each with at most ``size`` scenes."""
    rng = {name: np.random.default_rng([seed, number]) for number, name in enumerate(SETS)}
    rows = {
        "seen": _seen(world),
        "style": _style(world),
        "colour": _colour(world),
        "count": _count(world, rng["count"], countable(world)),
        "pair": _pair(world, rng["pair"], size, coloured=False),
        "colour_pair": _pair(world, rng["colour_pair"], size, coloured=True),
    }
    sets = {name: Scenes(world, found[:size], seed=seed, device=device) for name, found in rows.items() if found}
    return sets | {"count": _measurable(sets["count"])}


def _measurable(counts: Scenes) -> Scenes:
    """Only scenes whose real picture passes the count check, so that a failure is the model's."""
    everything = torch.arange(len(counts), device=counts.device)
    seen = checks.count(counts.images(everything)).tolist()
    kept = [row for row, number in zip(counts.rows, seen, strict=True) if number == len(row.icons)]
    return Scenes(counts.world, kept, seed=counts.seed, device=counts.device)


def _by_hash(world: World, icons: list[int], salt: str) -> list[int]:
    """Icons in an order that depends on their names alone."""
    labels, styles = world.icon_label.tolist(), world.icon_style.tolist()
    return sorted(icons, key=lambda i: bucket(f"{salt}:{world.labels[labels[i]]}:{styles[i]}", 2**61))


def _single(icon: int) -> Row:
    return Row("single", (icon,), (-1,), FILLED)


def _seen(world: World) -> list[Row]:
    """Training icons, each label once."""
    rows, used = [], set()
    for icon in _by_hash(world, world.training.nonzero().flatten().tolist(), "seen"):
        label = int(world.icon_label[icon])
        if label not in used:
            used.add(label)
            rows.append(_single(icon))
    return rows


def _style(world: World) -> list[Row]:
    """Every label in the style that it was never shown in."""
    return [_single(icon) for icon in _by_hash(world, (~world.training).nonzero().flatten().tolist(), "style")]


def _colour(world: World) -> list[Row]:
    """(label, colour) that were never combined, in a style that the label was shown in."""
    found = []
    for label, name in enumerate(world.labels):
        styles = [s for s in range(len(world.styles)) if world.training[world.icon(label, s)]]
        for colour, word in enumerate(COLOURS):
            if world.recolourable[label] and withheld_colour(name, word):
                style = styles[bucket(f"colour set:{name}:{word}", len(styles))]
                row = Row("colour", (world.icon(label, style),), (colour,), FILLED)
                found.append((bucket(f"colour order:{name}:{word}", 2**61), row))
    return [row for _, row in sorted(found, key=lambda item: item[0])]


def _count(world: World, rng: np.random.Generator, ok: torch.Tensor) -> list[Row]:
    """(label, number) that were never combined, of icons that can be counted."""
    found = []
    for label, name in enumerate(world.labels):
        icons = [world.icon(label, s) for s in range(len(world.styles))]
        icons = [icon for icon in icons if world.training[icon] and ok[icon]]
        for number in COUNTS:
            if icons and withheld_count(name, number):
                order = bucket(f"count order:{name}:{number}", 2**61)
                found.append((order, icons[order % len(icons)], number))
    return [Row("count", (i,) * n, (-1,) * n, boxes("count", n, rng)) for _, i, n in sorted(found)]


def _pair(world: World, rng: np.random.Generator, size: int, *, coloured: bool) -> list[Row]:
    """Pairs of labels that were never drawn together; coloured ones in two colours that are far apart."""
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
