"""How well a world model continues a video under actions: PSNR by horizon, on all pixels or on those seen before.

What scrolls into view is random, so a model cannot know it: :func:`seen_before` leaves it out. The PSNR of a set is
that of its mean squared error; a mean of decibels would be ruled by the clips in which nothing moves. The PSNR under
the actions that were taken minus that under other ones (delta-PSNR, arXiv 2402.15391) says how much a model obeys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError


def squared_error(frames: Tensor, truth: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the mean squared error ``(...)`` of frames ``(..., C, H, W)``, in float64.

    Args:
        mask: ``(..., H, W)`` bool, the pixels that count; a frame without any is nan.
    """
    if frames.shape != truth.shape:
        raise DiffAccelError(
            f"frames have the shape {tuple(frames.shape)} and truth {tuple(truth.shape)}; they must be the same."
        )
    square = (frames.double() - truth.double()).square().mean(-3)
    if mask is None:
        return square.mean((-1, -2))
    return (square * mask).sum((-1, -2)) / mask.sum((-1, -2))


def psnr(errors: Tensor) -> Tensor:
    """Return the PSNR in dB of the mean over clips of errors ``(B, ...)`` of frames in [-1, 1]; nan is left out."""
    return 10 * torch.log10(4 / errors.nanmean(0))


def seen_before(given: Tensor, camera: Tensor, height: int, width: int, margin: float = 1.0) -> Tensor:
    """Return ``(..., T, H, W)`` bool: pixels of later frames whose place was in view in one of the given frames.

    Args:
        given: ``(..., P, 2)`` x and y of the camera at the given frames, in pixels, rightwards and upwards.
        camera: ``(..., T, 2)`` the same at the later frames.
        margin: pixels at the edge of a given frame that do not count as seen, since the camera moves by parts of one.
    """
    moved = camera[..., :, None, :] - given[..., None, :, :]  # (..., T, P, 2)
    column = torch.arange(width, dtype=moved.dtype, device=moved.device) + moved[..., 0, None]
    row = torch.arange(height, dtype=moved.dtype, device=moved.device) - moved[..., 1, None]
    in_column = (column >= margin) & (column <= width - 1 - margin)  # (..., T, P, W)
    in_row = (row >= margin) & (row <= height - 1 - margin)
    return (in_row[..., :, None] & in_column[..., None, :]).any(-3)


def changes_within(present: Tensor, actions: Tensor, horizon: int) -> Tensor:
    """Return ``(B,)`` bool: clips in whose first ``horizon`` actions ``(B, T)`` one differs from ``present (B,)``."""
    return (actions[:, :horizon] != present[:, None]).any(1)


def mean_difference(frames: Tensor) -> Tensor:
    """Return the mean absolute difference ``(B,)`` of consecutive frames ``(B, T, C, H, W)``: how much moves."""
    return (frames[:, 1:].double() - frames[:, :-1].double()).abs().mean((1, 2, 3, 4))
