"""The emoji world in memory: labels, icons, and the combinations that training withholds.

>>> world = load("data/emoji")
>>> world.icons.shape, len(world.labels)    # (N, 128, 128, 4) uint8 straight alpha

Every split is decided by SHA-1 of the names in it, so that it never changes with order, count or version:

* style: one label in 16 is withheld in one of its three styles;
* colour: one (label, colour) in 10 is withheld;
* count: one (label, number) in 10 is withheld;
* pair: one unordered pair of labels in 20 is never drawn together.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from diffaccel.errors import DiffAccelError
from scripts.zoo.emoji import render
from scripts.zoo.emoji.fetch import FORMAT, WORLD, read_json
from scripts.zoo.emoji.sources import STYLES

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink")
HUES = (0.0, 28.0, 54.0, 125.0, 215.0, 278.0, 330.0)  # degrees
COUNTS = (2, 3, 4)

_COLOUR_WORDS = re.compile(rf"\b({'|'.join(COLOURS)}|black|white|brown|gr[ea]y|rainbow)\b")


def bucket(text: str, size: int) -> int:
    """Hash text to a number in [0, size)."""
    return int.from_bytes(hashlib.sha1(text.encode()).digest()[:8], "big") % size


def withheld_style(label: str) -> int | None:
    """Return the index of the style in which a label is withheld, or None (15 labels in 16)."""
    return bucket(f"style:{label}:which", len(STYLES)) if bucket(f"style:{label}", 16) == 0 else None


def withheld_colour(label: str, colour: str) -> bool:
    """Return whether training never shows a label in a colour."""
    return bucket(f"colour:{colour}:{label}", 10) == 0


def withheld_count(label: str, count: int) -> bool:
    """Return whether training never shows a label so many times."""
    return bucket(f"count:{count}:{label}", 10) == 0


def withheld_pair(one: str, other: str) -> bool:
    """Return whether training never shows two labels together."""
    first, second = sorted((one, other))
    return bucket(f"pair:{first}|{second}", 20) == 0


def names_a_colour(label: str) -> bool:
    """Return whether a label names a colour, as 'red apple': recoloured, its caption would contradict itself."""
    return bool(_COLOUR_WORDS.search(label))


@dataclass(frozen=True, kw_only=True)
class World:
    """Labels and their pictures; icon i shows ``labels[icon_label[i]]`` in ``styles[icon_style[i]]``."""

    labels: list[str]
    tags: list[list[str]]
    category: list[str]  # one of labels.CATEGORIES' values
    group: list[str]  # emojibase subgroups, finer: labels of one group are confused most easily
    styles: tuple[str, ...]
    icons: torch.Tensor  # (N, 128, 128, 4) uint8, straight alpha
    icon_label: torch.Tensor  # (N,) int64
    icon_style: torch.Tensor  # (N,) int64

    def icon(self, label: int, style: int) -> int:
        """Return the index of one label's icon in one style."""
        return style * len(self.labels) + label

    @cached_property
    def training(self) -> torch.Tensor:
        """(N,) bool: icons that training may show."""
        withheld = [withheld_style(label) for label in self.labels]
        return torch.tensor([withheld[i] != s for i, s in zip(self.icon_label, self.icon_style, strict=True)])

    @cached_property
    def styles_shown(self) -> dict[str, tuple[str, ...]]:
        """Styles in which training shows each label."""
        withheld = {label: withheld_style(label) for label in self.labels}
        return {
            label: tuple(style for number, style in enumerate(self.styles) if number != missing)
            for label, missing in withheld.items()
        }

    @cached_property
    def recolourable(self) -> torch.Tensor:
        """(L,) bool: labels that do not name a colour themselves."""
        return torch.tensor([not names_a_colour(label) for label in self.labels])

    @cached_property
    def colour_training(self) -> torch.Tensor:
        """(L, 7) bool: colours that training may give a label."""
        return torch.tensor(
            [
                [not names_a_colour(label) and not withheld_colour(label, colour) for colour in COLOURS]
                for label in self.labels
            ]
        )


def load(root: str | Path) -> World:
    """Load the world from ``world.json.xz`` and ``icons.zip`` of a folder."""
    root = Path(root)
    data = read_json(root / WORLD)
    if data.get("format") != FORMAT:
        raise DiffAccelError(
            f"'{root / WORLD}' has format {data.get('format')}, this code reads {FORMAT}; fetch again."
        )
    emoji = data["emoji"]
    icons = render.read(root, [f"{style}/{entry['key']}.webp" for style in STYLES for entry in emoji])
    count = len(emoji)
    return World(
        labels=[entry["label"] for entry in emoji],
        tags=[entry["tags"] for entry in emoji],
        category=[entry["category"] for entry in emoji],
        group=[entry["subgroup"] for entry in emoji],
        styles=STYLES,
        icons=torch.from_numpy(icons),
        icon_label=torch.arange(count).repeat(len(STYLES)),
        icon_style=torch.arange(len(STYLES)).repeat_interleave(count),
    )
