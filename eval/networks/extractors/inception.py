"""The Inception network of 2015 that defines FID, built from torchvision's blocks.

It differs from torchvision's Inception-v3 in its classes (1008) and in the pooling inside blocks: averages do not count
the padding, and the last block takes the maximum (Heusel et al., arXiv 1706.08500, used that graph; the architecture is
arXiv 1512.00567).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models import inception as blocks

from diffaccel.errors import DiffAccelError, unknown
from diffaccel.eval.networks import resize, weights
from diffaccel.eval.networks.extractors.base import Extractor, frozen
from diffaccel.files import sha256

SIZE = (299, 299)
CLASSES = 1008
FLAG = "--extractor inception:/path/to/weights.pth"


def _average(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class _A(blocks.InceptionA):
    def _forward(self, x: Tensor) -> list[Tensor]:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return [self.branch1x1(x), self.branch5x5_2(self.branch5x5_1(x)), double, self.branch_pool(_average(x))]


class _C(blocks.InceptionC):
    def _forward(self, x: Tensor) -> list[Tensor]:
        single = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return [self.branch1x1(x), single, double, self.branch_pool(_average(x))]


class _E(blocks.InceptionE):
    pool: Callable[[Tensor], Tensor] = staticmethod(_average)

    def _forward(self, x: Tensor) -> list[Tensor]:
        single = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return [
            self.branch1x1(x),
            self.branch3x3_2a(single),
            self.branch3x3_2b(single),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(self.pool(x)),
        ]


class _LastE(_E):
    pool = staticmethod(partial(F.max_pool2d, kernel_size=3, stride=1, padding=1))


class InceptionNetwork(blocks.Inception3):
    """Network from normalised ``(B, 3, 299, 299)`` to a tap; it loads state dicts of torch-fidelity and pytorch-fid."""

    def __init__(self) -> None:
        convolution: Any = blocks.BasicConv2d
        kinds = [convolution, _A, blocks.InceptionB, _C, blocks.InceptionD, _E, blocks.InceptionAux]
        super().__init__(num_classes=CLASSES, aux_logits=False, init_weights=False, inception_blocks=kinds)
        self.Mixed_7c = _LastE(2048)

    def mixed_6d(self, x: Tensor) -> Tensor:
        """Compute the input of ``Mixed_6d``, ``(B, 768, 17, 17)``."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.maxpool2(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(self.maxpool1(x))))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        return self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))

    def pool3(self, x: Tensor) -> Tensor:
        """Compute the features of FID, ``(B, 2048)``."""
        return self._pool3(self.mixed_6d(x))

    def _pool3(self, x: Tensor) -> Tensor:
        x = self.Mixed_6e(self.Mixed_6d(x))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        return self.avgpool(x).flatten(1)

    def spatial(self, x: Tensor) -> Tensor:
        """Compute the features of sFID, ``(B, 17 * 17 * 7)``: 7 channels of the first branch of ``mixed_6``.

        Channels vary fastest, as in TensorFlow. Which point of that branch the evaluation of ADM (arXiv 2105.05233)
        reads is not verified against its numbers: the graph's node has the name of the branch's last operation, so the
        features are taken after the rectifier here.
        """
        return self._spatial(self.mixed_6d(x))

    def _spatial(self, x: Tensor) -> Tensor:
        return self.Mixed_6d.branch1x1(x)[:, :7].permute(0, 2, 3, 1).flatten(1)

    def both(self, x: Tensor) -> Tensor:
        """Compute :meth:`pool3` followed by :meth:`spatial`, in one pass."""
        x = self.mixed_6d(x)
        return torch.cat([self._pool3(x), self._spatial(x)], 1)

    def logits(self, features: Tensor, *, bias: bool) -> Tensor:
        """Compute logits ``(B, 1008)`` from pool3 features; public tools omit the bias for the Inception Score."""
        return F.linear(features, self.fc.weight, self.fc.bias if bias else None)


@dataclass(frozen=True)
class Tap:
    """Output of the network: its dimension, its function, and its suffix in keys."""

    dim: int
    features: Callable[[InceptionNetwork, Tensor], Tensor]
    suffix: str = ""


TAPS = {
    "pool3": Tap(2048, InceptionNetwork.pool3),
    "logits": Tap(CLASSES, lambda network, x: network.logits(network.pool3(x), bias=True), "-logits"),
    "logits_unbiased": Tap(CLASSES, lambda net, x: net.logits(net.pool3(x), bias=False), "-logits-unbiased"),
    "spatial": Tap(17 * 17 * 7, InceptionNetwork.spatial, "-spatial"),
    "both": Tap(2048 + 17 * 17 * 7, InceptionNetwork.both, "-both"),
}


def _tf(x: Tensor) -> Tensor:
    return (resize.tf1_bilinear(x, SIZE) - 128) / 128


def _torch(x: Tensor) -> Tensor:
    return 2 * resize.torch_bilinear(x.to(torch.float32) / 255, SIZE) - 1


def _clean(x: Tensor) -> Tensor:
    return (resize.pil_bicubic_float(x, SIZE) - 128) / 128


# from a batch of uint8 images on the device to the network's input
PREPROCESSING: dict[str, Callable[[Tensor], Tensor]] = {
    "tf1-bilinear-299": _tf,
    "torch-bilinear-299": _torch,
    "pil-bicubic-float-299": _clean,
}


@dataclass(kw_only=True)
class InceptionExtractor(Extractor):
    """Inception at one tap; it also computes logits of pool3 features, so FID and Inception Score share one pass."""

    inception: InceptionNetwork = field(repr=False)
    normalise: Callable[[Tensor], Tensor] = field(repr=False)
    tap: str = "pool3"

    def at(self, tap: str) -> InceptionExtractor:
        """Return the same network at another tap, with shared weights.

        Raises:
            DiffAccelError: for an unknown tap.
        """
        if tap not in TAPS:
            raise unknown("tap of Inception", tap, TAPS)
        output, network, normalise = TAPS[tap], self.inception, self.normalise
        return replace(
            self, tap=tap, name=f"inception{output.suffix}", dim=output.dim,
            key=_key(self.weights_sha256, self.official, tap, self.protocol),
            network=lambda x: output.features(network, normalise(x)),
        )  # fmt: skip

    def logits(self, features: Tensor, *, bias: bool = False) -> Tensor:
        """Compute logits ``(n, 1008)`` float32 on the CPU from pool3 features ``(n, 2048)``."""
        if self.tap != "pool3":
            raise DiffAccelError(f"Logits come from pool3 features; this extractor returns '{self.tap}'.")
        with torch.no_grad():
            return self.inception.logits(features.to(self.device, torch.float32), bias=bias).cpu()


def inception(
    path: str | os.PathLike[str] | None = None,
    *,
    preprocessing: str = "tf1-bilinear-299",
    protocol: str = "tf-fid",
    tap: str = "pool3",
    device: str | torch.device = "cpu",
    allow_unknown_weights: bool = False,
    download: bool = False,
) -> InceptionExtractor:
    """Build the Inception extractor, with weights from ``path`` or from the places where weights are searched for.

    Raises:
        MissingWeights: if no file is found.
        DiffAccelError: for a file with another sha256, unless unknown weights are allowed (then no key says "FID"), and
            for a file that is not a state dict of this network.
    """
    if tap not in TAPS:
        raise unknown("tap of Inception", tap, TAPS)
    if preprocessing not in PREPROCESSING:
        raise unknown("preprocessing of Inception", preprocessing, PREPROCESSING)
    file = weights.find("inception", path, download=download, flag=FLAG)
    sha = sha256(file)
    expected = weights.KNOWN["inception"].sha256
    official = sha.startswith(expected)
    key = _key(sha, official, tap, protocol)
    if not official and not allow_unknown_weights:
        raise DiffAccelError(
            f"'{file}' has sha256 {sha}, and the published Inception weights have {expected}...: its distance is not "
            f"FID. Give the published file, or --allow-unknown-weights, which names it {key}."
        )
    device, network = torch.device(device), _network(file)
    frozen(network, device)
    normalise = PREPROCESSING[preprocessing]
    output = TAPS[tap]
    return InceptionExtractor(
        name=f"inception{output.suffix}", key=key, dim=output.dim, weights_sha256=sha, official=official,
        protocol=protocol, device=device, module=network, inception=network, normalise=normalise, tap=tap,
        network=lambda x: output.features(network, normalise(x)),
    )  # fmt: skip


def _key(sha: str, official: bool, tap: str, protocol: str) -> str:
    """Return the key of the distance.

    It is FID for the published weights at pool3, sFID-unverified at the spatial tap, and FD-inception for others.
    """
    if not official:
        return f"FD-inception{TAPS[tap].suffix}(sha={sha[:8]})[{protocol}]"
    names = {"pool3": "FID", "spatial": "sFID-unverified"}
    return f"{names.get(tap, f'FD-inception{TAPS[tap].suffix}')}[{protocol}]"


def _network(file: Path) -> InceptionNetwork:
    """Load the network from a state dict."""
    with torch.device("meta"):  # initialisation takes longer than reading the file
        network = InceptionNetwork()
    state = weights.load(file)
    try:
        network.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        lines = str(error).splitlines()
        raise DiffAccelError(
            f"'{file}' is not a state dict of the Inception network of 2015 ({' '.join(lines[1:3]).strip()[:200]}). "
            f"Give the file {weights.KNOWN['inception'].files[0]}."
        ) from error
    return network
