"""How well images fit their prompts, and each other, in the features of a CLIP.

A CLIP is any object like :class:`Clip`; text and image features go through :func:`clip_score` and its kin. Which
convention a number follows must be printed with it: the same cosine of 0.31 is 31 here and 0.775 there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.eval.metrics.paired import check_images


class Clip(Protocol):
    """Image and text features of one space, and how many texts did not fit."""

    @property
    def name(self) -> str:
        """Of the network and its weights, as metric keys show it."""
        ...

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 ``(B, 3, H, W)`` to ``(B, d)``."""
        ...

    def texts(self, texts: list[str]) -> Tensor:
        """``(n, d)``."""
        ...

    def truncated(self, texts: list[str]) -> int:
        """How many of the texts are longer than the network reads."""
        ...


@dataclass(frozen=True)
class Alignment:
    """Scores of images by their prompts.

    Attributes:
        key: metric and network, such as ``clip_score[ViT-L-14/openai]``.
        values: (n,) float64, one an image.
        truncated: images whose prompt was cut: the network did not see its end.
    """

    key: str
    values: Tensor
    truncated: int


def clip_score(image_features: Tensor, text_features: Tensor) -> Tensor:
    """``100 max(cos(E_image, E_text), 0)`` of each pair; take the mean after, not before, the maximum. (B,) float64.

    Raises:
        DiffAccelError: unless both are ``(B, d)`` floats of one shape, finite, and no feature is all zeros.
    """
    return 100 * cosine(image_features, text_features).clamp_min(0)


def clip_score_w25(image_features: Tensor, text_features: Tensor) -> Tensor:
    """``2.5 max(cos, 0)`` of each pair, the CLIPScore of Hessel et al. (arXiv 2104.08718). (B,) float64."""
    return 2.5 * cosine(image_features, text_features).clamp_min(0)


def clip_i(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of the features of paired images, the baseline first (arXiv 2208.12242). (B,) float64 in [-1, 1]."""
    return cosine(a, b)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """``a . b / (|a| |b|)`` by rows, in float64.

    Raises:
        DiffAccelError: unless both are ``(B, d)`` floats of one shape, finite, and no row is all zeros.
    """
    if a.ndim != 2 or a.shape != b.shape or a.numel() == 0:
        raise DiffAccelError(
            f"Features must be (B, d), one row of each a pair; got {tuple(a.shape)} and {tuple(b.shape)}. "
            "Is there one prompt an image, and is it one network?"
        )
    x, y = (_unit(features) for features in (a, b))
    return (x * y).sum(1).clamp(-1, 1)  # rounding may leave the interval by an ulp


def score(clip: Clip, images: Tensor, prompts: Sequence[str], *, batch: int = 32) -> Alignment:
    """:func:`clip_score` of images and their prompts.

    Args:
        clip: a network for both.
        images: uint8 ``(B, 3, H, W)``.
        prompts: one an image.
        batch: images or texts through the network at a time.

    Raises:
        DiffAccelError: for another number of prompts than images, or images of another dtype or shape.
    """
    values = 100 * prompt_cosine(clip, images, prompts, batch=batch).clamp_min(0)
    cut = {text for text in set(prompts) if clip.truncated([text])}
    return Alignment(f"clip_score[{clip.name}]", values, sum(prompt in cut for prompt in prompts))


def prompt_cosine(clip: Clip, images: Tensor, prompts: Sequence[str], *, batch: int = 32) -> Tensor:
    """Cosine of every image with its prompt, (B,) float64; each different prompt is encoded once."""
    check_images(images)
    check_prompts(prompts, len(images))
    different = list(dict.fromkeys(prompts))
    texts = torch.cat([pooled(clip.texts(different[i : i + batch])).cpu() for i in range(0, len(different), batch)])
    row = {text: i for i, text in enumerate(different)}
    features = torch.cat([pooled(clip(part)).cpu() for part in images.split(batch)])
    return cosine(features, texts[[row[prompt] for prompt in prompts]])


def pooled(output: Any) -> Tensor:
    """The features in what a network returned: a tensor, or transformers' output object, whose pooled ones they are.

    From version 5 on ``get_image_features`` and ``get_text_features`` of transformers' CLIP return such an object.
    """
    features = output if isinstance(output, Tensor) else getattr(output, "pooler_output", None)
    if not isinstance(features, Tensor):
        raise DiffAccelError(
            f"A CLIP must return a tensor of features, or an output with pooler_output; got {type(output)}."
        )
    return features


def check_prompts(prompts: Sequence[str], images: int) -> None:
    """Refuse another number of prompts than images, and one text in place of a list."""
    if isinstance(prompts, str):
        raise DiffAccelError("Prompts must be a list of texts, one an image; got one text.")
    if len(prompts) != images:
        raise DiffAccelError(f"{images} images, but {len(prompts)} prompts. Give one prompt an image.")


def _unit(features: Tensor) -> Tensor:
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
