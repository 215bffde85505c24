"""Hue, count and order are read off drawings whose truth is known; icons land where scenes put them."""

import colorsys

import pytest
import torch

from diffaccel.errors import DiffAccelError
from scripts.zoo.emoji import checks
from scripts.zoo.emoji.draw import Placed, compose, pure_colours, recolour
from scripts.zoo.emoji.world import COLOURS, HUES


def canvas(*boxes, size=128):
    """White with filled boxes (left, top, right, bottom, rgb), given in 128ths: (1, 3, size, size) in [-1, 1]."""
    image = torch.ones(1, 3, 128, 128)
    for left, top, right, bottom, rgb in boxes:
        image[0, :, top:bottom, left:right] = torch.tensor(rgb)[:, None, None]
    return torch.nn.functional.avg_pool2d(image, 128 // size) * 2 - 1


def rgb(hue, s=0.9, v=0.8):
    return colorsys.hsv_to_rgb(hue / 360, s, v)


def placed(*boxes):
    icon, colour, x, y, size = (torch.tensor([list(column)]) for column in zip(*boxes, strict=True))
    pad = (0, 4 - len(boxes))
    return Placed(
        *(torch.nn.functional.pad(part, pad, value=-1) for part in (icon, colour)),
        *(torch.nn.functional.pad(part.float(), pad, value=128) for part in (x, y, size)),
    )


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("s", [0.45, 0.95])
def test_every_colour_word_is_recognised(size, s):
    for index, hue in enumerate(HUES):
        assert checks.colour(canvas((20, 30, 90, 100, rgb(hue, s)), size=size)).item() == index


def test_hue_ignores_white_grey_and_black():
    image = canvas((0, 0, 128, 60, (0.5, 0.5, 0.5)), (0, 60, 128, 100, (0.0, 0.0, 0.0)), (100, 100, 120, 120, rgb(215)))
    assert COLOURS[checks.colour(image).item()] == "blue"


def test_hue_of_pure_colours_is_that_of_hsv():
    assert (checks.hue(canvas((0, 0, 128, 128, (0.0, 1.0, 0.0)))) - 120).abs() < 1e-3
    assert (checks.hue(canvas((0, 0, 128, 128, (0.0, 0.0, 1.0)))) - 240).abs() < 1e-3


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("number", [0, 1, 2, 3, 4])
def test_parts_are_counted(number, size):
    places = [(8, 8), (72, 8), (8, 72), (72, 72)]
    boxes = [(x, y, x + 48, y + 48, rgb(90 * n)) for n, (x, y) in enumerate(places[:number])]
    assert checks.count(canvas(*boxes, size=size)).item() == number


def test_specks_do_not_count_and_rings_count_once():
    speck = (4, 4, 12, 12, (0.0, 0.0, 0.0))  # four cells
    ring = [(30, 30, 110, 110, (0.0, 0.0, 0.0)), (50, 50, 90, 90, (1.0, 1.0, 1.0))]
    assert checks.count(canvas(speck, *ring)).item() == 1


def test_corners_that_touch_are_apart():
    assert checks.count(canvas((0, 0, 64, 64, rgb(0)), (64, 64, 128, 128, rgb(0)))).item() == 2


def flood(mask):
    """Sizes of 4-connected parts of one (h, w) mask, cell by cell."""
    left, sizes = {tuple(cell) for cell in mask.nonzero().tolist()}, []
    while left:
        edge, size = [left.pop()], 0
        while edge:
            y, x = edge.pop()
            size += 1
            for cell in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                if cell in left:
                    left.remove(cell)
                    edge.append(cell)
        sizes.append(size)
    return sizes


def test_parts_agree_with_a_flood_fill():
    mask = torch.rand(8, 32, 32, generator=torch.Generator().manual_seed(0)) < 0.55
    for smallest in (1, 8):
        expected = [sum(size >= smallest for size in flood(one)) for one in mask]
        assert checks.parts(mask, smallest).tolist() == expected


def test_order_is_read_from_the_halves():
    side = canvas((8, 40, 56, 88, rgb(0)), (72, 40, 120, 88, rgb(215)))
    assert checks.colours_in_order(side).tolist() == [[COLOURS.index("red"), COLOURS.index("blue")]]
    above = side.transpose(2, 3)
    assert checks.colours_in_order(above, stacked=True).tolist() == [[COLOURS.index("red"), COLOURS.index("blue")]]


def test_wrong_shapes_are_refused():
    with pytest.raises(DiffAccelError, match="Pictures must be"):
        checks.count(torch.zeros(3, 128, 128))


def test_a_filled_scene_is_the_icon_itself(world):
    picture = compose(world.icons, placed((5, -1, 64, 64, 128)))
    rgba = world.icons[5].float().permute(2, 0, 1) / 255
    expected = rgba[:3] * rgba[3:] + 1 - rgba[3:]
    assert torch.allclose(picture[0], expected, atol=1e-5)


def test_icons_land_where_they_are_put(world):
    disc = world.labels.index("cat")
    for x, y, size in ((40.0, 70.0, 60.0), (70.0, 60.0, 110.0), (32.0, 96.0, 54.0)):
        dark = 1 - compose(world.icons, placed((disc, -1, x, y, size)))[0].amin(0)
        grid = torch.arange(128) + 0.5
        assert abs((dark.sum(0) * grid).sum() / dark.sum() - x) < 0.2
        assert abs((dark.sum(1) * grid).sum() / dark.sum() - y) < 0.2
        full = (1 - compose(world.icons, placed((disc, -1, 64, 64, 128)))[0].amin(0)).sum()
        assert abs(dark.sum() / full - (size / 128) ** 2) < 0.02


def test_recolouring_sets_the_hue_and_keeps_black_and_white():
    ramp = torch.rand(7, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    ramp[:, :, 0], ramp[:, :, 1] = 0.0, 1.0
    rgba = torch.cat([ramp, torch.ones(7, 1, 16, 16)], 1)
    turned = recolour(rgba, torch.arange(7))
    assert checks.colour(turned[:, :3] * 2 - 1).tolist() == list(range(7))
    assert turned[:, :3, 0].amax() == 0
    assert turned[:, :3, 1].amin() == 1  # saturated enough on average, so white need not take colour
    assert torch.equal(turned[:, 3:], rgba[:, 3:])
    for pixel, pure in zip(turned[:, :3, 5, 5], pure_colours(), strict=True):
        value = pixel.max()
        saturation = (value - pixel.min()) / value
        assert torch.allclose(pixel, value * (1 - saturation * (1 - pure)), atol=1e-5)


def test_grey_and_black_icons_take_colour_too():
    for level in (0.15, 0.5, 1.0):
        rgba = torch.full((7, 4, 16, 16), level)
        rgba[:, 3] = 1
        assert checks.colour(recolour(rgba, torch.arange(7))[:, :3] * 2 - 1).tolist() == list(range(7))


def test_minus_one_leaves_an_icon_alone():
    rgba = torch.rand(3, 4, 8, 8)
    turned = recolour(rgba, torch.tensor([-1, 2, -1]))
    assert torch.equal(turned[[0, 2]], rgba[[0, 2]])
    assert not torch.equal(turned[1], rgba[1])
    assert recolour(rgba, torch.tensor([-1, -1, -1])) is rgba
