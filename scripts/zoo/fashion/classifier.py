"""The classifier of Fashion-MNIST whose features before the last layer judge drawings."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from diffaccel.training.checkpoint import averages
from diffaccel.training.loop import Deadline, TrainingRun
from diffaccel.training.steps import computing
from scripts.zoo.fashion.data import CLASSES, Pictures, to_unit
from scripts.zoo.fashion.recipe import FashionRecipe

NAME = "classifier"
_SHIFT = 2  # pixels by which a picture is moved in training, at most


class Classifier(nn.Module):
    """Five convolutions with group norms, one layer of features ``(B, features)``, one of classes."""

    def __init__(self, width: int, features: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 1
        for wide, count in ((width, 2), (2 * width, 2), (2 * width, 1)):
            for _ in range(count):
                layers += [nn.Conv2d(channels, wide, 3, padding=1), nn.GroupNorm(4, wide), nn.GELU()]
                channels = wide
            layers.append(nn.MaxPool2d(2))
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * 9, features), nn.GELU())
        self.head = nn.Linear(features, len(CLASSES))

    def features(self, x: Tensor) -> Tensor:
        """Return features of pictures ``(B, 1, 28, 28)`` in [-1, 1]."""
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def build(recipe: FashionRecipe, seed: int) -> Classifier:
    """Return a classifier with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Classifier(recipe.classifier_width, recipe.features)


def train(data: Pictures, recipe: FashionRecipe, work: Path, *, deadline: Deadline, seed: int = 0) -> TrainingRun:
    """Train, or go on with, ``work/classifier.safetensors``, on mirrored and moved pictures."""
    device = data.images.device
    network = build(recipe, seed).to(device)
    run = TrainingRun(
        work, NAME, {"network": network}, recipe.classifier, seed=seed + 1, deadline=deadline, device=device,
        tell=partial(print, flush=True),
    )  # fmt: skip
    for _ in run:
        rows = torch.randint(len(data), (recipe.classifier_batch,), generator=run.generator, device=device)
        x = _moved(to_unit(data.images[rows]), run.generator)
        with computing(device, torch.bfloat16 if device.type == "cuda" else torch.float32):
            logits = network(x)
        loss = nn.functional.cross_entropy(logits.float(), data.labels[rows], label_smoothing=0.05)
        run.update(loss, recipe.classifier_batch)
    return run


def _moved(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return pictures, half of them mirrored, the batch moved by up to two pixels."""
    mirrored = torch.rand(len(x), generator=generator, device=x.device) < 0.5
    x = torch.where(mirrored[:, None, None, None], x.flip(-1), x)
    side = x.shape[-1]
    corner = torch.randint(2 * _SHIFT + 1, (2, len(x)), generator=generator, device=x.device)
    wide = nn.functional.pad(x, (_SHIFT,) * 4, value=-1.0)
    steps = torch.arange(side, device=x.device)
    rows, columns = (corner[axis][:, None] + steps for axis in range(2))
    return wide[torch.arange(len(x), device=x.device)[:, None, None], 0, rows[:, :, None], columns[:, None, :]][:, None]


def load(work: Path, recipe: FashionRecipe, device: torch.device) -> Classifier | None:
    """Return the averaged network of a work folder, rounded to float16 as it is shipped; None where there is none."""
    file = work / f"{NAME}.safetensors"
    if not file.is_file():
        return None
    network = build(recipe, 0)
    network.load_state_dict({name: value.half().float() for name, value in averages(file, "network.").items()})
    return network.to(device).eval().requires_grad_(False)


@torch.no_grad()
def look(network: Classifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return features ``(N, features)`` and classes ``(N,)`` of images ``(N, 28, 28)`` of 8 bits, in float32."""
    features, classes = [], []
    for part in images.split(2000):
        found = network.features(to_unit(part))
        features.append(found.cpu())
        classes.append(network.head(found).argmax(1).cpu())
    return torch.cat(features), torch.cat(classes)
