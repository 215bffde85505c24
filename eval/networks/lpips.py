"""LPIPS: distance of two images in the features of a network, weighted to match human judgement (arXiv 1801.03924).

The weights have two parts: the linear heads, which torchmetrics ships, and an ImageNet backbone from torchvision.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from diffaccel.errors import DiffAccelError, size_text, unknown
from diffaccel.eval.metrics.paired import check_pair
from diffaccel.eval.networks import weights
from diffaccel.eval.networks.extractors.base import exact_float32
from diffaccel.files import sha256


@dataclass(frozen=True)
class Backbone:
    """Stack of convolutions, each padded to keep the size, with pooling between blocks.

    Attributes:
        file: torchvision's file name of its weights.
        blocks: convolutions of each block, as (index in ``features``, output channels, kernel size). The outputs of the
            last convolution of each block are compared.
        stem: stride and padding of the first convolution.
        pool: kernel size of the max pooling of stride 2.
        pooled: number of blocks that are followed by pooling.
        smallest: minimum height and width that leaves a pixel at the end.
    """

    file: str
    blocks: tuple[tuple[tuple[int, int, int], ...], ...]
    stem: tuple[int, int]
    pool: int
    pooled: int
    smallest: int


BACKBONES = {
    "alex": Backbone(
        "alexnet-owt-7be5be79.pth",
        (((0, 64, 11),), ((3, 192, 5),), ((6, 384, 3),), ((8, 256, 3),), ((10, 256, 3),)),
        stem=(4, 2), pool=3, pooled=2, smallest=31,
    ),
    "vgg": Backbone(
        "vgg16-397923af.pth",
        (
            ((0, 64, 3), (2, 64, 3)),
            ((5, 128, 3), (7, 128, 3)),
            ((10, 256, 3), (12, 256, 3), (14, 256, 3)),
            ((17, 512, 3), (19, 512, 3), (21, 512, 3)),
            ((24, 512, 3), (26, 512, 3), (28, 512, 3)),
        ),
        stem=(1, 1), pool=2, pooled=4, smallest=16,
    ),
}  # fmt: skip
MEAN, STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of images in [-1, 1]


class Lpips:
    """LPIPS of paired images: ``sum_l mean_hw w_l . (f_l(a) - f_l(b))^2``.

    ``f_l`` are activations of layer ``l`` normalised to length 1 over channels, ``w_l >= 0`` is the linear head.

    Args:
        backbone: a state dict of torchvision's ``alexnet`` or ``vgg16``; its classifier is ignored.
        net: "alex" (the usual choice in papers) or "vgg".
        device: device of the network, which computes in float32 without TF32 or autocast.
        weights_sha256: digest of the backbone's file, for reports.
        batch: pairs per forward pass.

    Raises:
        DiffAccelError: for an unknown net, or a state dict of another network.
    """

    def __init__(
        self,
        backbone: Mapping[str, Tensor],
        net: str = "alex",
        *,
        device: str | torch.device = "cpu",
        weights_sha256: str = "",
        batch: int = 8,
    ) -> None:
        if net not in BACKBONES:
            raise unknown("LPIPS network", net, BACKBONES)
        self.name, self.weights_sha256, self.batch = f"lpips-{net}", weights_sha256, batch
        self._backbone, self._device = BACKBONES[net], torch.device(device)
        self._convolutions = _convolutions(backbone, net, self._device)
        self._heads = [head.to(self._device) for head in _heads(net)]

    @torch.no_grad()
    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Compute the distance of each pair: uint8 ``(B, 3, H, W)`` to (B,) float64; 0 for identical images.

        Raises:
            DiffAccelError: unless both are uint8 of one shape, at least 31 (alex) or 16 (vgg) pixels a side.
        """
        check_pair(a, b)
        if min(a.shape[-2:]) < self._backbone.smallest:
            raise DiffAccelError(
                f"{self.name} needs images of at least {self._backbone.smallest} pixels a side, "
                f"got {size_text(*a.shape[-2:])}."
            )
        parts = []
        with exact_float32(self._device):
            for x, y in zip(a.split(self.batch), b.split(self.batch), strict=True):
                parts.append(self._distance(x.to(self._device), y.to(self._device)))
        return torch.cat(parts).cpu().to(torch.float64)

    def _distance(self, a: Tensor, b: Tensor) -> Tensor:
        total = torch.zeros(len(a), device=self._device)
        for x, y, head in zip(self._features(a), self._features(b), self._heads, strict=True):
            total += F.conv2d((x - y) ** 2, head).mean(dim=(1, 2, 3))
        return total

    def _features(self, images: Tensor) -> list[Tensor]:
        mean, std = (torch.tensor(v, device=self._device).view(1, 3, 1, 1) for v in (MEAN, STD))
        x = (images.to(torch.float32) / 127.5 - 1 - mean) / std
        features = []
        for number, block in enumerate(self._backbone.blocks):
            if 0 < number <= self._backbone.pooled:
                x = F.max_pool2d(x, self._backbone.pool, 2)
            for index, _, kernel in block:
                weight, bias = self._convolutions[index]
                stride, padding = self._backbone.stem if index == 0 else (1, kernel // 2)
                x = F.relu(F.conv2d(x, weight, bias, stride, padding))
            features.append(x / torch.sqrt((x * x).sum(1, keepdim=True) + 1e-8))
        return features


def load(path: str | Path | None = None, *, net: str = "alex", device: str | torch.device = "cpu") -> Lpips:
    """Load LPIPS with the backbone in ``path``, or from the places where :mod:`diffaccel.eval.networks.weights` looks.

    Raises:
        MissingWeights: if the backbone's file is not found.
        DiffAccelError: for a file of another network.
    """
    if net not in BACKBONES:
        raise unknown("LPIPS network", net, BACKBONES)
    file = weights.find(BACKBONES[net].file, path)
    return Lpips(weights.load(file), net, device=device, weights_sha256=sha256(file))


def _convolutions(state: Mapping[str, Tensor], net: str, device: torch.device) -> dict[int, tuple[Tensor, Tensor]]:
    """Take the weights and biases of the backbone's convolutions out of a state dict, and check their shapes."""
    convolutions, channels = {}, 3
    for index, out, kernel in (convolution for block in BACKBONES[net].blocks for convolution in block):
        weight, bias = (state.get(f"features.{index}.{part}") for part in ("weight", "bias"))
        shape = (out, channels, kernel, kernel)
        if weight is None or bias is None or weight.shape != shape or bias.shape != (out,):
            got = "nothing" if weight is None else str(tuple(weight.shape))
            raise DiffAccelError(
                f"These are not the weights of the '{net}' backbone: features.{index} must be {shape}, got {got}. "
                f"Give torchvision's {BACKBONES[net].file}."
            )
        if not (weight.isfinite().all() and bias.isfinite().all()):
            raise DiffAccelError(f"features.{index} of the '{net}' backbone has values that are not finite.")
        convolutions[index] = (weight.to(device, torch.float32), bias.to(device, torch.float32))
        channels = out
    return convolutions


def _heads(net: str) -> list[Tensor]:
    """Load the linear heads ``(1, C, 1, 1)`` that torchmetrics ships (BSD-2-Clause, Zhang et al.)."""
    package = importlib.util.find_spec("torchmetrics")
    if package is None or package.origin is None:
        raise DiffAccelError(
            "LPIPS takes its linear heads from torchmetrics, which is not installed: pip install torchmetrics"
        )
    file = Path(package.origin).parent / "functional" / "image" / "lpips_models" / f"{net}.pth"
    state = torch.load(file, map_location="cpu", weights_only=True)
    return [state[f"lin{i}.model.1.weight"].to(torch.float32) for i in range(len(BACKBONES[net].blocks))]
