"""A network's own preprocessing, cut in two: what Pillow does to an image, and the arithmetic that any device does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchvision import transforms

from diffaccel.errors import DiffAccelError
from diffaccel.eval.networks import resize


def split(transform: Any, size: resize.Size) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """``(prepare, normalise)`` of a torchvision ``Compose`` that ends in ToTensor and Normalize.

    ``normalise(prepare(image)[None])`` is to the bit what the transform makes of the image: up to the last two steps it
    is the transform itself, and these are ``(x / 255 - mean) / std`` in float32. Where the transform leaves images
    of the network's own size as they are, these skip Pillow.

    Raises:
        DiffAccelError: for a transform that ends in anything else.
    """
    steps = list(getattr(transform, "transforms", []))
    if len(steps) < 2 or not isinstance(steps[-1], transforms.Normalize) or "ToTensor" not in type(steps[-2]).__name__:
        raise DiffAccelError(f"A preprocessing must end in ToTensor and Normalize; got {transform}.")
    before = transforms.Compose(steps[:-2])

    def pillow(image: Tensor) -> Tensor:
        return resize.from_pil(before(resize.to_pil(image)))

    noise = torch.randint(0, 256, (3, *size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    keeps = torch.equal(pillow(noise), noise)  # a crop after a resize would not

    def prepare(image: Tensor) -> Tensor:
        return image if keeps and tuple(image.shape[1:]) == size else pillow(image)

    return prepare, normalise(steps[-1].mean, steps[-1].std)


def normalise(mean: Any, std: Any) -> Callable[[Tensor], Tensor]:
    """``(x / 255 - mean) / std`` by channel, of images ``(B, 3, H, W)`` in [0, 255]."""
    centre, scale = (torch.as_tensor(value, dtype=torch.float32).view(3, 1, 1) for value in (mean, std))

    def apply(x: Tensor) -> Tensor:
        return (x.to(torch.float32) / 255 - centre.to(x.device)) / scale.to(x.device)

    return apply
