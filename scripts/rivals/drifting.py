"""Drifting (arXiv 2602.04770): drawings drift towards real pictures of their class and away from each other.

    V(x) = sum over (y+, y-) of k+(x, y+) k-(x, y-) (y+ - y-)          loss = |f(x) - constant(f(x) + V)|^2

in spaces ``f`` of features, each a loss of its own. ``k = exp(-|x - y| / (tau m))`` with the mean distance ``m``, all
of them normalised over what ``x`` sees and over what sees ``y``, by the geometric mean of the two. The features are
those of a classifier that learns inside the same seconds from another seed: not the judge's, though near to them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffaccel.distill import SIMOneStepScheduler
from diffaccel.errors import DiffAccelError
from diffaccel.training.loop import Deadline
from scripts.rivals.bed import Bed, Rival, Try
from scripts.zoo.emoji.export import training_state
from scripts.zoo.fashion import classifier
from scripts.zoo.fashion.data import CLASSES, PADDED, SIDE

_TAUS = (0.02, 0.05, 0.2)
_SELF = 1e6  # distance of a drawing to itself, so that it does not flee from where it is
_MARGIN = (PADDED - SIDE) // 2
_ENCODER_SEED = 7000  # far from those of the judge


def field(x: Tensor, positives: Tensor, negatives: Tensor, tau: float, own: bool = False) -> Tensor:
    """Return the drift of points.

    Args:
        x: ``(K, n, C)``, of K classes apart.
        positives, negatives: ``(K, m, C)`` points that attract and repel.
        tau: width of the kernel.
        own: whether the negatives are the points themselves, which do not see themselves.
    """
    distances = torch.cdist(x, torch.cat([positives, negatives], 1))
    if own:
        count, first = x.shape[1], positives.shape[1]
        itself = _SELF * torch.eye(count, dtype=x.dtype, device=x.device)
        distances = torch.cat([distances[..., :first], distances[..., first:] + itself], -1)
    logits = -distances / tau
    affinity = (0.5 * (logits.log_softmax(-1) + logits.log_softmax(-2))).exp()  # geometric mean of both
    towards, away = affinity.split([positives.shape[1], negatives.shape[1]], -1)
    repelled = (towards * away.sum(-1, keepdim=True)) @ positives
    return repelled - (away * towards.sum(-1, keepdim=True)) @ negatives


@torch.no_grad()
def drifted(x: Tensor, positives: Tensor) -> tuple[Tensor, Tensor]:
    """Return where points of one feature space ``(K, n, C)`` are to be, and the factor of that space.

    Features are scaled so that the mean distance is ``sqrt(C)``, and the drift of every width so that its mean square
    a coordinate is 1.
    """
    root = x.shape[-1] ** 0.5
    seen = torch.cat([torch.cdist(x, positives), torch.cdist(x, x)], -1)
    factor = root / seen.mean().clamp_min(1e-8)
    x, positives = x * factor, positives * factor
    whole = torch.zeros_like(x)
    for tau in _TAUS:
        drift = field(x, positives, x, tau * root, own=True)
        whole += drift / drift.square().mean().sqrt().clamp_min(1e-8)
    return x + whole, factor


def spaces(encoder: classifier.Classifier, x: Tensor) -> list[Tensor]:
    """Return features ``(B, C)`` of padded pictures: pixels, the encoder's maps in patches, and its last layer."""
    x = x[:, :, _MARGIN:-_MARGIN, _MARGIN:-_MARGIN]
    found = [F.adaptive_avg_pool2d(x, 7).flatten(1)]
    for layer in encoder.body:
        x = layer(x)
        if isinstance(layer, nn.MaxPool2d):
            spread = (x.var((2, 3)) + 1e-6).sqrt()  # with a slope where a map is constant
            found += [F.adaptive_avg_pool2d(x, 3).flatten(1), torch.cat([x.mean((2, 3)), spread], 1)]
    return [*found, x]


def distance(drawn: list[Tensor], real: list[Tensor]) -> Tensor:
    """Return the sum over spaces of the mean square distance to where drawings are to drift; rows lie by class."""
    total = torch.zeros((), dtype=drawn[0].dtype, device=drawn[0].device)
    for of_drawn, of_real in zip(drawn, real, strict=True):
        x, positives = (part.view(len(CLASSES), -1, part.shape[-1]) for part in (of_drawn, of_real))
        goal, factor = drifted(x.detach(), positives)
        total = total + (x * factor - goal).square().mean()
    return total


class Drifting(Rival):
    """Drifting from scratch, under labels, without guidance."""

    name = "drifting"

    def prepare(self, bed: Bed, root: Path, seed: int, deadline: Deadline) -> bool:
        """Train the classifier whose features are drifted in."""
        return classifier.train(bed.data, bed.fashion, root, deadline=deadline, seed=seed + _ENCODER_SEED).finished

    def prepared(self, root: Path) -> float:
        return float(training_state(root / f"{classifier.NAME}.safetensors")["seconds"])

    def scheduler(self, bed: Bed) -> SIMOneStepScheduler:
        return SIMOneStepScheduler(0.0, 1.0, 1000.0, "sample")  # the network's output is the picture

    def loss_of(self, bed: Bed, network: nn.Module, one: Try) -> Callable[[torch.Generator], tuple[Tensor, int]]:
        encoder = classifier.load(one.folder.parent, bed.fashion, bed.device)
        if encoder is None:
            raise DiffAccelError(f"'{one.folder.parent}' has no classifier; prepare() makes it.")
        labels = torch.arange(len(CLASSES), device=bed.device).repeat_interleave(bed.recipe.a_class)
        level = torch.full((len(labels),), 1000.0, device=bed.device)

        def loss(generator: torch.Generator) -> tuple[Tensor, int]:
            z = torch.randn((len(labels), 1, PADDED, PADDED), generator=generator, device=bed.device)
            with bed.autocast():
                x = network(z, level, class_labels=labels, return_dict=False)[0]
            with torch.no_grad():
                real = spaces(encoder, bed.real(labels, generator))
            return distance(spaces(encoder, x.float()), real), len(labels)

        return loss
