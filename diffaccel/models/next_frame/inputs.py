"""Checks of what users give: actions, and the frames that a video begins with."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.models.next_frame.transformer import NextFrameTransformer

LARGEST_VALUE = 20  # of frames: pictures and latents stay below, and floats of bytes do not


def check_actions(actions: Any, largest: int, name: str) -> Tensor:
    """Return actions as ``(B, T)`` int64 on the CPU, in memory of their own: what was given may change later.

    Args:
        actions: ``(T,)`` or ``(B, T)`` integers below ``largest``.
        largest: number of actions; itself excluded.
        name: of the argument, for messages.
    """
    try:
        values = torch.as_tensor(actions, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise DiffAccelError(f"{name} are no table of integers: {error}.") from error
    if values.numel() and (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool):
        raise DiffAccelError(f"{name} are {values.dtype}; they must be integers from 0 to {largest - 1}.")
    values = values.to(torch.int64, copy=True)  # unsigned ones have no order
    values = values[None] if values.ndim == 1 else values
    if values.ndim != 2 or not values.numel():
        raise DiffAccelError(f"{name} have the shape {tuple(values.shape)}; it must be (frames,) or (batch, frames).")
    wrong = values[(values < 0) | (values >= largest)]
    if wrong.numel():
        raise DiffAccelError(f"{name} hold {int(wrong[0])}; they must be integers from 0 to {largest - 1}.")
    return values


def check_prompt(
    model: NextFrameTransformer, frames: Any, actions: Any, window: int, truncate: bool
) -> tuple[Tensor, Tensor]:
    """Return the frames ``(B, P, C, H, W)`` that a video begins with, and their actions ``(B, P)``.

    Without frames it begins with a grey one. Without actions they are "no action".
    """
    if frames is None:
        if actions is not None:
            raise DiffAccelError("frame_actions were given without frames. Give both, or neither.")
        weight = model.proj_in.weight
        frames = torch.zeros(1, 1, *model.frame_shape, dtype=weight.dtype, device=weight.device)
    frames = _as_floats(frames, model.frame_shape)
    if not frames.shape[1]:
        raise DiffAccelError("frames are none; a video begins with 1 frame or more.")
    if not bool(torch.isfinite(frames).all()):
        raise DiffAccelError("frames hold NaN or infinite values; they must be finite, in [-1, 1].")
    if (most := float(frames.abs().max())) > LARGEST_VALUE:
        raise DiffAccelError(
            f"frames go up to {most:g}; they must be in [-1, 1]. Values from 0 to 255 become that by x / 127.5 - 1."
        )
    if actions is None:
        given = torch.full(frames.shape[:2], model.null_action, dtype=torch.int64, device="cpu")
    else:
        given = check_actions(actions, model.null_action + 1, "frame_actions")
    if given.shape[1] != frames.shape[1] or given.shape[0] not in (1, frames.shape[0]):
        raise DiffAccelError(
            f"frame_actions are {tuple(given.shape)} for frames {tuple(frames.shape[:2])}; give one for each frame."
        )
    if frames.shape[1] > window and not truncate:
        raise DiffAccelError(
            f"frames are {frames.shape[1]}, and the window is {window}. Give {window} or fewer, or truncate=True for "
            "the last ones."
        )
    return frames[:, -window:], given.expand(frames.shape[0], -1)[:, -window:]


def _as_floats(frames: Any, frame_shape: tuple[int, int, int]) -> Tensor:
    """Return frames, a tensor or an array of floats, as ``(B, P, C, H, W)``."""
    allowed = f"floats (batch, frames, {', '.join(map(str, frame_shape))}) in [-1, 1]"
    if isinstance(frames, np.ndarray) and np.issubdtype(frames.dtype, np.floating):
        frames = torch.from_numpy(np.ascontiguousarray(frames))
    if not isinstance(frames, Tensor | np.ndarray):
        raise DiffAccelError(f"frames are a {type(frames).__name__}; they must be a tensor or an array of {allowed}.")
    shape = tuple(frames.shape) if frames.ndim != 4 else (1, *frames.shape)
    if not isinstance(frames, Tensor) or not frames.is_floating_point() or len(shape) != 5 or shape[2:] != frame_shape:
        is_bytes = str(frames.dtype).endswith("uint8")
        fix = " Bytes (..., H, W, C) become floats by x.movedim(-1, -3) / 127.5 - 1." if is_bytes else ""
        raise DiffAccelError(f"frames are {tuple(frames.shape)} in {frames.dtype}; they must be {allowed}.{fix}")
    return frames.reshape(shape)
