"""The region of an image that an inpainting call keeps, under every particle's own noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from diffaccel.samplers.search.transitions import Coefficients
from diffaccel.session import Session, bcast


@dataclass(frozen=True, eq=False)
class KeptRegion:
    """What is put back into states: the rule of the stock pipelines, with the noise of each particle.

    After a step to level sigma the state is ``(1 - m) (alpha x0 + sigma eps) + m x``, and at the end ``(1 - m) x0 + m
    x``. In stock calls ``eps`` is the call's own noise throughout. Here it is that of the particle: where a transition
    draws fresh noise z it becomes what the same transition makes of it, ``eps' = ((a sigma + b) eps + c z) / sigma'``,
    so that kept and drawn pixels have one noise, and the state of a network that knows the kept region is not changed.

    Attributes:
        mask: m, 1 where the picture is drawn anew, ``(B, C, H, W)``, or one channel for all.
        clean: x0, latents of the image, ``(B, C, H, W)``.
        noise: eps of the call itself, of the same shape.
        session: the call.
    """

    mask: Tensor
    clean: Tensor
    noise: Tensor
    session: Session

    @classmethod
    def of(cls, session: Session) -> Self | None:
        """Return what a call keeps; None where it keeps nothing, or its network does that by itself."""
        family, pipe = session.family, session.pipe
        parts = family.kept_region(pipe, session.prepared, session.latents) if session.prepared else None
        if parts is None:
            return None
        mask, clean, noise = (family.spatial(pipe, part, session.height, session.width).to(session.x) for part in parts)
        return cls(mask, clean, noise, session)

    def put_back(self, x: Tensor, sigma: Tensor, noise: Tensor | None, rows: Sequence[int]) -> Tensor:
        """Return states ``(R, C, H, W)`` at ``sigma``, scalar or one per row, with the kept region in them.

        Args:
            noise: eps of every row; None where ``sigma`` is the last level, or 0, and nothing of it is left.
            rows: the call's row of every row.
        """
        path, chosen = self.session.path, list(rows)
        level, clean = bcast(sigma, x), self.clean[chosen]
        known = path.alpha(level) * clean
        if noise is not None:
            known = known + path.sigma(level) * noise
            end = self.session.sigmas[-1]
            scale = self.session.schedule.state_scale(end)  # the pipeline's latents end with x0, whatever the level
            known = torch.where(bcast(sigma <= end, x).to(x.device), scale * clean, known)
        mask = self.mask[chosen]
        return (1 - mask) * known + mask * x

    def drawn(self, rows: Sequence[int]) -> Tensor:
        """Return 1 where anything is drawn in the rows, 0 where everything is kept."""
        return (self.mask[list(rows)] > 0).to(self.mask)


def carried_noise(
    noise: Tensor, sigmas: Sequence[float], coefficients: Sequence[Coefficients], z: Tensor | None
) -> Tensor:
    """Return the noise of kept pixels after transitions from ``sigmas``: ``(w eps + c z) / sqrt(w^2 + c^2)``.

    ``w = a sigma + b`` is the factor of eps in ``a x + b v + c z`` on every path. Of a kernel that keeps the marginals
    the root is ``sigma'``. Without fresh noise eps stays as it is, to the bit.
    """
    if z is None or not any(kernel.c for kernel in coefficients):
        return noise
    weights = [kernel.a * sigma + kernel.b for kernel, sigma in zip(coefficients, sigmas, strict=True)]
    roots = [(w * w + kernel.c * kernel.c) ** 0.5 for w, kernel in zip(weights, coefficients, strict=True)]
    of_noise = [w / r if kernel.c else 1.0 for w, r, kernel in zip(weights, roots, coefficients, strict=True)]
    of_z = [kernel.c / r if kernel.c else 0.0 for r, kernel in zip(roots, coefficients, strict=True)]
    old, new = (bcast(torch.tensor(column, dtype=torch.float32, device="cpu"), noise) for column in (of_noise, of_z))
    return old * noise + new * z
