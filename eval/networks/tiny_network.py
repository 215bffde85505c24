"""The embedded feature network ``tiny``: small, trained on procedural pictures, shipped with the package.

It serves Fréchet and kernel distances where no published network is available. Its distances are named after it and
compare only with each other. ``scripts/features`` trains it and measures its sensitivity to degradations.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffaccel.errors import DiffAccelError, size_text
from diffaccel.files import sha256

FORMAT = "1"
WEIGHTS = Path(str(files(__package__) / "tiny.safetensors"))


class Residual(nn.Module):
    """Residual block ``x -> relu(x + conv(relu(conv(x))))`` with 3x3 convolutions, ``(B, channels, H, W)``."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, hidden, 3, padding=1)
        self.second = nn.Conv2d(hidden, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        return F.relu(x + self.second(F.relu(self.first(x))))


class TinyNetwork(nn.Module):
    """Five strided and residual stages, averaged over space: pictures to ``(B, 192)`` features.

    It has only convolutions, biases and ReLU, so a row depends on its own picture alone.
    """

    size = 128  # side of the pictures after resizing, in pixels
    dim = 192

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(
            nn.Conv2d(3, 32, 5, stride=2, padding=2),
            nn.ReLU(),
            Residual(32, 32),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            Residual(64, 64),
            nn.Conv2d(64, 128, 3, stride=2, padding=1),
            nn.ReLU(),
            Residual(128, 128),
            nn.Conv2d(128, self.dim, 3, stride=2, padding=1),
            nn.ReLU(),
            Residual(self.dim, 64),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Compute features ``(B, 192)`` float32 of RGB pictures, uint8 ``(B, 3, H, W)`` of any size.

        Pictures become ``x / 127.5 - 1`` in float32; other sizes are then resized to 128x128, whatever their aspect
        ratio, by ``torch.nn.functional.interpolate(mode="bilinear", antialias=True, align_corners=False)``, without
        rounding.

        Raises:
            DiffAccelError: for another dtype or shape, or for pictures without pixels.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise DiffAccelError(
                f"The tiny network takes RGB pictures as uint8 (B, 3, H, W), but got {images.dtype} "
                f"{tuple(images.shape)}. Floats in [0, 1] become that by (x.clamp(0, 1) * 255).round().to(torch.uint8)."
            )
        if 0 in images.shape[2:]:
            raise DiffAccelError(f"The tiny network got pictures of {size_text(*images.shape[2:])} pixels.")
        return self.features(images.float() / 127.5 - 1)

    def features(self, x: Tensor) -> Tensor:
        """Compute features ``(B, 192)`` of pictures, float32 ``(B, 3, H, W)`` in [-1, 1], resized as by ``forward``."""
        if x.shape[2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True, align_corners=False)
        y: Tensor = self.stages(x)
        return y.mean((2, 3))


def load_tiny(path: Path = WEIGHTS) -> TinyNetwork:
    """Load the network with its packaged weights (or those of ``path``), float32 on the CPU, without gradients.

    Raises:
        DiffAccelError: for a file that is missing, damaged, or of another version of the network.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            version = (file.metadata() or {}).get("format")
            weights = {name: file.get_tensor(name).float() for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise DiffAccelError(
            f"The weights of the tiny network cannot be read from '{path}' ({error}); reinstall diffaccel."
        ) from error
    if version != FORMAT:
        raise DiffAccelError(f"'{path}' has format {version}; this version of diffaccel reads format {FORMAT}.")
    network = TinyNetwork()
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise DiffAccelError(f"'{path}' does not hold the tiny network's weights: {error}") from error
    return network.eval().requires_grad_(False)


def weights_sha256(path: Path = WEIGHTS) -> str:
    """Return the SHA-256 of the weights' file, 64 hex digits, which names the distances."""
    return sha256(path)
