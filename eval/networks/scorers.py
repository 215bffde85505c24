"""Preference scorers: networks trained on human choices that predict which image people prefer.

A scorer is any callable ``(images, prompts) -> (B,)`` with uint8 ``(B, 3, H, W)`` images; higher is better. The
published ones are in :data:`KNOWN`, built on demand. Numbers of different scorers do not compare.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError, unknown
from diffaccel.eval.errors import MetricFailed
from diffaccel.eval.metrics.clip_score import check_prompts
from diffaccel.eval.metrics.paired import check_images
from diffaccel.eval.networks import preference

Function = Callable[[Tensor, Sequence[str]], Any]


@dataclass(frozen=True)
class PublishedScorer:
    """Published scorer.

    Attributes:
        files: its weight files.
        licence: licence as its authors state it, for the user to check.
        paper: its paper or page.
        build: builder from ``path`` and ``device`` to its function.
        hubs: for each file, the repository of the Hugging Face hub that has it, or "".
        package: Python package it needs beside the weights, or "".
    """

    files: tuple[str, ...]
    licence: str
    paper: str
    build: Callable[..., Function]
    hubs: tuple[str, ...] = ("",)
    package: str = ""


KNOWN = {
    "aesthetic": PublishedScorer(
        (preference.AESTHETIC, preference.OPEN_CLIP),
        "head: Apache-2.0; OpenAI's CLIP: MIT, not meant for deployment",
        "LAION-Aesthetics v2, github.com/christophschuhmann/improved-aesthetic-predictor",
        preference.aesthetic,
        ("", preference.OPENAI_L14),
    ),
    "hpsv2": PublishedScorer(
        (preference.HPSV2,), "Apache-2.0", "arXiv 2306.09341", preference.hpsv2, (preference.HPSV2_HUB,)
    ),
    "image-reward": PublishedScorer(
        (preference.IMAGE_REWARD, preference.MED_CONFIG),
        "Apache-2.0",
        "arXiv 2304.05977",
        preference.image_reward,
        (preference.IMAGE_REWARD_HUB,) * 2,
        preference.PACKAGE,
    ),
    "pickscore": PublishedScorer(
        (preference.PICKSCORE,),
        "MIT; see the model card",
        "arXiv 2305.01569",
        preference.pickscore,
        (preference.PICKSCORE_HUB,),
    ),
}


@dataclass(frozen=True)
class Scorer:
    """Scoring function of images and prompts whose results are checked.

    Attributes:
        name: name in tables.
        function: the scoring function.
        licence: licence of the weights, or "" for a function of the user's.
    """

    name: str
    function: Function
    licence: str = ""

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score every image: (B,) float64 on the CPU.

        Raises:
            DiffAccelError: for images that are not uint8 ``(B, 3, H, W)``, another number of prompts, and, naming the
                scorer, for a function that returns anything but B finite numbers.
            MetricFailed: for a function that raises, naming the scorer.
        """
        check_images(images)
        check_prompts(prompts, len(images))
        try:
            output = self.function(images, list(prompts))
            scores = torch.as_tensor(output).detach().cpu().to(torch.float64)
        except Exception as error:  # a function of the user's may raise anything
            raise MetricFailed(f"The scorer '{self.name}' failed ({type(error).__name__}: {error}).") from error
        if scores.shape not in ((len(images),), (len(images), 1)):
            raise DiffAccelError(
                f"The scorer '{self.name}' returned shape {tuple(scores.shape)} for {len(images)} images. "
                f"It must return one number an image, ({len(images)},)."
            )
        scores = scores.flatten()
        bad = (~scores.isfinite()).nonzero().flatten().tolist()
        if bad:
            raise DiffAccelError(
                f"The scorer '{self.name}' gave {len(bad)} of {len(scores)} images no finite score, the first is image "
                f"{bad[0]}: {scores[bad[0]].item()}."
            )
        return scores


def scorer(
    source: str | Function, path: str | Path | None = None, *, device: str | torch.device = "cpu", **options: Any
) -> Scorer:
    """Build a scorer by name, from a function, or from ``py:module:function``.

    Args:
        source: a name of :data:`KNOWN`, a callable ``(images, prompts)``, or where to import one from.
        path: file or folder of a known scorer's weights; by default the places where
            :mod:`diffaccel.eval.networks.weights` looks.
        device: device of a known scorer's network.
        options: further arguments of a known scorer's builder, such as ``clip`` of "aesthetic".

    Raises:
        MissingWeights: if a known scorer's weights are not found.
        DiffAccelError: for an unknown name, a function that cannot be imported, or a path given with a function.
    """
    if isinstance(source, Scorer):
        return source
    if isinstance(source, str) and not source.startswith("py:"):
        if source not in KNOWN:
            raise unknown("scorer", source, (*KNOWN, "py:module:function"))
        known = KNOWN[source]
        return Scorer(source, known.build(path, device, **options), known.licence)
    if path is not None or options:
        arguments = "path" if path is not None else ", ".join(options)
        raise DiffAccelError(f"A function takes images and prompts only; '{arguments}' goes with {', '.join(KNOWN)}.")
    function = _import_function(source) if isinstance(source, str) else source
    if not callable(function):
        raise DiffAccelError(f"A scorer must be callable with images and prompts; got {type(function).__name__}.")
    name = source if isinstance(source, str) else getattr(source, "__name__", type(source).__name__)
    return Scorer(name, function)


def _import_function(spec: str) -> Any:
    """Import the function of ``py:module:function``."""
    module, _, name = spec.removeprefix("py:").partition(":")
    if not module or not name:
        raise DiffAccelError(f"'{spec}' names no function. Write py:module:function, such as py:my_scores:sharpness.")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise DiffAccelError(f"The scorer '{spec}' cannot be imported ({error}). Is it on PYTHONPATH?") from error
