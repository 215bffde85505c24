"""Numbers of what a network draws: Fréchet distance of the classifier's features, labels obeyed, and a sheet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor

from diffaccel.eval.metrics import frechet
from diffaccel.files import write_png
from scripts.zoo.fashion import unet
from scripts.zoo.fashion.classifier import Classifier, look
from scripts.zoo.fashion.data import CLASSES, Pictures, to_images

_SEED = 1_000_003  # of noise; the chunks of a set follow it


class Scorer:
    """Reference statistics of the training set, and the floor: the distance of the test set to it.

    Args:
        count: pictures drawn of a model, as many of each class.
        at_once: of them in one batch.
    """

    def __init__(
        self, network: Classifier, train: Pictures, test: Pictures, count: int, at_once: int, dtype: torch.dtype
    ) -> None:
        self.network, self.count, self.at_once, self.dtype = network, count, at_once, dtype
        features, _ = look(network, train.images)
        self.reference = frechet.gaussian(features)
        of_test, classes = look(network, test.images)
        self.floor = frechet.between(frechet.gaussian(of_test), self.reference)
        self.accuracy = float((classes == test.labels.cpu()).double().mean())

    def images(self, network: UNet2DModel, scheduler: Any, steps: int, count: int) -> tuple[Tensor, Tensor]:
        """Return images ``(N, 28, 28)`` on the network's device, and the labels asked for."""
        labels = torch.arange(count, device="cpu") % len(CLASSES)
        drawn = [
            to_images(unet.draw(network, scheduler, part, steps, _SEED + number, self.dtype))
            for number, part in enumerate(labels.split(self.at_once))
        ]
        return torch.cat(drawn), labels

    def score(self, network: UNet2DModel, scheduler: Any, steps: int, count: int | None = None) -> dict[str, float]:
        """Return the distance to the training set, and the share of pictures of the class asked for."""
        images, labels = self.images(network, scheduler, steps, count or self.count)
        features, classes = look(self.network, images)
        distance = frechet.between(frechet.gaussian(features), self.reference)
        return {"fd": round(distance, 4), "obeyed": round(float((classes == labels).double().mean()), 4)}


def ratio(student: float, teacher: float, floor: float) -> float | None:
    """Return ``(student - floor) / (teacher - floor)``; None where the teacher is at the floor."""
    return round((student - floor) / (teacher - floor), 3) if teacher > floor else None


def sheet(path: Path, rows: Sequence[Tensor], columns: int = 20) -> None:
    """Save the first images of every set ``(N, 28, 28)`` as one row of a picture."""
    from PIL import Image

    cells = [torch.cat([*images[:columns].cpu()], dim=1) for images in rows]
    write_png(path, Image.fromarray(torch.cat(cells).numpy()).resize((28 * 2 * columns, 28 * 2 * len(rows))))
