"""Regions of a picture: masks written as digits, stretched over its latents."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from diffaccel.errors import DiffAccelError


def check_region(region: str) -> None:
    """Raise for a mask that is not rows of digits of one length."""
    rows = region.split("/")
    if not all(re.fullmatch(r"[0-9]+", row) for row in rows) or len({len(row) for row in rows}) > 1:
        raise DiffAccelError(
            f"The region '{region}' is no mask. Write rows of digits of one length with '/' between them, as '10/10' "
            "for the left half."
        )


def masks_of(regions: Sequence[str], x: Tensor) -> Tensor:
    """Return the share of every region at every place, ``(R, d)`` for latents ``(B, C, ..., H, W)``.

    Raises:
        DiffAccelError: where no region covers a place.
    """
    size = (x.shape[-2], x.shape[-1])
    planes = []
    for region in regions:
        rows = [[float(digit) for digit in row] for row in region.split("/")]
        grid = torch.tensor(rows, dtype=torch.float32, device="cpu")[None, None]
        planes.append(functional.interpolate(grid, size, mode="nearest-exact")[0, 0])
    stacked = torch.stack(planes)
    total = stacked.sum(0)
    if bool((total == 0).any()):
        raise DiffAccelError("The regions leave a part of the picture out. Give every place a digit above 0 in one.")
    shares = (stacked / total).reshape(len(planes), *[1] * (x.ndim - 3), *size)
    return shares.expand(len(planes), *x.shape[1:]).reshape(len(planes), -1).to(x.device, x.dtype)
