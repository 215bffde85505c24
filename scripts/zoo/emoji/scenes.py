"""Tables of scenes: icons and their places, captions, ground truth, and pictures drawn on demand.

>>> scenes = build(load("data/emoji"), recipe.get("cpu"), seed=0, device="cpu")
>>> scenes.images(index, 64)          # (B, 3, 64, 64) in [-1, 1]
>>> scenes.captions[0][i], scenes.facts(i), scenes.kind[i]

A scene has up to four icons of one style on a white canvas of 128 pixels. The kinds are ``single``, ``colour``
(one, recoloured), ``pair``, ``colour_pair`` and ``count`` (two to four of one thing).
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F

from diffaccel.errors import DiffAccelError, unknown
from scripts.zoo.emoji import captions as words
from scripts.zoo.emoji import checks
from scripts.zoo.emoji.captions import Facts
from scripts.zoo.emoji.draw import CANVAS, SLOTS, Placed, compose
from scripts.zoo.emoji.recipe import Recipe
from scripts.zoo.emoji.world import COLOURS, COUNTS, World, withheld_count, withheld_pair

KINDS = ("single", "colour", "pair", "colour_pair", "count")
PAIRS = ("pair", "colour_pair")
_CHUNK = {"cpu": 64, "cuda": 2048}  # scenes composed at a time: so many fit a CPU's cache, or fill a GPU


@dataclass(frozen=True)
class Row:
    """One scene: icons, colours and boxes by slot."""

    kind: str
    icons: tuple[int, ...]
    colours: tuple[int, ...]  # -1 for the icon's own
    boxes: tuple[tuple[float, float, float], ...]  # (x, y, size)
    stacked: bool = False  # of a pair: one above the other


class Scenes:
    """A fixed list of scenes over one world, on one device."""

    def __init__(self, world: World, rows: list[Row], *, seed: int, device: str | torch.device) -> None:
        self.world, self.seed, self.device = world, seed, torch.device(device)
        self.rows = rows
        self.kind = torch.tensor([KINDS.index(row.kind) for row in rows], device=self.device)
        self.placed = self._table().to(self.device)
        self._icons = world.icons.to(self.device)
        self._drawn: dict[int, torch.Tensor] = {}  # size: 8-bit pictures
        self.chunk = _CHUNK.get(self.device.type, 256)

    def __len__(self) -> int:
        return len(self.rows)

    def _table(self) -> Placed:
        """Return the rows as tensors."""
        icon = torch.full((len(self.rows), SLOTS), -1)
        colour = torch.full((len(self.rows), SLOTS), -1)
        box = torch.zeros(len(self.rows), SLOTS, 3)
        box[..., 2] = CANVAS
        for i, row in enumerate(self.rows):
            used = len(row.icons)
            icon[i, :used], colour[i, :used] = torch.tensor(row.icons), torch.tensor(row.colours)
            box[i, :used] = torch.tensor(row.boxes)
        return Placed(icon, colour, *box.unbind(-1))

    def facts(self, i: int) -> Facts:
        """Return the ground truth of a scene: labels, colours (indices or None), style, count, arrangement."""
        row, world = self.rows[i], self.world
        slots = slice(0, 1) if row.kind == "count" else slice(None)
        return Facts(
            labels=tuple(world.labels[int(world.icon_label[icon])] for icon in row.icons[slots]),
            colours=tuple(None if colour < 0 else colour for colour in row.colours[slots]),
            style=world.styles[int(world.icon_style[row.icons[0]])],
            count=len(row.icons) if row.kind == "count" else 1,
            stacked=row.stacked,
        )

    @cached_property
    def _tags(self) -> tuple[list[list[str]], list[list[str]]]:
        return tuple([words.tags_of_parity(tags, parity) for tags in self.world.tags] for parity in (0, 1))

    @cached_property
    def captions(self) -> tuple[list[str], list[str]]:
        """Two captions per scene: [0] with tags of even hash, [1] of odd, so that the two share no tag."""
        return self._captions(0), self._captions(1)

    def _seed(self, k: int, i: int) -> str:
        return f"{self.seed}:{k}:{i}"

    def related(self, k: int) -> list[bool]:
        """Return whether caption k of each scene tells the order of a pair."""
        return [
            row.kind in PAIRS and random.Random(f"{self._seed(k, i)}:related").random() < words.RELATED
            for i, row in enumerate(self.rows)
        ]

    def _tags_of(self, k: int, row: Row) -> list[str]:
        return self._tags[k][int(self.world.icon_label[row.icons[0]])] if row.kind == "single" else []

    def _captions(self, k: int) -> list[str]:
        return [
            words.caption(
                self.facts(i), random.Random(self._seed(k, i)), tags=self._tags_of(k, self.rows[i]), related=related
            )
            for i, related in enumerate(self.related(k))
        ]

    @cached_property
    def plain(self) -> list[str]:
        """One caption per scene in the template "{x}, {style}", pairs with their relation, for evaluation."""
        rng = random.Random(f"{self.seed}:plain")
        return [words.caption(self.facts(i), rng, related=True, plain=True) for i in range(len(self))]

    def contradictions(self, k: int) -> list[str]:
        """Return caption k of each scene with one fact changed (captions.contradiction).

        A label is never named with the style in which training withholds it: it would be false in every picture.
        """
        members: dict[str, list[str]] = {}
        for label, group in zip(self.world.labels, self.world.group, strict=True):
            members.setdefault(group, []).append(label)
        group_of = dict(zip(self.world.labels, self.world.group, strict=True))
        shown = self.world.styles_shown
        texts = []
        for i, related in enumerate(self.related(k)):
            facts = self.facts(i)
            styles = [style for style in self.world.styles if all(style in shown[label] for label in facts.labels)]
            texts.append(
                words.contradiction(
                    facts,
                    self._seed(k, i),
                    random.Random(f"{self._seed(k, i)}:false"),
                    others=[
                        label
                        for label in members[group_of[facts.labels[0]]]
                        if label not in facts.labels and facts.style in shown[label]
                    ],
                    styles=styles if len(styles) > 1 else self.world.styles,
                    tags=self._tags_of(k, self.rows[i]),
                    related=related,
                )
            )
        return texts

    def images(self, index: torch.Tensor, size: int = CANVAS) -> torch.Tensor:
        """Draw scenes ``index`` (B,), (B, 3, size, size) in [-1, 1]; ``size`` is 128 or a divisor of it."""
        index = torch.as_tensor(index, device=self.device)
        if size in self._drawn:
            return self._drawn[size][index].float() / 127.5 - 1
        if CANVAS % size:
            raise DiffAccelError(f"size is {size}; scenes are drawn at {CANVAS} pixels or a divisor of that.")
        parts = []
        for chunk in index.split(self.chunk):
            if CANVAS in self._drawn:
                picture = self._drawn[CANVAS][chunk].float() / 255
            else:
                picture = compose(self._icons, self.placed[chunk])
            parts.append(F.avg_pool2d(picture, CANVAS // size) if size < CANVAS else picture)
        return torch.cat(parts) * 2 - 1

    def keep(self, size: int) -> Scenes:
        """Draw every scene once and keep 8-bit pictures, which ``images`` then looks up (or pools, if kept at 128)."""
        if size not in self._drawn and CANVAS not in self._drawn:
            pictures = torch.empty(len(self), 3, size, size, dtype=torch.uint8, device=self.device)
            for chunk in torch.arange(len(self), device=self.device).split(self.chunk):
                pictures[chunk] = ((self.images(chunk, size) + 1) * 127.5).round().to(torch.uint8)
            self._drawn[size] = pictures
        return self

    def sampler(self, shares: Mapping[str, float]) -> torch.Tensor:
        """Return weights (n,) for ``torch.multinomial``, under which each kind of scene has its share."""
        weights = torch.zeros(len(self), device=self.device)
        for kind, share in shares.items():
            if kind not in KINDS:
                raise unknown("kind of scene", kind, KINDS)
            members = self.kind == KINDS.index(kind)
            weights[members] = share / members.sum().clamp_min(1)
        return weights


def boxes(kind: str, number: int, rng: np.random.Generator, *, stacked: bool = False) -> tuple:
    """Draw the places (x, y, size) of a scene's icons, always apart, so that connected parts can be counted."""
    if number == 1:
        size = CANVAS * rng.uniform(0.82, 1.0)
        slack = (CANVAS - size) / 2
        x, y = CANVAS / 2 + rng.uniform(-slack, slack, 2)
        return ((float(x), float(y), float(size)),)
    low, high = CANVAS / 4, 3 * CANVAS / 4
    middle = CANVAS / 2
    if number == 2:
        centres = [(middle, low), (middle, high)] if stacked else [(low, middle), (high, middle)]
    elif number == 3:
        centres = [(middle, low), (low, high), (high, high)]
    else:
        centres = [(low, low), (high, low), (low, high), (high, high)]
    size = rng.uniform(50, 58) if kind == "count" else rng.uniform(54, 61)
    return tuple((x + rng.uniform(-1.5, 1.5), y + rng.uniform(-1.5, 1.5), float(size)) for x, y in centres)


FILLED = ((CANVAS / 2, CANVAS / 2, float(CANVAS)),)  # the icon fills the canvas: its pixels are the icon's own


def countable(world: World) -> torch.Tensor:
    """Return which icons are one connected part when small, and have a label with a plural: (N,) bool.

    Only integers are summed, so that every machine makes the same scenes.
    """
    counts = []
    for icons in world.icons.split(256):
        alpha, darkness = icons[..., 3].float(), 255 - icons[..., :3].amin(-1).float()
        cells = F.avg_pool2d((alpha * darkness)[:, None], 8, divisor_override=1)[:, 0]  # 16 x 16 sums below 2^24
        counts.append(checks.parts(cells > 64 * 6502, 4))
    plural = torch.tensor([words.can_be_counted(label) for label in world.labels])
    return (torch.cat(counts) == 1) & plural[world.icon_label]


class _TrainingRows:
    """Draws scenes that training may show."""

    def __init__(self, world: World, seed: int) -> None:
        self.world, self.rng = world, np.random.default_rng(seed)
        self.icons = world.training.nonzero().flatten().tolist()
        self.label_of = world.icon_label.tolist()
        self.style_of = world.icon_style.tolist()
        self.by_style = [[i for i in self.icons if self.style_of[i] == s] for s in range(len(world.styles))]
        allowed = world.colour_training.tolist()
        self.colours_of = [[c for c in range(len(COLOURS)) if row[c]] for row in allowed]
        self.recolourable = [i for i in self.icons if self.colours_of[self.label_of[i]]]
        is_countable = countable(world).tolist()
        self.countable = [i for i in self.icons if is_countable[i]]

    def pick(self, pool: list[int]) -> int:
        """Draw one element of a list."""
        return pool[self.rng.integers(len(pool))]

    def colour(self, icon: int, chance: float = 1.0) -> int:
        """Draw a colour that an icon may have; -1, its own, with probability ``1 - chance`` or where there is none."""
        pool = self.colours_of[self.label_of[icon]]
        return self.pick(pool) if pool and self.rng.random() < chance else -1

    def colour_scene(self) -> Row:
        """Draw one recoloured icon."""
        icon = self.pick(self.recolourable)
        places = FILLED if self.rng.random() < 0.3 else boxes("colour", 1, self.rng)
        return Row("colour", (icon,), (self.colour(icon),), places)

    def pair(self, kind: str, chance: float) -> Row:
        """Draw two icons of one style, each recoloured with probability ``chance``."""
        pool = self.by_style[self.rng.integers(len(self.by_style))]
        while True:
            icons = (self.pick(pool), self.pick(pool))
            one, other = (self.world.labels[self.label_of[icon]] for icon in icons)
            if one != other and not withheld_pair(one, other):
                break
        stacked = bool(self.rng.random() < 0.35)
        colours = tuple(self.colour(icon, chance) for icon in icons)
        return Row(kind, icons, colours, boxes(kind, 2, self.rng, stacked=stacked), stacked)

    def count(self) -> Row:
        """Draw one icon two to four times."""
        while True:
            icon, number = self.pick(self.countable), COUNTS[self.rng.integers(len(COUNTS))]
            if not withheld_count(self.world.labels[self.label_of[icon]], number):
                break
        colour = self.colour(icon, 0.3)
        return Row("count", (icon,) * number, (colour,) * number, boxes("count", number, self.rng))


def build(world: World, recipe: Recipe, seed: int, device: str | torch.device) -> Scenes:
    """Build the training scenes of a recipe, without any withheld combination."""
    draw, counts = _TrainingRows(world, seed), recipe.scenes
    rows = []
    for icon in draw.icons:
        rows += [Row("single", (icon,), (-1,), FILLED)] * counts.exact
        for _ in range(counts.variants - counts.exact):
            rows.append(Row("single", (icon,), (-1,), boxes("single", 1, draw.rng)))
    rows += [draw.colour_scene() for _ in range(counts.colour)]
    rows += [draw.pair("pair", 0.0) for _ in range(counts.pair)]
    rows += [draw.pair("colour_pair", 0.8) for _ in range(counts.colour_pair)]
    rows += [draw.count() for _ in range(counts.count)]
    return Scenes(world, rows, seed=seed, device=device)
