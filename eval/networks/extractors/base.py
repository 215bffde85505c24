"""What every feature extractor is: a name, a key for reports, and a function from uint8 images to float32 features."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from diffaccel.errors import DiffAccelError


@dataclass(kw_only=True)
class Extractor:
    """A network that turns images into features, with everything that decides them.

    ``extractor(images)`` takes uint8 ``(B, 3, H, W)`` on any device and returns float32 ``(B, dim)`` on its own.

    Attributes:
        name: of the network and its weights, for records.
        key: what a report calls the Fréchet distance of these features. "FID" stands in it only for the Inception
            network of 2015 with weights whose sha256 was verified; all others are "FD-<name>".
        dim: of a feature.
        weights_sha256: of the weights' file.
        official: whether the weights are the published ones.
        protocol: the preprocessing, by the name of its protocol, or "own" for the network's.
        network: from what ``prepare`` returned, batched, on ``device``.
        prepare: one image ``(3, H, W)`` on the CPU to what the network takes; None where it takes the image itself.
            It may run in several threads.
        device: of the network.
        module: the network's parameters, where it has any.
    """

    name: str
    key: str
    dim: int
    weights_sha256: str
    official: bool
    network: Callable[[Tensor], Tensor] = field(repr=False)
    prepare: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)
    protocol: str = "own"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    module: nn.Module | None = field(default=None, repr=False)

    def __call__(self, images: Tensor) -> Tensor:
        """Features of uint8 images.

        Raises:
            DiffAccelError: for images of another dtype or shape, and for a network that returns another shape.
        """
        check_images(images)
        if self.prepare is not None:
            images = torch.stack([self.prepare(image) for image in images.cpu()])
        return self.features(images)

    def features(self, prepared: Tensor) -> Tensor:
        """Features of images that went through ``prepare``, in float32 without TF32 or autocast."""
        with torch.no_grad(), exact_float32(self.device):
            # strides are kept on the way to the device; the copy to standard ones is cheap there
            found = self.network(to_device(prepared, self.device).contiguous())
        if found.ndim != 2 or found.shape != (len(prepared), self.dim):
            raise DiffAccelError(
                f"The extractor '{self.name}' returned features of shape {tuple(found.shape)} for {len(prepared)} "
                f"images; expected ({len(prepared)}, {self.dim})."
            )
        return found.to(torch.float32)


def to_device(images: Tensor, device: torch.device) -> Tensor:
    """Without waiting for what the device still does: a copy from memory that is not pinned would."""
    if device.type == "cuda" and images.device.type == "cpu":
        images = images.pin_memory()
    return images.to(device, non_blocking=True)


def check_images(images: Tensor) -> None:
    """Refuse all but uint8 ``(B, 3, H, W)``: the range of floats cannot be guessed."""
    if images.dtype != torch.uint8:
        raise DiffAccelError(
            f"Extractors take uint8 images; got {images.dtype}. Convert them with "
            "diffaccel.eval.images.source.to_uint8, which asks for the range."
        )
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
        raise DiffAccelError(f"Extractors take images of shape (B, 3, H, W); got {tuple(images.shape)}.")


@contextlib.contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """float32 convolutions and products of matrices as such: no TF32, no bfloat16 inside, no autocast; restored after.

    cuDNN's convolutions use TF32 by default, which keeps 10 bits of the mantissa.
    """
    backends: Any = torch.backends
    switches = [
        backends.cudnn.conv,
        backends.cudnn.rnn,
        backends.cuda.matmul,
        backends.mkldnn.conv,
        backends.mkldnn.rnn,
        backends.mkldnn.matmul,
    ]
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision


def frozen(module: nn.Module, device: torch.device) -> nn.Module:
    """For inference, in float32, on ``device``."""
    return module.eval().requires_grad_(False).to(device, torch.float32)
