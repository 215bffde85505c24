"""Families of pictures with objects: shapes, signs, strokes, hills and balls on a ground."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from scripts.features.canvas import Draw, flat, noise, over, palette, ramp, soft
from scripts.features.outlines import OUTLINES, outline


def blobs(d: Draw) -> tuple[Tensor, list[Tensor]]:
    """Draw metaballs: a level set of summed Gaussian bumps, shaded."""
    field = torch.zeros(d.n, d.size, d.size, device=d.device)
    count, radius = d.uniform(2, 12), d.uniform(0.08, 0.3)
    u, v = d.grid
    for i in range(12):
        x, y = d.uniform(-0.9, 0.9)[:, None, None], d.uniform(-0.9, 0.9)[:, None, None]
        r = (radius * d.uniform(0.7, 1.4))[:, None, None]
        field += (i < count)[:, None, None] * torch.exp(-((u - x) ** 2 + (v - y) ** 2) / (2 * r * r))
    colours = palette(d, 4)
    inside = soft((field - 0.55) * 16)
    return over(flat(colours[:, 0], d), ramp((field - 0.5) / 1.5, colours[:, 1:]), inside), [count / 12, radius * 3]


def shapes(d: Draw) -> tuple[Tensor, list[Tensor]]:
    """Draw one to eight outlined or filled shapes of one or more kinds, on white, flat or textured ground."""
    count, size = d.uniform(1, 9), d.uniform(0.12, 0.34)
    kind, mixed = d.integer(OUTLINES), d.chance(0.5)
    colours = palette(d, 4)
    ground = flat(torch.where(d.chance(0.4)[:, None] > 0, 1.0, colours[:, 0]), d)
    rough = d.chance(0.3)[:, None, None, None] * d.uniform(0.02, 0.2)[:, None, None, None]
    picture = ground + rough * noise(d, d.uniform(0.5, 3))[:, None]
    for i in range(8):
        x, y, r = d.uniform(-0.8, 0.8), d.uniform(-0.8, 0.8), size * d.uniform(0.7, 1.3)
        kinds = torch.where(mixed > 0, d.integer(OUTLINES), kind)
        distance = outline(d, kinds, x, y, r, d.uniform(0, 6.3))
        mask = soft(distance * d.size / 2) * (i < count.floor())[:, None, None]
        colour = colours.gather(1, (1 + d.integer(3))[:, None, None].expand(-1, 1, 3))[:, 0]
        picture = over(picture, flat(colour, d), mask)
    return picture, [count / 9, size * 3, mixed, kind / OUTLINES]


def badge(d: Draw) -> tuple[Tensor, list[Tensor]]:
    """Draw one large object on a plain ground: a body, inner parts in mirror symmetry, rim and gloss."""
    kind, parts, size = d.integer(OUTLINES), d.uniform(1, 6), d.uniform(0.6, 0.95)
    colours = palette(d, 6)
    picture = flat(torch.where(d.chance(0.7)[:, None] > 0, 1.0, colours[:, 5]), d)
    zero = torch.zeros(d.n, device=d.device)
    body = outline(d, kind, zero, zero, size, d.chance(0.3) * d.uniform(0, 6.3))
    _, v = d.grid
    shaded = ramp(0.5 + v / 2, colours[:, :2])
    picture = over(picture, flat(colours[:, 1], d), soft(body * d.size / 2))
    rim = d.uniform(0, 0.12)[:, None, None]
    inner = soft((body - rim) * d.size / 2)
    picture = over(picture, shaded, inner)
    for i in range(5):
        x, y, r, turn = d.uniform(0, 0.5) * size, d.uniform(-0.55, 0.55) * size, d.uniform(0.06, 0.3), d.uniform(0, 6.3)
        part = d.integer(OUTLINES)
        both = torch.maximum(outline(d, part, x, y, r, turn), outline(d, part, -x, y, r, -turn))
        mask = soft(both * d.size / 2) * inner * (i < parts.floor())[:, None, None]
        picture = over(picture, flat(colours[:, 2 + i % 3], d), mask)
    gloss = outline(d, zero.long(), -0.3 * size, -0.35 * size, 0.35 * size, zero)
    bright = d.chance(0.5) * d.uniform(0.2, 0.7)
    picture = over(picture, torch.ones_like(picture), soft(gloss * 8) * inner * bright[:, None, None])
    return picture, [kind / OUTLINES, parts / 6, size, bright]


def strokes(d: Draw) -> tuple[Tensor, list[Tensor]]:
    """Draw quadratic curves of a pen."""
    count, width, reach = d.uniform(1, 9), d.uniform(0.012, 0.08), d.uniform(0.3, 1.0)
    colours = palette(d, 4)
    picture = flat(torch.where(d.chance(0.4)[:, None] > 0, 1.0, colours[:, 0]), d)
    u, v = d.grid
    t = torch.linspace(0, 1, 14, device=d.device)[:, None]
    for i in range(8):
        a = d.uniform(-0.9, 0.9, 1, 2)
        b, c = a + reach[:, None, None] * d.normal(1, 2), a + reach[:, None, None] * d.normal(1, 2)
        path = (1 - t) ** 2 * a + 2 * t * (1 - t) * b + t * t * c  # (N, 14, 2)
        distance = _to_segments(u, v, path)
        mask = soft((width[:, None, None] - distance) * d.size / 2) * (i < count.floor())[:, None, None]
        picture = over(picture, flat(colours[:, 1 + i % 3], d), mask)
    return picture, [count / 9, width * 12, reach]


def _to_segments(u: Tensor, v: Tensor, path: Tensor) -> Tensor:
    """Compute the distance of every pixel to a polyline (N, P, 2): (N, S, S)."""
    best = torch.full_like(u, 9.0)
    for j in range(path.shape[1] - 1):
        (ax, ay), (bx, by) = path[:, j].unbind(1), path[:, j + 1].unbind(1)
        ax, ay, bx, by = (p[:, None, None] for p in (ax, ay, bx, by))
        ex, ey = bx - ax, by - ay
        h = (((u - ax) * ex + (v - ay) * ey) / (ex * ex + ey * ey + 1e-9)).clamp(0, 1)
        best = torch.minimum(best, (u - ax - h * ex) ** 2 + (v - ay - h * ey) ** 2)
    return best.sqrt()


def glyphs(d: Draw) -> tuple[Tensor, list[Tensor]]:
    """Draw lines of letter-like signs: strokes on a three by three lattice, with a small alphabet per picture."""
    cell, letters = 24, 6
    weight, alphabet = _alphabet(d, letters, cell)
    rows = 6
    text = d.integer(letters, rows * rows)
    shown = d.uniform(0, 1, rows * rows) < d.uniform(0.5, 1.0)[:, None]
    page = alphabet.gather(1, text[:, :, None, None].expand(-1, -1, cell, cell)) * shown[:, :, None, None]
    page = page.view(d.n, rows, rows, cell, cell).permute(0, 1, 3, 2, 4).reshape(d.n, 1, rows * cell, rows * cell)
    zoom, angle = d.log_uniform(0.3, 1.2), d.chance(0.5) * d.uniform(-0.5, 0.5)
    x, y = d.turned(angle, shift=0.0)
    grid = torch.stack([x, y], -1) * zoom[:, None, None, None]
    mask = F.grid_sample(page, grid, padding_mode="reflection", align_corners=False)[:, 0]
    colours = palette(d, 2)
    ground = torch.where(d.chance(0.5)[:, None] > 0, 1.0, colours[:, 0])
    return over(flat(ground, d), flat(colours[:, 1] * 0.7, d), mask), [zoom / 1.2, angle + 0.5, weight * 4]


def _alphabet(d: Draw, letters: int, cell: int) -> tuple[Tensor, Tensor]:
    """Draw the stroke weight (N,) and an alphabet of masks (N, letters, cell, cell)."""
    ink = d.uniform(0, 1, letters, 12) < 0.45  # which of the lattice's twelve short strokes a letter has
    points = torch.linspace(-0.6, 0.6, 3, device=d.device)
    ends = [((i, j), (i + 1, j)) for i in range(2) for j in range(3)]
    ends += [((i, j), (i, j + 1)) for i in range(3) for j in range(2)]
    axis = torch.linspace(-1, 1, cell, device=d.device)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    strokes = []
    for (i, j), (k, m) in ends:
        ax, ay, bx, by = points[i], points[j], points[k], points[m]
        h = (((x - ax) * (bx - ax) + (y - ay) * (by - ay)) / ((bx - ax) ** 2 + (by - ay) ** 2)).clamp(0, 1)
        strokes.append(((x - ax - h * (bx - ax)) ** 2 + (y - ay - h * (by - ay)) ** 2).sqrt())
    distance = torch.stack(strokes)  # (12, cell, cell)
    weight = d.uniform(0.1, 0.26)
    near = torch.where(ink[..., None, None], distance, 9.0).amin(2)  # (N, letters, cell, cell)
    return weight, soft((weight[:, None, None, None] - near) * cell / 2)


def landscape(d: Draw) -> tuple[Tensor, list[Tensor]]:
    """Draw a sky, a disc, and up to four layers of hills."""
    colours = palette(d, 7)
    _, v = d.grid
    picture = ramp(0.5 + v / 2, colours[:, :2])
    zero = torch.zeros(d.n, device=d.device)
    sun = outline(d, zero.long(), d.uniform(-0.7, 0.7), d.uniform(-0.8, -0.2), d.uniform(0.1, 0.25), zero)
    seen = d.chance(0.6)
    picture = over(picture, flat(colours[:, 2], d), soft(sun * d.size / 2) * seen[:, None, None])
    layers, rough = d.uniform(1, 5), d.uniform(3, 5.5)
    for i in range(4):
        crest = noise(d, rough)[:, 0] * 0.15 - 0.1 + 0.28 * i  # one row of a field is a crest line
        mask = soft((v - crest[:, None]) * d.size / 2) * (i < layers.floor())[:, None, None]
        grain = 0.06 * noise(d, d.uniform(0.5, 2))[:, None]
        picture = over(picture, flat(colours[:, 3 + i], d) + grain, mask)
    return picture, [layers / 5, rough / 5.5, seen]


def spheres(d: Draw) -> tuple[Tensor, list[Tensor]]:
    """Draw lit balls with shadows on a graded ground."""
    colours = palette(d, 5)
    u, v = d.grid
    picture = ramp(0.5 + v / 2, colours[:, :2])
    count, size, light = d.uniform(1, 7), d.uniform(0.15, 0.45), d.uniform(-1, 1)
    for i in range(6):
        x, y = d.uniform(-0.7, 0.7)[:, None, None], d.uniform(-0.5, 0.7)[:, None, None]
        r = (size * d.uniform(0.6, 1.2))[:, None, None]
        on = (i < count.floor())[:, None, None]
        a, b = (u - x) / r, (v - y) / r
        shadow = torch.exp(-((a + light[:, None, None]) ** 2 / 1.5 + (b - 0.9) ** 2 / 0.2)) * 0.5 * on
        picture = picture * (1 - shadow[:, None])
        height = (1 - a * a - b * b).clamp_min(0).sqrt()
        lit = (0.3 + 0.7 * (-0.5 * light[:, None, None] * a - 0.55 * b + 0.65 * height).clamp_min(0))[:, None]
        gleam = torch.exp(-((a + 0.4 * light[:, None, None]) ** 2 + (b + 0.4) ** 2) * 18)[:, None]
        ball = flat(colours[:, 2 + i % 3], d) * lit + 0.6 * gleam
        picture = over(picture, ball, soft((1 - (a * a + b * b).sqrt()) * r * d.size / 2) * on)
    return picture, [count / 7, size * 2, light / 2 + 0.5]
