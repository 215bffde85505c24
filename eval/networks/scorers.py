"""Preference scorers: what people would like better, by networks trained on their choices.

A scorer is any callable ``(images, prompts) -> (B,)`` with uint8 ``(B, 3, H, W)`` images; higher is better. The
published ones are in :data:`KNOWN`, built only when asked for. Numbers of different scorers do not compare.
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
class Known:
    """A published scorer.

    Attributes:
        files: of its weights that must be found.
        licence: what its authors say; it is for the user to check.
        paper: of the scorer.
        build: from ``path`` and ``device`` to its function.
        hubs: the repository of the Hugging Face hub that has each file, or "".
        package: that must be installed beside the weights, or "".
    """

    files: tuple[str, ...]
    licence: str
    paper: str
    build: Callable[..., Function]
    hubs: tuple[str, ...] = ("",)
    package: str = ""


KNOWN = {
    "aesthetic": Known(
        (preference.AESTHETIC, preference.OPEN_CLIP),
        "head: Apache-2.0; OpenAI's CLIP: MIT, not meant for deployment",
        "LAION-Aesthetics v2, github.com/christophschuhmann/improved-aesthetic-predictor",
        preference.aesthetic,
        ("", preference.OPENAI_L14),
    ),
    "hpsv2": Known((preference.HPSV2,), "Apache-2.0", "arXiv 2306.09341", preference.hpsv2, (preference.HPSV2_HUB,)),
    "image-reward": Known(
        (preference.IMAGE_REWARD, preference.MED_CONFIG),
        "Apache-2.0",
        "arXiv 2304.05977",
        preference.image_reward,
        (preference.IMAGE_REWARD_HUB,) * 2,
        preference.PACKAGE,
    ),
    "pickscore": Known(
        (preference.PICKSCORE,),
        "MIT; see the model card",
        "arXiv 2305.01569",
        preference.pickscore,
        (preference.PICKSCORE_HUB,),
    ),
}


@dataclass(frozen=True)
class Scorer:
    """A function of images and prompts whose answers are checked.

    Attributes:
        name: as tables show it.
        function: what scores.
        licence: of the weights, or "" for a function of the user's.
    """

    name: str
    function: Function
    licence: str = ""

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """A score an image: (B,) float64 on the CPU.

        Raises:
            DiffAccelError: for images that are not uint8 ``(B, 3, H, W)``, another number of prompts, and a function
                that returns anything but B finite numbers, by the scorer's name.
            MetricFailed: for a function that raises, by the scorer's name.
        """
        check_images(images)
        check_prompts(prompts, len(images))
        try:
            found = self.function(images, list(prompts))
            scores = torch.as_tensor(found).detach().cpu().to(torch.float64)
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
    what: str | Function, path: str | Path | None = None, *, device: str | torch.device = "cpu", **options: Any
) -> Scorer:
    """A scorer by name, from a function, or from ``py:module:function``.

    Args:
        what: a name of :data:`KNOWN`, a callable ``(images, prompts)``, or where to import one from.
        path: the weights' file or folder of a known scorer; otherwise they are looked for as
            :mod:`diffaccel.eval.networks.weights` says.
        device: of a known scorer's network.
        options: more of a known scorer's, such as ``clip`` of "aesthetic".

    Raises:
        MissingWeights: where a known scorer's weights are not found.
        DiffAccelError: for an unknown name, a function that cannot be imported, or a path given with a function.
    """
    if isinstance(what, Scorer):
        return what
    if isinstance(what, str) and not what.startswith("py:"):
        if what not in KNOWN:
            raise unknown("scorer", what, (*KNOWN, "py:module:function"))
        known = KNOWN[what]
        return Scorer(what, known.build(path, device, **options), known.licence)
    if path is not None or options:
        given = "path" if path is not None else ", ".join(options)
        raise DiffAccelError(f"A function takes images and prompts only; '{given}' goes with {', '.join(KNOWN)}.")
    function = _imported(what) if isinstance(what, str) else what
    if not callable(function):
        raise DiffAccelError(f"A scorer must be callable with images and prompts; got {type(function).__name__}.")
    name = what if isinstance(what, str) else getattr(what, "__name__", type(what).__name__)
    return Scorer(name, function)


def _imported(text: str) -> Any:
    module, _, name = text.removeprefix("py:").partition(":")
    if not module or not name:
        raise DiffAccelError(f"'{text}' names no function. Write py:module:function, such as py:my_scores:sharpness.")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise DiffAccelError(f"The scorer '{text}' cannot be imported ({error}). Is it on PYTHONPATH?") from error
