"""A small emoji world, drawn here: tests of the zoo's data code download nothing."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from scripts.zoo.emoji.recipe import SceneCounts
from scripts.zoo.emoji.sources import STYLES
from scripts.zoo.emoji.world import World

LABELS = (
    "cat",
    "dog",
    "red apple",
    "bus",
    "glass of milk",
    "green book",
    "cherries",
    "key",
    "fish",
    "ox",
    "hat",
    "drum",
    "egg",
    "fox",
    "worm",
    "hippopotamus",
)


def icon(label: int, style: int) -> torch.Tensor:
    """A disc, a box, a ring or a bar, smaller in each style, in a colour of its own: (128, 128, 4) uint8."""
    y, x = torch.meshgrid(torch.arange(128.0), torch.arange(128.0), indexing="ij")
    x, y, reach = x - 63.5, y - 63.5, 58.0 - 6 * style
    far = {
        0: (x * x + y * y).sqrt() / reach,
        1: torch.maximum(x.abs(), y.abs()) / reach,
        2: ((x * x + y * y).sqrt() / reach - 0.75).abs() * 4,
        3: torch.maximum(x.abs() / reach, y.abs() * 2 / reach),
    }[label % 4]
    made = torch.zeros(128, 128, 4)
    made[..., :3] = torch.tensor([(60 + 37 * label) % 200, (20 + 91 * label) % 200, (150 + 53 * label) % 200])
    made[..., 3] = (far <= 1).float() * 255
    return made.to(torch.uint8)


@pytest.fixture(scope="session")
def world() -> World:
    count = len(LABELS)
    return World(
        labels=list(LABELS),
        tags=[[f"tag {word} {n}" for n in "abcd"] for word in LABELS],
        category=["object"] * count,
        group=["even" if n % 2 else "odd" for n in range(count)],
        styles=STYLES,
        icons=torch.stack([icon(label, style) for style in range(len(STYLES)) for label in range(count)]),
        icon_label=torch.arange(count).repeat(len(STYLES)),
        icon_style=torch.arange(len(STYLES)).repeat_interleave(count),
    )


@pytest.fixture(scope="session")
def counts() -> SceneCounts:
    return SceneCounts(variants=3, exact=1, colour=120, pair=120, colour_pair=120, count=120)
