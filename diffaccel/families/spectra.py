"""Power spectra of latents: how much of a picture lies at which frequency, by the VAE that made them."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from torch import Tensor

from diffaccel.modules.dct import dct_matrix
from diffaccel.modules.say_once import warn_once

logger = logging.getLogger(__name__)

# P(w) = A w^-beta, w in cycles along the shorter side of the latent grid; by the VAE's scaling factor and channels.
# FLUX and Wan: arXiv 2605.18736. Another VAE: `fit` on encoded pictures.
SPECTRA: dict[tuple[float | None, int], tuple[float, float]] = {
    (0.3611, 16): (203.615097, 1.915461),
    (None, 16): (219.484718, 2.422687),  # Wan: a mean and a deviation for each channel instead of one factor
    (0.4386, 16): (3.3836, 1.3787),  # emoji-flux: python -m scripts.zoo.emoji.spectrum, at 128 px
}
GENERIC = SPECTRA[0.3611, 16]


def spectrum_of(pipe: Any) -> tuple[float, float]:
    """Return ``(A, beta)`` of the pipeline's latents; with a warning, once, those of FLUX where they are not known."""
    config = getattr(getattr(pipe, "vae", None), "config", {})
    factor = config.get("scaling_factor")
    channels = config.get("latent_channels") or config.get("z_dim") or 0
    known = SPECTRA.get((round(factor, 4) if factor else None, channels))
    if known is None:
        warn_once(
            logger,
            pipe,
            "The power spectrum of the latents of %s is not known; FLUX's is used. Fit it to encoded pictures by "
            "diffaccel.families.spectra.fit(latents) and pass it: Bottleneck(spectrum=(A, beta)).",
            type(pipe).__name__,
        )
    return known or GENERIC


def fit(latents: Tensor) -> tuple[float, float]:
    """Fit ``P(w) = A w^-beta`` to clean latents ``(B, C, H, W)``, in the scale in which a network sees them.

    The power of a frequency is the mean square of its coefficients in the orthonormal DCT, over rows and channels; a
    line is fitted to its logarithm over the logarithm of w, in which every length w counts alike.
    """
    x = latents.detach().to("cpu", torch.float64)
    height, width = x.shape[-2:]
    power = ((dct_matrix(height) @ x @ dct_matrix(width).T) ** 2).flatten(0, -3).mean(0)  # (H, W)
    side = min(height, width)
    rows = torch.arange(height, dtype=torch.float64, device="cpu")[:, None] * side / height
    columns = torch.arange(width, dtype=torch.float64, device="cpu")[None] * side / width
    cycles = torch.hypot(rows, columns) / 2  # a DCT's k-th row has k / 2 cycles
    inside = (cycles > 0) & (cycles <= side / 2)
    logs, values = cycles[inside].log(), power[inside].log()
    weights = 1 / cycles[inside]  # as many coefficients lie at w as w is long: each length counts alike
    mean_log, mean_value = (logs * weights).sum() / weights.sum(), (values * weights).sum() / weights.sum()
    slope = (weights * (logs - mean_log) * (values - mean_value)).sum() / (weights * (logs - mean_log) ** 2).sum()
    return math.exp(float(mean_value - slope * mean_log)), -float(slope)
