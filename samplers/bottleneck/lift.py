"""A clean estimate at a larger size: in latents, through pixels where these are a bad guide (arXiv 2609.02036)."""

from __future__ import annotations

import torch
from torch import Tensor


def lift_weights(z_latent: Tensor, z_pixel: Tensor, share: float, low: float, high: float) -> Tensor:
    """Return the weight ``(B, 1, H, W)`` of the pixel route at each place.

    The risk of a place is ``mean_c |z_pixel - z_latent|``. The ``share`` of places with the highest one has weights
    from ``low`` to ``high``, linear in the risk between the least and the greatest of these places; the others have 0.
    """
    if share <= 0:
        return torch.zeros_like(z_latent[:, :1])
    risk = (z_pixel - z_latent).abs().mean(1, keepdim=True)  # (B, 1, H, W)
    flat = risk.flatten(1)
    bar = torch.quantile(flat.float(), 1 - share, dim=1).to(flat)[:, None]
    chosen = flat >= bar if share < 1 else torch.ones_like(flat, dtype=torch.bool)
    least = flat.masked_fill(~chosen, torch.inf).amin(1, keepdim=True)
    most = flat.masked_fill(~chosen, -torch.inf).amax(1, keepdim=True)
    ramp = (flat - least) / (most - least + torch.finfo(flat.dtype).eps)
    return ((low + (high - low) * ramp) * chosen).reshape(risk.shape)


def lift(z_latent: Tensor, z_pixel: Tensor, share: float, low: float, high: float) -> Tensor:
    """Return ``z_latent + W (z_pixel - z_latent)`` with the weights of :func:`lift_weights`."""
    return z_latent + lift_weights(z_latent, z_pixel, share, low, high) * (z_pixel - z_latent)
