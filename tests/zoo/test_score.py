"""The measures of the score: closed forms, and a judge that knows the answer."""

import pytest
import torch
import torch.nn.functional as F

from scripts.zoo.emoji import data, score
from scripts.zoo.emoji.scenes import FILLED, Row, Scenes
from scripts.zoo.emoji.world import World

LABELS = ["square", "bar", "cross"]


@pytest.fixture(scope="module")
def world():
    """Three grey shapes in two styles."""
    icons = torch.zeros(6, 128, 128, 4, dtype=torch.uint8)
    icons[..., :3] = 128
    for style in range(2):
        icons[style * 3, 20:108, 20:108, 3] = 255
        icons[style * 3 + 1, 50:78, 10:118, 3] = 255
        icons[style * 3 + 2, 50:78, 10:118, 3] = icons[style * 3 + 2, 10:118, 50:78, 3] = 255
    return World(
        labels=LABELS,
        tags=[[], [], []],
        category=["shape"] * 3,
        group=["shape"] * 3,
        styles=("flat", "round"),
        icons=icons,
        icon_label=torch.arange(3).repeat(2),
        icon_style=torch.arange(2).repeat_interleave(3),
    )


def _scenes(world, rows):
    return Scenes(world, rows, seed=0, device="cpu")


def _pair(world, colours, stacked=False):
    places = ((64.0, 32.0, 56.0), (64.0, 96.0, 56.0)) if stacked else ((32.0, 64.0, 56.0), (96.0, 64.0, 56.0))
    return Row("colour_pair", (0, 1), colours, places, stacked)


class Oracle:
    """A judge whose features are the downsampled picture, and whose texts are the pictures they name."""

    def __init__(self, world):
        self.world = world

    def images(self, pictures):
        return F.avg_pool2d(pictures, 16).flatten(1) - 0.9

    def texts(self, texts):
        rows = []
        for text in texts:
            label, style = text.split(", ")
            rows.append(
                Row("single", (self.world.icon(LABELS.index(label), self.world.styles.index(style)),), (-1,), FILLED)
            )
        return F.normalize(self.images(_scenes(self.world, rows).images(torch.arange(len(rows)))), dim=1)


def test_a_judge_that_knows_scores_one_and_wrong_pictures_score_zero(world):
    scenes = _scenes(world, [Row("single", (i,), (-1,), FILLED) for i in range(6)])
    pictures = scenes.images(torch.arange(6))
    assert score.zero_shot(Oracle(world), world, scenes, pictures) == (1.0, 1.0)
    wrong = pictures[[1, 2, 0, 4, 5, 3]]
    top1, top5 = score.zero_shot(Oracle(world), world, scenes, wrong)
    assert top1 == 0 and top5 == 1  # there are three labels
    assert score.cosine(Oracle(world), scenes.plain, pictures) == pytest.approx(1)


def test_order_of_colours_in_pairs(world):
    rows = [_pair(world, (0, 4)), _pair(world, (4, 0)), _pair(world, (3, 0), stacked=True)]
    scenes = _scenes(world, rows)
    pictures = scenes.images(torch.arange(3))
    assert score.order_obeyed(scenes, pictures).tolist() == [True, True, True]
    assert score.order_obeyed(scenes, pictures[[1, 0, 2]]).tolist() == [False, False, True]
    assert score.order_obeyed(scenes, pictures.flip(2)).tolist() == [True, True, False]


def test_colours_and_counts(world):
    coloured = _scenes(world, [Row("colour", (2,), (colour,), FILLED) for colour in range(7)])
    assert score.colours_obeyed(coloured, coloured.images(torch.arange(7))).all()
    corners = ((32.0, 32.0, 50.0), (96.0, 32.0, 50.0), (32.0, 96.0, 50.0), (96.0, 96.0, 50.0))
    counts = _scenes(world, [Row("count", (0,) * n, (-1,) * n, corners[:n]) for n in (2, 3, 4)])
    pictures = counts.images(torch.arange(3))
    assert score.counts_obeyed(counts, pictures).all()
    assert not score.counts_obeyed(counts, pictures[[1, 2, 0]]).any()


def test_a_restricted_world_keeps_pictures_with_their_labels(world):
    part = data.restrict(world, ("cross", "square"))
    assert part.labels == ["square", "cross"] and len(part.icons) == 4
    for style in range(2):
        for i, label in enumerate(part.labels):
            icon = part.icon(i, style)
            assert part.icon_label[icon] == i and part.icon_style[icon] == style
            assert torch.equal(part.icons[icon], world.icons[world.icon(LABELS.index(label), style)])


def test_pictures_of_every_size_come_from_one_drawing(world):
    scenes = _scenes(world, [Row("single", (i,), (-1,), FILLED) for i in range(6)])
    images = data.pictures(scenes)
    index = torch.tensor([4, 0])
    assert torch.equal(images(index, 64), F.avg_pool2d(images(index, 128), 2))
