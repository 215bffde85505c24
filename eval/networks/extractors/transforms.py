"""Split a network's own preprocessing: image operations by Pillow, and arithmetic that runs on any device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchvision import transforms

from diffaccel.errors import DiffAccelError
from diffaccel.eval.networks import resize


def split(transform: Any, size: resize.Size) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Split a torchvision ``Compose`` that ends in ToTensor and Normalize into ``(prepare, normalise)``.

    ``normalise(prepare(image)[None])`` equals the transform to the bit: ``prepare`` runs all but its last two steps,
    and ``normalise`` is ``(x / 255 - mean) / std`` in float32. Where the transform does not change images of the
    network's own size, those skip Pillow.

    Raises:
        DiffAccelError: for a transform with another end.
    """
    steps = list(getattr(transform, "transforms", []))
    if len(steps) < 2 or not isinstance(steps[-1], transforms.Normalize) or "ToTensor" not in type(steps[-2]).__name__:
        raise DiffAccelError(f"A preprocessing must end in ToTensor and Normalize; got {transform}.")
    before = transforms.Compose(steps[:-2])

    def pillow(image: Tensor) -> Tensor:
        return resize.from_pil(before(resize.to_pil(image)))

    noise = torch.randint(0, 256, (3, *size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    unchanged = torch.equal(pillow(noise), noise)  # false for a crop after a resize

    def prepare(image: Tensor) -> Tensor:
        return image if unchanged and tuple(image.shape[1:]) == size else pillow(image)

    return prepare, normalise(steps[-1].mean, steps[-1].std)


def normalise(mean: Any, std: Any) -> Callable[[Tensor], Tensor]:
    """Build ``(x / 255 - mean) / std`` by channel, for images ``(B, 3, H, W)`` in [0, 255]."""
    centre, scale = (torch.as_tensor(value, dtype=torch.float32).view(3, 1, 1) for value in (mean, std))

    def apply(x: Tensor) -> Tensor:
        return (x.to(torch.float32) / 255 - centre.to(x.device)) / scale.to(x.device)

    return apply
