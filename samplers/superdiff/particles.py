"""Particles of every picture, kept together in the rows of the state: their noise, weights and resampling.

Row ``b K + k`` is particle k of picture b. Nothing waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffaccel.samplers.search.resampling import systematic_rows
from diffaccel.session import Session


def noise(session: Session, like: Tensor, particles: int) -> Tensor:
    """Draw standard normal noise ``(B K, C, ...)``; all particles of a picture from its own generator."""
    rows = len(like) // particles
    wide = torch.empty((rows, particles * like.shape[1], *like.shape[2:]), dtype=like.dtype, device=like.device)
    return session.randn_like(wide).reshape(like.shape)


def spread(session: Session, particles: int, std: float) -> Tensor:
    """Return initial states ``(B K, C, ...)``: the first of each picture is the call's own, the others are fresh.

    Args:
        std: standard deviation of the call's initial latents.
    """
    x = session.x
    if particles == 1:
        return x
    others = noise(session, x.repeat_interleave(particles - 1, 0), particles - 1) * std
    others = others.reshape(len(x), particles - 1, *x.shape[1:])
    return torch.cat([x[:, None], others], 1).flatten(0, 1)


def initial_std(session: Session) -> float:
    """Return the standard deviation of a call's initial latents in the session's coordinates."""
    scale = session.schedule.state_scale(session.sigmas[0])
    return float(getattr(session.scheduler, "init_noise_sigma", 1.0)) * float(scale)


def effective_sizes(log_weights: Tensor) -> Tensor:
    """Return ``1 / sum w^2`` of every picture, from ``(B, K)`` to ``(B,)``."""
    return 1 / log_weights.softmax(1).square().sum(1)


def resampled(log_weights: Tensor, u: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Return ancestors ``(B K,)``, as rows of the state, and the log-weights ``(B, K)`` after resampling.

    A picture whose effective size is not below ``share K`` keeps its particles and weights.

    Args:
        u: offsets in [0, 1), ``(B,)``.
    """
    rows, particles = log_weights.shape
    own = torch.arange(particles, device=log_weights.device, dtype=torch.long).expand(rows, -1)
    is_due = (effective_sizes(log_weights) < share * particles)[:, None]
    ancestors = torch.where(is_due, systematic_rows(log_weights.softmax(1), u), own)
    kept = torch.where(is_due, torch.zeros_like(log_weights), log_weights)
    first = particles * torch.arange(rows, device=log_weights.device, dtype=torch.long)[:, None]
    return (first + ancestors).flatten(), kept


def uniforms(session: Session, rows: int, like: Tensor) -> Tensor:
    """Draw one number in [0, 1) for each picture from its own generator, ``(B,)``."""
    normal = session.randn_like(torch.empty((rows, 1), dtype=torch.float32, device=like.device))
    return (0.5 * (1 + torch.erf(normal[:, 0].to(like.dtype) / 2**0.5))).clamp(max=1 - 1e-7)


def chosen(log_weights: Tensor, u: Tensor) -> Tensor:
    """Draw one particle of each picture by its weight; return its row of the state, ``(B,)``."""
    rows, particles = log_weights.shape
    totals = log_weights.softmax(1).cumsum(1)
    index = torch.searchsorted(totals, u[:, None]).clamp(max=particles - 1)[:, 0]
    return particles * torch.arange(rows, device=log_weights.device, dtype=torch.long) + index
