"""Resizing methods of published feature extractors. They differ, and so do the distances.

All work on tensors ``(..., H, W)``. A method that is defined by a formula runs on any device, in float32 or, for
Pillow's on floats, in float64. Pillow's on 8 bits is defined by Pillow's own arithmetic, so it runs on the CPU, one
image at a time. NumPy, not PyTorch, copies to and from Pillow: these functions run in many threads, and PyTorch would
start its own thread pool in each.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

Size = tuple[int, int]  # (height, width)
_AT_ONCE = 2**24  # float64 numbers in one step of a resize


def tf1_bilinear(x: Tensor, size: Size) -> Tensor:
    """Resize bilinearly as TensorFlow 1 does without aligned corners: pixel i is sampled at ``i * (in / out)``.

    There are no half-pixel centres, so the image shifts towards its top left corner, and there is no antialiasing. The
    graph of the original FID resizes like this (Heusel et al., arXiv 1706.08500). Any device, uint8 or float
    ``(B, C, H, W)`` to float32.
    """
    height, width = x.shape[-2:]
    if (height, width) == size:
        return x.to(torch.float32)
    left, right, weight = _neighbours(width, size[1], x.device)
    first, second = x[..., left].to(torch.float32), x[..., right].to(torch.float32)
    columns = first + (second - first) * weight
    top, bottom, weight = _neighbours(height, size[0], x.device)
    first, second = columns[..., top, :], columns[..., bottom, :]
    return first + (second - first) * weight[:, None]


def _neighbours(source: int, target: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return both source neighbours of every target pixel and the second's weight, in float32 as in TensorFlow."""
    position = torch.arange(target, dtype=torch.float32, device=device) * torch.tensor(
        source / target, dtype=torch.float32
    )
    low = position.long()
    return low, (low + 1).clamp_max(source - 1), position - low.to(torch.float32)


def torch_bilinear(x: Tensor, size: Size) -> Tensor:
    """Resize by PyTorch's bilinear with half-pixel centres and no antialiasing, as pytorch-fid. Any device, float."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def torch_bicubic(x: Tensor, size: Size, *, antialias: bool) -> Tensor:
    """Resize by PyTorch's bicubic in float32, neither rounded nor clamped. Any device, float.

    With antialiasing it is the fast mode of EDM2 (Karras et al., arXiv 2312.02696) for DINOv2; without, it is the
    public PyTorch code of CMMD (arXiv 2401.09603).
    """
    return F.interpolate(x, size=size, mode="bicubic", antialias=antialias, align_corners=False)


def pil_bicubic_float(x: Tensor, size: Size) -> Tensor:
    """Resize by Pillow's antialiased bicubic of each channel in float32, clamped to [0, 255], not rounded.

    The resizing of clean-fid (Parmar et al., arXiv 2104.11222). Rows come first, as in Pillow up to 12; newer versions
    take the columns of tall images first, which changes last bits. ``(B, C, H, W)`` of any dtype to float32: on a GPU
    by :func:`as_pillow`, which is equal to the bit, on other devices by Pillow on the CPU.
    """
    if x.device.type == "cuda":
        return as_pillow(x, size)
    from PIL import Image

    resized = np.empty((len(x) * x.shape[1], *size), np.float32)
    for plane, out in zip(x.flatten(0, 1).cpu().numpy(), resized, strict=True):
        rows = Image.fromarray(plane.astype(np.float32)).resize((size[1], x.shape[2]), Image.Resampling.BICUBIC)
        np.clip(np.asarray(rows.resize((size[1], size[0]), Image.Resampling.BICUBIC)), 0, 255, out=out)
    return torch.from_numpy(resized).unflatten(0, x.shape[:2]).to(x.device)


def as_pillow(x: Tensor, size: Size) -> Tensor:
    """Compute :func:`pil_bicubic_float` on any device that has float64.

    Like Pillow, it resizes along rows, then along columns, sums pixel by pixel in float64, and rounds to float32.
    """
    height, width = x.shape[-2:]
    images = max(1, _AT_ONCE // (x[0].numel() * max(1, size[1] // width)))
    parts = []
    for part in x.split(images):
        if width != size[1]:
            part = _pillow_pass(part, size[1])
        if height != size[0]:
            part = _pillow_pass(part.transpose(-1, -2), size[0]).transpose(-1, -2)
        parts.append(part.to(torch.float32).clamp(0, 255))
    return torch.cat(parts)


def _pillow_pass(x: Tensor, target: int) -> Tensor:
    """Resize along the last dimension, to float32."""
    source = x.shape[-1]
    total = torch.zeros((*x.shape[:-1], target), dtype=torch.float64, device=x.device)
    for places, weight in _pillow_taps(source, target, x.device):
        # two operations: a fused multiply-add would round differently
        total += x[..., places].to(torch.float64) * weight
    return total.to(torch.float32)


@lru_cache
def _pillow_taps(source: int, target: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Return the source pixel and the float64 weight of each target pixel, for every tap.

    Keys' kernel with a = -1/2, stretched where the image shrinks; the weights of a pixel add up to one. Results are
    cached, because copying them to a device waits for it.
    """
    scale = source / target
    stretch = max(scale, 1.0)
    first, rows = [], []
    for i in range(target):
        centre = (i + 0.5) * scale
        low, high = max(int(centre - 2 * stretch + 0.5), 0), min(int(centre + 2 * stretch + 0.5), source)
        row = [_keys((x - centre + 0.5) * (1 / stretch)) for x in range(low, high)]
        total = 0.0
        for weight in row:  # not sum(), which compensates rounding errors since Python 3.12
            total += weight
        first.append(low)
        rows.append([weight / total for weight in row])
    taps = max(map(len, rows))
    places = torch.tensor(first)[None] + torch.arange(taps)[:, None]
    weights = torch.tensor([[*row, *[0.0] * (taps - len(row))] for row in rows], dtype=torch.float64).T.contiguous()
    return list(zip(places.clamp_max(source - 1).to(device), weights.to(device), strict=True))


def _keys(x: float) -> float:
    """Evaluate Keys' cubic convolution kernel with a = -1/2 (Keys, 1981), in the order of Pillow's operations."""
    a, x = -0.5, abs(x)
    if x < 1.0:
        return ((a + 2.0) * x - (a + 3.0)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2.0 else 0.0


def pil_bicubic(image: Tensor, size: Size) -> Tensor:
    """Resize one uint8 image ``(3, H, W)`` on the CPU by Pillow's antialiased bicubic, rounded to 8 bits.

    The resizing of dgm-eval before DINOv2 (Stein et al., arXiv 2306.04675).
    """
    from PIL import Image

    return from_pil(to_pil(image).resize((size[1], size[0]), Image.Resampling.BICUBIC))


def to_pil(image: Tensor) -> Image.Image:
    """Convert a uint8 image ``(3, H, W)`` to Pillow's."""
    from PIL import Image

    return Image.fromarray(image.numpy().transpose(1, 2, 0).copy())


def from_pil(image: Image.Image) -> Tensor:
    """Convert Pillow's RGB image to uint8 ``(3, H, W)``."""
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())
