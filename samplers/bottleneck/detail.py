"""Predict how much detail a last stage restores, in closed form for one Gaussian frequency band."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise


def band_power(spectrum: tuple[float, float], frequency: float) -> float:
    """Return ``A w^-beta``."""
    scale, slope = spectrum
    return scale * frequency**-slope


def detail_gain(levels: Sequence[float], power: float) -> float:
    """Return the amplitude of a frequency band at the end of a stage, relative to the data's.

    The band is absent from the clean estimate at whose re-noised state the stage begins, and Gaussian with variance
    ``c = power`` in the data. Euler's steps from level s on give ``s / sqrt(c)`` times the product of
    ``1 + (t' - t) (t - (1 - t) c) / ((1 - t)^2 c + t^2)``. 1 is all of the detail; few steps lose some even from s = 1.

    Args:
        levels: noise levels of the stage, falling, on the linear path.
        power: variance of the band in the data.
    """
    gain = levels[0] / math.sqrt(power)
    for t, t_next in pairwise(levels):
        gain *= 1 + (t_next - t) * (t - (1 - t) * power) / ((1 - t) ** 2 * power + t**2)
    return gain


def leaving_level(spectrum: tuple[float, float], nyquist: float, tolerance: float) -> float:
    """Return the noise level at which a grid with this Nyquist frequency becomes too coarse (arXiv 2605.18736).

    ``t = 1 / (1 + sqrt(d / (P (1 + P - d))))`` with P the power at the Nyquist frequency and d the tolerance.
    """
    power = band_power(spectrum, nyquist)
    return 1 / (1 + math.sqrt(tolerance / (power * (1 + power - tolerance))))
