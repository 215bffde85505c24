"""Fashion-MNIST from the files of its distribution: uint8 pictures 28x28 and labels 0 to 9."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from diffaccel.errors import DiffAccelError, first_line

CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
SIDE, PADDED = 28, 32
_MARGIN = (PADDED - SIDE) // 2


@dataclass(frozen=True)
class Pictures:
    """A part of the data on one device: images ``(N, 28, 28)`` uint8, labels ``(N,)``."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def read_idx(path: Path) -> np.ndarray:
    """Return the array of an idx file of unsigned bytes, compressed by gzip or not.

    Raises:
        DiffAccelError: for a file that is missing, damaged, or of another kind.
    """
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except FileNotFoundError as error:
        raise DiffAccelError(
            f"'{path}' is missing; make it with: python -m scripts.zoo.fashion.fetch --data {path.parent}"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise DiffAccelError(f"'{path}' is damaged ({first_line(error, 90)}); fetch it again.") from error
    axes = data[3] if len(data) > 3 else 0
    if data[:3] != b"\x00\x00\x08" or len(data) < 4 + 4 * axes:
        raise DiffAccelError(f"'{path}' is no idx file of bytes; fetch it again.")
    shape = tuple(int(n) for n in np.frombuffer(data, ">u4", axes, 4))
    if len(data) - 4 - 4 * axes != math.prod(shape):
        raise DiffAccelError(f"'{path}' does not hold the {shape} numbers that it names; fetch it again.")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape)


def load(folder: Path, part: str, device: torch.device | str) -> Pictures:
    """Return "train" or "t10k" (the test set) of a folder."""
    arrays = []
    for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
        plain = folder / f"{part}-{kind}"
        arrays.append(read_idx(plain if plain.is_file() else plain.with_name(f"{plain.name}.gz")))
    images, labels = (torch.from_numpy(array.copy()) for array in arrays)
    if images.ndim != 3 or images.shape[1:] != (SIDE, SIDE) or len(images) != len(labels) or int(labels.max()) > 9:
        raise DiffAccelError(f"'{folder}' has {tuple(images.shape)} pictures and {len(labels)} labels of '{part}'.")
    return Pictures(images.to(device), labels.long().to(device))


def of_classes(part: Pictures, classes: Sequence[int]) -> Pictures:
    """Return the pictures of some classes."""
    is_chosen = torch.isin(part.labels, torch.tensor(classes, dtype=torch.long, device=part.labels.device))
    return Pictures(part.images[is_chosen], part.labels[is_chosen])


def one_of_each(part: Pictures, count: int) -> Tensor:
    """Return pictures of classes 0, 1, ..., 9, 0, 1, ... in turn, the first of each class first."""
    places = [(part.labels == n % len(CLASSES)).nonzero().flatten() for n in range(count)]
    return part.images[torch.stack([place[n // len(CLASSES)] for n, place in enumerate(places)])]


def to_unit(images: Tensor) -> Tensor:
    """Return images ``(N, 28, 28)`` as ``(N, 1, 28, 28)`` in [-1, 1]."""
    return images[:, None].float() / 127.5 - 1


def padded(images: Tensor) -> Tensor:
    """Return images as ``(N, 1, 32, 32)`` in [-1, 1], with a margin of -1: what the UNet draws."""
    return F.pad(to_unit(images), (_MARGIN,) * 4, value=-1.0)


def to_images(drawn: Tensor) -> Tensor:
    """Return drawings ``(N, 1, 32, 32)`` as images ``(N, 28, 28)`` of 8 bits."""
    inner = drawn[:, 0, _MARGIN:-_MARGIN, _MARGIN:-_MARGIN]
    return ((inner.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
