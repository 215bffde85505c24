"""Which frame sees which: a token of frame i sees those of frame j where ``i - window < j <= i``."""

from __future__ import annotations

import torch
from torch import Tensor


def band(query_ids: Tensor, key_ids: Tensor, window: int) -> Tensor:
    """Return ``(queries, keys)``, true where a frame of the first ids sees one of the second."""
    distance = query_ids[:, None] - key_ids[None, :]
    return (distance >= 0) & (distance < window)


def of_tokens(frames: Tensor, tokens: int) -> Tensor:
    """Return the mask of frames for each of their tokens: ``(queries * tokens, keys * tokens)``."""
    queries, keys = frames.shape
    return frames[:, None, :, None].expand(-1, tokens, -1, tokens).reshape(queries * tokens, keys * tokens)


def frame_ids(frames: int, device: torch.device) -> Tensor:
    """Return the ids 0, 1, ... of frames in their order."""
    return torch.arange(frames, dtype=torch.int64, device=device)
