"""The ``Extractor`` of features: a name, a key for reports, and a function from uint8 images to float32 features."""

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
    """Network from images to features, with everything that determines them.

    ``extractor(images)`` takes uint8 ``(B, 3, H, W)`` on any device and returns float32 ``(B, dim)`` on its own device.

    Attributes:
        name: network and weights, for records.
        key: name of the Fréchet distance of these features in reports. It contains "FID" only for the Inception
            network of 2015 with weights whose sha256 was verified; all others are "FD-<name>".
        dim: number of features.
        weights_sha256: digest of the weights' file.
        official: whether the weights are the published ones.
        protocol: name of the protocol that sets the preprocessing, or "own" for the network's own.
        network: from a batch of prepared images on ``device`` to features.
        prepare: from one image ``(3, H, W)`` on the CPU to the input of the network; None where that is the image
            itself. It may run in several threads.
        device: device of the network.
        module: the module that holds the network's parameters, if there is one.
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
        """Compute the features of uint8 images.

        Raises:
            DiffAccelError: for images of another dtype or shape, and for a network with another output shape.
        """
        check_images(images)
        if self.prepare is not None:
            images = torch.stack([self.prepare(image) for image in images.cpu()])
        return self.features(images)

    def features(self, prepared: Tensor) -> Tensor:
        """Compute the features of prepared images, in float32 without TF32 or autocast."""
        with torch.no_grad(), exact_float32(self.device):
            # the transfer keeps strides; the copy to standard ones is cheap on the device
            features = self.network(to_device(prepared, self.device).contiguous())
        if features.ndim != 2 or features.shape != (len(prepared), self.dim):
            raise DiffAccelError(
                f"The extractor '{self.name}' returned features of shape {tuple(features.shape)} for {len(prepared)} "
                f"images; expected ({len(prepared)}, {self.dim})."
            )
        return features.to(torch.float32)


def to_device(images: Tensor, device: torch.device) -> Tensor:
    """Move images to a device without waiting for its queue, as a copy from memory that is not pinned would."""
    if device.type == "cuda" and images.device.type == "cpu":
        images = images.pin_memory()
    return images.to(device, non_blocking=True)


def check_images(images: Tensor) -> None:
    """Raise for anything but uint8 ``(B, 3, H, W)``, since the range of floats cannot be guessed."""
    if images.dtype != torch.uint8:
        raise DiffAccelError(
            f"Extractors take uint8 images; got {images.dtype}. Convert them with "
            "diffaccel.eval.images.source.to_uint8, which asks for the range."
        )
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
        raise DiffAccelError(f"Extractors take images of shape (B, 3, H, W); got {tuple(images.shape)}.")


@contextlib.contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Compute float32 convolutions and matrix products exactly: no TF32, no bfloat16, no autocast; restored on exit.

    cuDNN's convolutions use TF32 by default, which has a mantissa of 10 bits.
    """
    backends: Any = torch.backends
    settings = [
        backends.cudnn.conv,
        backends.cudnn.rnn,
        backends.cuda.matmul,
        backends.mkldnn.conv,
        backends.mkldnn.rnn,
        backends.mkldnn.matmul,
    ]
    precisions = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for setting, precision in zip(settings, precisions, strict=True):
            setting.fp32_precision = precision


def frozen(module: nn.Module, device: torch.device) -> nn.Module:
    """Prepare a module for inference in float32 on ``device``, in place."""
    return module.eval().requires_grad_(False).to(device, torch.float32)
