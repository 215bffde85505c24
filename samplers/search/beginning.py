"""Where a search begins: at pure noise, or at fresh noise on the image of an image-to-image call."""

from __future__ import annotations

from torch import Tensor

from diffaccel.config import SamplerConfig
from diffaccel.errors import DiffAccelError
from diffaccel.session import Session

SAME = 0.02  # relative distance of the latents that noise and image make to the call's own, at most


def begins_at_image(session: Session) -> bool:
    """Return whether a call begins in the middle of its noise levels."""
    return len(session.timesteps) < len(getattr(session.scheduler, "timesteps", ()))


def image_of(config: SamplerConfig, session: Session) -> Tensor | None:
    """Return the clean latents ``(B, C, H, W)`` that the call begins at with noise on them; None for pure noise.

    The call's initial latents must be ``alpha x0 + sigma eps`` of them and of the noise that the scheduler was given.

    Raises:
        DiffAccelError: for a call that begins at an image which cannot be told.
    """
    if not begins_at_image(session):
        return None
    parts = [_state(session, part) for part in session.noised or ()]
    clean, noise = parts if len(parts) == 2 else (None, None)
    if clean is not None and noise is not None:
        begin = session.sigmas[0]
        mixed = session.path.alpha(begin) * clean + session.path.sigma(begin) * noise
        if float((mixed - session.x).norm()) < SAME * float(session.x.norm()):
            return clean.expand_as(session.x)
    raise _refusal(config, f"what {type(session.pipe).__name__} mixes with its noise cannot be told")


def _state(session: Session, latents: Tensor) -> Tensor | None:
    """Return latents as ``(B, C, H, W)`` in fp32, from the pipeline's layout or this one; None from another."""
    if latents.shape[1:] == session.latents.shape[1:]:
        rows = session.family.unwrap(latents, session.conds[0].arguments)
        latents = session.family.spatial(session.pipe, rows, session.height, session.width)
    fits = latents.shape[1:] == session.x.shape[1:] and len(latents) in (1, len(session.x))
    return latents.to(session.x) if fits else None


def _refusal(config: SamplerConfig, why: str) -> DiffAccelError:
    return DiffAccelError(
        f"{type(config).__name__} searches from pure noise, and this call begins in the middle of its noise levels, at "
        f"an image: {why}. Call the pipeline with strength=1.0, or without a search."
    )
