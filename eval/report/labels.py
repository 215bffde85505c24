"""Places of names beside the points of a plot: no name touches another one, a point or an error bar."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

LETTER, LINE = 6.4, 15  # of a name, in pixels
GAP = 9  # from a point to its name
LONGEST = 26  # letters of a name in a plot
Box = tuple[float, float, float, float]  # left, top, right, bottom
Place = tuple[float, float, str, tuple[float, float] | None]  # x and base line, anchor, end of a leader


def place_names(dots: Sequence[dict[str, Any]], area: Box, line: Sequence[tuple[float, float]] = ()) -> list[str]:
    """Give every dot a place for its name as ``label_x``, ``label_y``, ``anchor`` and ``leader``, or none.

    Names go beside, above or below their dots, further away along a thin line where that is taken, and off the line of
    the front where they can. A dot for whose name there is no room gets an empty ``label``.

    Args:
        dots: with ``x``, ``y``, ``name`` and ends of error bars, ``x_bar`` and ``y_bar``, in pixels; changed in place.
        area: between the axes.
        line: corners of the front.

    Returns:
        Names of the dots without a place.
    """
    taken = [box for dot in dots for box in _boxes_of(dot)]
    front, unnamed = list(_boxes_of_line(line)), []
    for dot in sorted(dots, key=lambda dot: (not dot.get("best"), dot["x"])):
        label = shortened(dot["name"])
        free = [place for place in _candidates(dot) if _is_free(_box_of_name(label, place), area, taken)]
        if not free:
            dot |= {"label": "", "leader": None}
            unnamed.append(dot["name"])
            continue
        place = next((p for p in free if _is_free(_box_of_name(label, p), area, front)), free[0])
        x, y, anchor, leader = place
        dot |= {"label": label, "label_x": round(x, 1), "label_y": round(y, 1), "anchor": anchor, "leader": leader}
        taken.append(_box_of_name(label, place))
    return unnamed


def shortened(name: str) -> str:
    """Return a name as a plot shows it: the middle of a long one left out."""
    if len(name) <= LONGEST:
        return name
    return f"{name[: LONGEST - 11]}…{name[-10:]}"


def _boxes_of(dot: dict[str, Any]) -> Iterator[Box]:
    x, y = dot["x"], dot["y"]
    yield x - 6, y - 6, x + 6, y + 6
    if dot.get("x_bar"):
        yield dot["x_bar"][0] - 2, y - 4, dot["x_bar"][1] + 2, y + 4
    if dot.get("y_bar"):
        yield x - 4, dot["y_bar"][0] - 2, x + 4, dot["y_bar"][1] + 2


def _boxes_of_line(corners: Sequence[tuple[float, float]]) -> Iterator[Box]:
    """Yield small boxes along a line."""
    for (x0, y0), (x1, y1) in pairwise(corners):
        count = max(1, int(max(abs(x1 - x0), abs(y1 - y0)) // 8))
        for i in range(count + 1):
            x, y = x0 + (x1 - x0) * i / count, y0 + (y1 - y0) * i / count
            yield x - 2, y - 2, x + 2, y + 2


def _candidates(dot: dict[str, Any]) -> Iterator[Place]:
    """Yield places of a name, the nearest first: x and base line of the text, its anchor, and the end of a leader."""
    x, y = dot["x"], dot["y"]
    for away in (0, 14, 28, 44, 60, 80):
        up, down = y - GAP - away, y + GAP + 9 + away
        ends: tuple[float, float] | None = None
        for offset, anchor in ((GAP, "start"), (-GAP, "end")):
            if away == 0:
                yield x + offset, y + 4, anchor, None
            for line in (up, down):
                ends = (x + offset * 0.8, line + (4 if line < y else -10)) if away else None
                yield x + offset, line, anchor, ends
        for line in (up, down):
            ends = (x, line + (4 if line < y else -10)) if away else None
            yield x, line, "middle", ends
        if away == 28:
            yield from _beside_bars(dot)


def _beside_bars(dot: dict[str, Any]) -> Iterator[Place]:
    """Yield places just beyond the ends of the error bars, which lead to their dot by themselves."""
    if dot.get("x_bar"):
        yield dot["x_bar"][1] + GAP, dot["y"] + 4, "start", None
        yield dot["x_bar"][0] - GAP, dot["y"] + 4, "end", None
    if dot.get("y_bar"):
        for line in (dot["y_bar"][0] - GAP, dot["y_bar"][1] + GAP + 9):
            for offset, anchor in ((0, "middle"), (-4, "start"), (4, "end")):
                yield dot["x"] + offset, line, anchor, None


def _box_of_name(label: str, place: Place) -> Box:
    """Return the box of a text at its base line."""
    x, y, anchor, _ = place
    width = LETTER * len(label)
    start = x - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
    return start, y - LINE + 4, start + width, y + 4


def _is_free(box: Box, area: Box, taken: Sequence[Box]) -> bool:
    inside = box[0] >= area[0] and box[1] >= area[1] and box[2] <= area[2] and box[3] <= area[3]
    return inside and not any(_touch(box, other) for other in taken)


def _touch(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
