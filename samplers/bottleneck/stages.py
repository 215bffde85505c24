"""The stages of a call: which size, from which noise level to which; one function for each published rule.

A rule knows the call's size and noise levels and no network, so that it serves planning as well as sampling. Levels are
those of the linear path, ``x = (1 - t) x0 + t eps``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError, size_text
from diffaccel.samplers.bottleneck.detail import leaving_level
from diffaccel.samplers.bottleneck.levels import fitted_shift, resampled, shift, shifted, truncated, unshift
from diffaccel.samplers.bottleneck.presets import too_few
from diffaccel.samplers.bottleneck.resizing import side_ratio, time_at_scale

Size = tuple[int, int]
ASPECT_ERROR = 0.03  # 1280x720 at half size is 640x352 on a grid of 16


@dataclass(frozen=True, eq=False)
class Target:
    """What a rule knows of the call.

    Attributes:
        size: height and width of the picture in pixels.
        levels: ``(n + 1,)`` the call's own noise levels at this size.
        multiple: number of which the sides of a picture must be multiples.
        latent: pixels a latent, along a side.
    """

    size: Size
    levels: Tensor
    multiple: int
    latent: int

    def scaled(self, scale: float) -> Size:
        """Return the size at a scale, rounded to what the model draws.

        Raises:
            DiffAccelError: where rounding changes the aspect ratio, or nothing is left.
        """
        (height, width), change = self._at_scale(self.size, scale)
        if _is_skewed(change):
            raise DiffAccelError(
                f"{size_text(*self.size)} at scale {scale:g} is {size_text(height, width)}, whose aspect ratio differs "
                f"by {abs(change - 1):.0%} since sides are multiples of {self.multiple}. The nearest size that keeps "
                f"it at that scale is {size_text(*self._nearest(scale))}."
            )
        return height, width

    def _at_scale(self, size: Size, scale: float) -> tuple[Size, float]:
        """Return a size at a scale, rounded, and the factor by which that changes the aspect ratio."""
        height, width = (max(1, round(side * scale / self.multiple)) * self.multiple for side in size)
        return (height, width), (height / width) / (size[0] / size[1])

    def _nearest(self, scale: float) -> Size:
        """Return the nearest size, the larger of two, that keeps its aspect ratio at a scale; squares always do."""
        sides = range(self.multiple, max(self.size) + 2 * self.multiple, self.multiple)
        kept = [size for size in product(sides, sides) if not _is_skewed(self._at_scale(size, scale)[1])]
        return min(kept, key=lambda size: (math.dist(size, self.size), -size[0] * size[1]))


def _is_skewed(change: float) -> bool:
    return min(abs(change - 1), abs(1 / change - 1)) > ASPECT_ERROR


@dataclass(frozen=True, eq=False)
class Stage:
    """Steps at one size.

    Attributes:
        size: height and width in pixels.
        levels: ``(n + 1,)`` noise levels of its n steps.
        own: place of ``levels[1:]`` in the call's own levels, where they are its own; None elsewhere.
        enters_own: whether ``levels[0]`` is the call's own, too.
        noised_to: level at which the clean estimate of the stage before is noised, where it is not ``levels[0]``.
    """

    size: Size
    levels: Tensor
    own: slice | None = None
    enters_own: bool = False
    noised_to: float | None = None

    @property
    def steps(self) -> int:
        """Number of steps, each with one prediction."""
        return len(self.levels) - 1


def _part(target: Target, size: Size, first: int, last: int) -> Stage:
    """Return the call's own steps from the level ``first`` to the level ``last``."""
    return Stage(size, target.levels[first : last + 1], slice(first + 1, last + 1), True)


def spectral(target: Target, scales: Sequence[float], spectrum: tuple[float, float], tolerance: float) -> list[Stage]:
    """Return growing stages; each is left at the first level at which its grid is too coarse (arXiv 2605.18736).

    The call's own levels are kept, but for the first one of a larger grid, where the same state stands higher. The
    last step is always one of the full size, also where a smaller grid could hold it: in few steps, and where a
    scheduler's last level is not 0.
    """
    own = target.levels.tolist()
    nyquist = min(target.size) / target.latent / 2
    leaves = [leaving_level(spectrum, scale * nyquist, tolerance) for scale in scales[:-1]]
    last_step = len(own) - 2
    ends = [
        next((place for place, level in enumerate(own[:last_step]) if level <= leave), last_step) for leave in leaves
    ]
    return expanded(target, scales, [0, *ends, len(own) - 1])


def expanded(target: Target, scales: Sequence[float], places: Sequence[int]) -> list[Stage]:
    """Return growing stages of :func:`spectral`, from each of some places to the next; those without steps are none.

    The same state stands higher on a larger grid, at the first level of its stage.
    """
    own = target.levels.tolist()
    stages: list[Stage] = []
    first = 0
    for size, last in zip(map(target.scaled, scales), places[1:], strict=True):
        if last <= first:
            continue
        stage = _part(target, size, first, last)
        if stages:
            entry = time_at_scale(own[first], side_ratio(stages[-1].size, size))
            stage = Stage(size, torch.cat([stage.levels.new_tensor([entry]), stage.levels[1:]]), stage.own)
        stages.append(stage)
        first = last
    return stages


def switched(target: Target, scales: Sequence[float], switches: Sequence[float]) -> list[Stage]:
    """Return stages with the call's own levels, each left after a share of its steps (arXiv 2609.02036).

    Each stage has a step at least.
    """
    places = bounds(len(target.levels) - 1, switches)
    return [
        _part(target, target.scaled(scale), first, last)
        for scale, (first, last) in zip(scales, pairwise(places), strict=True)
    ]


def bounds(total: int, switches: Sequence[float]) -> list[int]:
    """Return the steps at which stages begin, and the last one's end, from shares of ``total`` steps.

    Raises:
        DiffAccelError: for fewer steps than stages.
    """
    later = len(switches)
    if total <= later:
        raise too_few(total, later + 1)
    places = [0]
    for index, share in enumerate(switches):
        places.append(min(max(round(share * total), places[-1] + 1), total - (later - index)))
    return [*places, total]


def reshifted(target: Target, scales: Sequence[float], switches: Sequence[float]) -> list[Stage]:
    """Return stages whose schedule is shifted by one more each time, left after a share of the steps (LightX2V).

    The clean estimate is noised at the level of the step just made, not at the one that it led to.
    """
    stages = switched(target, scales, switches)
    h, first = fitted_shift(target.levels), 0
    changed: list[Stage] = []
    for index, stage in enumerate(stages):
        levels, noised_to = stage.levels, None
        if index:
            levels = shift(unshift(target.levels, h), h + index)[first : first + stage.steps + 1]
            noised_to = float(changed[-1].levels[-2])
        changed.append(Stage(stage.size, levels, stage.own if not index else None, not index, noised_to))
        first += stage.steps
    return changed


def renoised(
    target: Target,
    scales: Sequence[float],
    steps: Sequence[int],
    starts: Sequence[float],
    shifts: Sequence[float] | None,
    *,
    hands_off: bool,
    before_shift: bool,
    is_truncated: bool,
) -> list[Stage]:
    """Return stages that each have a schedule of their own, high, low, high (arXiv 2503.18940).

    Args:
        steps: number of each stage's grid.
        starts: noise level at which each stage begins.
        shifts: of each stage's schedule; None to follow the curve of the call's own.
        hands_off: whether a stage ends at the level of the next one, as seen on its own grid, and not at 0.
        before_shift: whether ``starts`` are meant before the shift.
        is_truncated: whether of each grid from 1 to 0 only the steps from its start on are made.
    """
    sizes = [target.scaled(scale) for scale in scales]
    h = shifts or [fitted_shift(target.levels)] * len(sizes)
    top = float(target.levels[0])  # below 1 for image-to-image, and where a table of noise levels ends
    if is_truncated:
        lists = [truncated(start, n, s) for start, n, s in zip(starts, steps, h, strict=True)]
        lists = [torch.cat([levels[:1].clamp(max=top), levels[1:][levels[1:] < top]]) for levels in lists]
        return [Stage(size, levels) for size, levels in zip(sizes, lists, strict=True)]
    heights = [
        float(shift(torch.tensor(u, dtype=torch.float64, device="cpu"), s)) for u, s in zip(starts, h, strict=True)
    ]
    begins = [min(top, begin) for begin in (heights if before_shift else starts)]
    stages = []
    for index, (size, count) in enumerate(zip(sizes, steps, strict=True)):
        begin, end = begins[index], 0.0
        if hands_off and index + 1 < len(sizes):
            end = time_at_scale(begins[index + 1], side_ratio(sizes[index + 1], size))
        if end >= begin:
            raise DiffAccelError(
                f"Stage {index + 1} of {size_text(*size)} would begin at noise level {begin:.3f} and end at "
                f"{end:.3f}. Lower the start of the next stage, or use stage_end='clean'."
            )
        if shifts is None and count == len(target.levels) - 1 and begin == top and not end:
            stages.append(_part(target, size, 0, count))  # the call's own
            continue
        levels = resampled(target.levels, begin, end, count) if shifts is None else shifted(begin, end, count, h[index])
        stages.append(Stage(size, levels))
    return stages


def whole(target: Target) -> list[Stage]:
    """Return the plain call: one stage at full size."""
    return [_part(target, target.size, 0, len(target.levels) - 1)]
