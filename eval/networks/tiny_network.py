"""The embedded feature network ``tiny``: small, trained on procedural pictures, and always at hand.

It gives the Fréchet and kernel distances something to look at where no published network can be had. Its distances are
named after it and compare with nothing but themselves. ``scripts/features`` trains it and measures what it notices.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffaccel.errors import DiffAccelError
from diffaccel.files import sha256

FORMAT = "1"
WEIGHTS = Path(str(files(__package__) / "tiny.safetensors"))


class Residual(nn.Module):
    """``x -> relu(x + conv(relu(conv(x))))`` with 3x3 convolutions, ``(B, channels, H, W)``."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, hidden, 3, padding=1)
        self.second = nn.Conv2d(hidden, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(F.relu(self.first(x))))


class TinyNetwork(nn.Module):
    """Five strided and residual stages, averaged over space: pictures to ``(B, 192)`` features.

    Only convolutions, biases and ReLU, so a row depends on its own picture alone.
    """

    size = 128  # pixels of a side that the convolutions see
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
        """Features ``(B, 192)`` float32 of RGB pictures, uint8 ``(B, 3, H, W)`` of any size.

        Pictures become ``x / 127.5 - 1`` in float32; those of other sizes are then brought to 128x128, whatever their
        proportions, by ``torch.nn.functional.interpolate(mode="bilinear", antialias=True, align_corners=False)``, and
        are not rounded.

        Raises:
            DiffAccelError: for another dtype or shape, or for pictures without pixels.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise DiffAccelError(
                f"The tiny network takes RGB pictures as uint8 (B, 3, H, W), but got {images.dtype} "
                f"{tuple(images.shape)}. Floats in [0, 1] become that by (x.clamp(0, 1) * 255).round().to(torch.uint8)."
            )
        if 0 in images.shape[2:]:
            raise DiffAccelError(f"The tiny network got pictures of {images.shape[3]}x{images.shape[2]} pixels.")
        return self.features(images.float() / 127.5 - 1)

    def features(self, x: Tensor) -> Tensor:
        """Features ``(B, 192)`` of float32 pictures ``(B, 3, H, W)`` in [-1, 1]: resized as in :meth:`forward`."""
        if x.shape[2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True, align_corners=False)
        y: Tensor = self.stages(x)
        return y.mean((2, 3))


def load_tiny(path: Path = WEIGHTS) -> TinyNetwork:
    """The network with its packaged weights (or those of ``path``), float32 on the CPU, without gradients.

    Raises:
        DiffAccelError: for a file that is missing, damaged, or made for another version of the network.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            made_for = (file.metadata() or {}).get("format")
            weights = {name: file.get_tensor(name).float() for name in file.keys()}
    except (OSError, SafetensorError) as error:
        raise DiffAccelError(
            f"The weights of the tiny network cannot be read from '{path}' ({error}); reinstall diffaccel."
        ) from error
    if made_for != FORMAT:
        raise DiffAccelError(f"'{path}' has format {made_for}; this version of diffaccel reads format {FORMAT}.")
    network = TinyNetwork()
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise DiffAccelError(f"'{path}' does not hold the tiny network's weights: {error}") from error
    return network.eval().requires_grad_(False)


def weights_sha256(path: Path = WEIGHTS) -> str:
    """SHA-256 of the weights' file, 64 hex digits: what a distance is named after."""
    return sha256(path)
