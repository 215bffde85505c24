"""Validation of feature matrices ``(n, d)``, shared by every metric that takes them."""

from __future__ import annotations

import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError

ROWS = 8192  # rows converted to float64 at a time


def checked(features: Tensor, label: str = "features", *, least: int = 1) -> Tensor:
    """Validate a feature matrix and return it unchanged, or on the CPU where the device has no float64.

    Raises:
        DiffAccelError: naming ``label``, for anything but a floating-point matrix ``(n, d)``, for fewer than ``least``
            rows, and for NaN or infinity.
    """
    if not isinstance(features, Tensor) or features.ndim != 2 or not features.is_floating_point():
        got = f"{features.dtype} {tuple(features.shape)}" if isinstance(features, Tensor) else type(features).__name__
        raise DiffAccelError(f"{label}: expected a floating-point tensor (n, d), got {got}.")
    n, d = features.shape
    if n < least or d < 1:
        raise DiffAccelError(
            f"{label}: {n} rows of {d} features are too few; at least {max(least, 1)} rows are needed."
        )
    bad = torch.cat([~torch.isfinite(rows).all(1) for rows in features.split(ROWS)])
    if bad.any():
        first = int(bad.nonzero()[0])
        raise DiffAccelError(
            f"{label}: {int(bad.sum())} of {n} rows hold NaN or infinity, the first is row {first}. "
            "Look at the image of that row, or run the network in a wider dtype."
        )
    return features.cpu() if features.device.type == "mps" else features


def checked_pair(x: Tensor, y: Tensor, names: tuple[str, str], *, least: int = 1) -> tuple[Tensor, Tensor]:
    """Validate two matrices of one dimension, and return them with the second on the device of the first."""
    x, y = checked(x, names[0], least=least), checked(y, names[1], least=least)
    if x.shape[1] != y.shape[1]:
        raise DiffAccelError(
            f"{names[0]} has {x.shape[1]} features and {names[1]} has {y.shape[1]}. "
            "Both must come from the same extractor."
        )
    return x, y.to(x.device)


def paired(a: Tensor, b: Tensor) -> None:
    """Raise where the rows of two runs cannot be of the same ids."""
    if len(a) != len(b):
        raise DiffAccelError(
            f"A paired difference needs the same ids in both runs; got {len(a)} and {len(b)} rows. "
            "Keep the ids that both have, in one order."
        )
