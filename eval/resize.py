"""The resizings that published feature extractors put before their networks. They differ, and the distances with them.

All work on tensors ``(..., H, W)``. Those that run on any device are the ones whose definition is a formula in float32;
those of Pillow run on the CPU, one image at a time, because Pillow's own arithmetic is their definition. Around Pillow
NumPy copies, not PyTorch: these functions run in many threads, and PyTorch would start its own in each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

Size = tuple[int, int]  # (height, width)


def tf1_bilinear(x: Tensor, size: Size) -> Tensor:
    """Bilinear as in TensorFlow 1 without aligned corners: pixel i comes from ``i * (in / out)``.

    There are no half-pixel centres, so the image shifts towards its top left corner, and no antialiasing; the graph of
    the first FID does it (Heusel et al., arXiv 1706.08500). Any device, uint8 or float ``(B, C, H, W)`` to float32.
    """
    height, width = x.shape[-2:]
    if (height, width) == size:
        return x.to(torch.float32)
    left, right, part = _neighbours(width, size[1], x.device)
    first, second = x[..., left].to(torch.float32), x[..., right].to(torch.float32)
    columns = first + (second - first) * part
    top, bottom, part = _neighbours(height, size[0], x.device)
    first, second = columns[..., top, :], columns[..., bottom, :]
    return first + (second - first) * part[:, None]


def _neighbours(source: int, target: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The pixels on both sides of every target pixel, and how far it lies from the first; float32 as in TensorFlow."""
    position = torch.arange(target, dtype=torch.float32, device=device) * torch.tensor(
        source / target, dtype=torch.float32
    )
    low = position.long()
    return low, (low + 1).clamp_max(source - 1), position - low.to(torch.float32)


def torch_bilinear(x: Tensor, size: Size) -> Tensor:
    """PyTorch's bilinear with half-pixel centres and no antialiasing, as pytorch-fid has it. Any device, float."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def torch_bicubic(x: Tensor, size: Size, *, antialias: bool) -> Tensor:
    """PyTorch's bicubic in float32, neither rounded nor clamped. Any device, float.

    With antialiasing it is the fast mode of EDM2 (Karras et al., arXiv 2312.02696) for DINOv2; without, what the public
    PyTorch code of CMMD does (arXiv 2401.09603).
    """
    return F.interpolate(x, size=size, mode="bicubic", antialias=antialias, align_corners=False)


def pil_bicubic_float(image: Tensor, size: Size) -> Tensor:
    """Pillow's antialiased bicubic of each channel in float32, clamped to [0, 255], not rounded.

    The resizing of clean-fid (Parmar et al., arXiv 2104.11222). One image ``(C, H, W)`` on the CPU, to float32.
    """
    from PIL import Image

    found = np.empty((len(image), *size), np.float32)
    for plane, out in zip(image.numpy(), found, strict=True):
        resized = Image.fromarray(plane.astype(np.float32)).resize((size[1], size[0]), Image.Resampling.BICUBIC)
        np.clip(np.asarray(resized), 0, 255, out=out)
    return torch.from_numpy(found)


def pil_bicubic(image: Tensor, size: Size) -> Tensor:
    """Pillow's antialiased bicubic of an 8-bit RGB image, rounded to 8 bits. One uint8 image ``(3, H, W)`` on the CPU.

    What dgm-eval does before DINOv2 (Stein et al., arXiv 2306.04675).
    """
    from PIL import Image

    return from_pil(to_pil(image).resize((size[1], size[0]), Image.Resampling.BICUBIC))


def to_pil(image: Tensor) -> Image.Image:
    """A uint8 image ``(3, H, W)`` for Pillow."""
    from PIL import Image

    return Image.fromarray(image.numpy().transpose(1, 2, 0).copy())


def from_pil(image: Image.Image) -> Tensor:
    """An RGB image of Pillow as uint8 ``(3, H, W)``."""
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())
