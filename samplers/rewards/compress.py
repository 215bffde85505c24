"""How small a picture's JPEG is: a reward without a network, whose best pictures can be seen to be right."""

from __future__ import annotations

import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.samplers.rewards.reward import Reward

QUALITY = 95


def reward(argument: str, device: torch.device, model: str) -> Reward:
    """``-bytes / 1000`` of the JPEG, the compressibility of DDPO (Black et al., arXiv 2305.13301).

    Prompts do not count.

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
        from torchvision.io import encode_jpeg

        pixels = (images.clamp(0, 1) * 255).round().to(torch.uint8)
        sizes = [encode_jpeg(image.contiguous(), quality=quality).numel() for image in pixels]
        return torch.tensor(sizes, dtype=torch.float64) / -1000

    name = f"compress:{argument}" if argument else "compress"
    return Reward(name=name, function=kilobytes, device=torch.device("cpu"))
