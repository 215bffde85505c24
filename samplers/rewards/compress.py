"""Size of a picture's JPEG: a reward without a network, whose optimum is plain to see."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.samplers.rewards.reward import Reward

QUALITY = 95


def reward(argument: str, device: torch.device, model: str) -> Reward:
    """Score by ``-bytes / 1000`` of the JPEG, the compressibility of DDPO (Black et al., arXiv 2305.13301).

    Args:
        argument: the JPEG's quality, 1 to 100; "" for 95.
        device: not used: JPEGs are made on the CPU, where the same picture has the same size on every machine.
        model: not used.

    Raises:
        DiffAccelError: for another quality.
    """
    if argument and not (argument.isascii() and argument.isdigit() and 1 <= int(argument) <= 100):
        raise DiffAccelError(f"The JPEG quality of compress is '{argument}'; it must be 1 to 100, as in compress:90.")
    quality = int(argument or QUALITY)

    def kilobytes(images: Tensor, prompts: list[str]) -> Tensor:
        pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
        sizes = [_size(picture.numpy(), quality) for picture in pixels]
        return torch.tensor(sizes, dtype=torch.float64, device="cpu") / -1000

    name = f"compress:{argument}" if argument else "compress"
    return Reward(name=name, function=kilobytes, device=torch.device("cpu"))


def _size(picture: np.ndarray, quality: int) -> int:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=quality)
    return buffer.tell()
