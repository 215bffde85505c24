"""CLIP score: how well images fit their prompts, and each other, in the features of a CLIP.

A CLIP is any object like :class:`TextImageModel`. Print the convention beside a number: a cosine of 0.31 is 31 by
:func:`clip_score`, and 0.775 as ``2.5 max(cos, 0)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.eval.metrics.paired import check_images


class TextImageModel(Protocol):
    """Network with image and text features in one space, and a count of the texts that it truncates."""

    @property
    def name(self) -> str:
        """Network and weights, as metric keys show them."""
        ...

    def __call__(self, images: Tensor) -> Tensor:
        """Return features ``(B, d)`` of uint8 images ``(B, 3, H, W)``."""
        ...

    def texts(self, texts: list[str]) -> Tensor:
        """Return features ``(n, d)`` of texts."""
        ...

    def truncated(self, texts: list[str]) -> int:
        """Count the texts that are longer than the network's context."""
        ...


@dataclass(frozen=True)
class Alignment:
    """CLIP scores of images and their prompts.

    Attributes:
        key: metric and network, such as ``clip_score[ViT-L-14/openai]``.
        values: (n,) float64, one per image.
        truncated: number of images whose prompt was truncated.
    """

    key: str
    values: Tensor
    truncated: int


def clip_score(image_features: Tensor, text_features: Tensor) -> Tensor:
    """Compute ``100 max(cos(E_image, E_text), 0)`` of each pair, (B,) float64; average after the maximum, not before.

    Raises:
        DiffAccelError: unless both are ``(B, d)`` floats of one shape, finite, and no feature is all zeros.
    """
    return 100 * cosine(image_features, text_features).clamp_min(0)


def clip_i(a: Tensor, b: Tensor) -> Tensor:
    """Compute the cosine of features of paired images (arXiv 2208.12242): (B,) float64 in [-1, 1]."""
    return cosine(a, b)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Compute ``a . b / (|a| |b|)`` by rows, in float64.

    Raises:
        DiffAccelError: unless both are ``(B, d)`` floats of one shape, finite, and no row is all zeros.
    """
    if a.ndim != 2 or a.shape != b.shape or a.numel() == 0:
        raise DiffAccelError(
            f"Features must be (B, d), one row of each a pair; got {tuple(a.shape)} and {tuple(b.shape)}. "
            "Is there one prompt an image, and is it one network?"
        )
    x, y = (_unit(features) for features in (a, b))
    return (x * y).sum(1).clamp(-1, 1)  # rounding may exceed the interval by an ulp


def score(clip: TextImageModel, images: Tensor, prompts: Sequence[str], *, batch: int = 32) -> Alignment:
    """Compute the :func:`clip_score` of images and their prompts.

    Args:
        clip: the network for both.
        images: uint8 ``(B, 3, H, W)``.
        prompts: one per image.
        batch: images or texts per forward pass.

    Raises:
        DiffAccelError: for another number of prompts than images, or images of another dtype or shape.
    """
    values = 100 * prompt_cosine(clip, images, prompts, batch=batch).clamp_min(0)
    truncated = {text for text in set(prompts) if clip.truncated([text])}
    return Alignment(f"clip_score[{clip.name}]", values, sum(prompt in truncated for prompt in prompts))


def prompt_cosine(clip: TextImageModel, images: Tensor, prompts: Sequence[str], *, batch: int = 32) -> Tensor:
    """Compute the cosine of every image with its prompt, (B,) float64; each distinct prompt is encoded once."""
    check_images(images)
    check_prompts(prompts, len(images))
    distinct = list(dict.fromkeys(prompts))
    texts = torch.cat([pooled(clip.texts(distinct[i : i + batch])).cpu() for i in range(0, len(distinct), batch)])
    row = {text: i for i, text in enumerate(distinct)}
    features = torch.cat([pooled(clip(part)).cpu() for part in images.split(batch)])
    return cosine(features, texts[[row[prompt] for prompt in prompts]])


def pooled(output: Any) -> Tensor:
    """Return the features of a network's output: a tensor, or the ``pooler_output`` of transformers' output object.

    Since version 5, ``get_image_features`` and ``get_text_features`` of transformers' CLIP return such an object.
    """
    features = output if isinstance(output, Tensor) else getattr(output, "pooler_output", None)
    if not isinstance(features, Tensor):
        raise DiffAccelError(
            f"A CLIP must return a tensor of features, or an output with pooler_output; got {type(output)}."
        )
    return features


def check_prompts(prompts: Sequence[str], images: int) -> None:
    """Raise unless there is one prompt per image, and for one text in place of a list."""
    if isinstance(prompts, str):
        raise DiffAccelError("Prompts must be a list of texts, one an image; got one text.")
    if len(prompts) != images:
        raise DiffAccelError(f"{images} images, but {len(prompts)} prompts. Give one prompt an image.")


def _unit(features: Tensor) -> Tensor:
    """Normalise rows to length 1, in float64."""
    if not features.is_floating_point():
        raise DiffAccelError(f"Features must be floats, not {features.dtype}.")
    x = features.detach().cpu().to(torch.float64)
    bad = (~torch.isfinite(x)).any(1).nonzero().flatten().tolist()
    if bad:
        raise DiffAccelError(f"{len(bad)} of {len(x)} features are not finite, the first at {bad[0]}.")
    norm = x.norm(dim=1, keepdim=True)
    if (norm == 0).any():
        raise DiffAccelError(f"Feature {int((norm[:, 0] == 0).nonzero()[0])} is all zeros: it has no direction.")
    return x / norm
