"""Reference of a zoo model's runs: statistics of its training pictures, in the features of the CLIP they ship with.

A reference of its own, not drawn from the baseline's prompts and seeds, so that distances to it have intervals and
differences like those to any other set.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from diffaccel import zoo
from diffaccel.eval.comparison.distribution import FEWEST
from diffaccel.eval.features import statistics_files
from diffaccel.eval.metrics.frechet import Moments
from diffaccel.eval.networks.extractors import as_clip, extractor
from diffaccel.eval.networks.extractors.base import Extractor
from diffaccel.eval.sets.run import Run

NONE = "none"  # the word that asks for the baseline's own pictures instead
SHIPPED = {"emoji-flux": ("emoji-clip-judge", "icons")}  # model -> CLIP whose folder has the statistics, their label
_FILE = "fd_reference_{}.npz"  # by the side of the pictures in pixels


@dataclass(frozen=True, eq=False)
class ShippedStatistics:
    """Mean and covariance of a zoo model's training pictures.

    Attributes:
        name: of the set, as rows name it.
        moments: in the features of ``extractor``.
        extractor: the CLIP, with the preprocessing that the statistics were made with.
        sentence: what a reader of the distances must know.
    """

    name: str
    moments: Moments
    extractor: Extractor
    sentence: str


def find(baseline: Run, *, device: Any = "cpu") -> ShippedStatistics | None:
    """Return the statistics that ship for the model and the size of a run's pictures; None where there are none.

    None too for runs of fewer than 100 pictures, whose distributions are not compared, and for videos.
    """
    model = baseline.record.get("settings", {}).get("model")
    if model not in SHIPPED or baseline.is_video or len(baseline) < FEWEST:
        return None
    sizes = list(baseline.source.sizes)
    side = sizes[0][0]
    return shipped(model, side, device=device) if sizes == [(side, side)] else None


def shipped(model: str, side: int, *, device: Any = "cpu") -> ShippedStatistics | None:
    """Return the statistics that ship for square pictures of a zoo model of this side; None where there are none."""
    if model not in SHIPPED:
        return None
    clip_name, label = SHIPPED[model]
    file = zoo.path(clip_name) / _FILE.format(side)
    if not file.is_file():
        return None
    statistics = statistics_files.read(file)
    made = _made_of(file)
    sentence = (
        f"Distributions are compared with the {statistics.moments.n} pictures that {model} was trained on "
        f"({made}, {side} px), by the statistics that ship with {clip_name}; --reference {NONE} compares them with the "
        "baseline's own pictures."
    )
    network = _as_statistics_were_made(clip_name, label, device)
    return ShippedStatistics(f"training pictures of {model}", statistics.moments, network, sentence)


def _made_of(file: Path) -> str:
    """Return in words which pictures the statistics of a file are of."""
    with np.load(file, allow_pickle=False) as arrays:
        try:
            return str(json.loads(str(arrays["protocol"]))["pictures"])
        except (KeyError, ValueError, TypeError):
            return "not said which"


def _as_statistics_were_made(clip_name: str, label: str, device: Any) -> Extractor:
    """Return a CLIP of the zoo that resizes pictures as those of its statistics were: by area, or bilinearly enlarged.

    Pictures of the network's own size are not resized, and their features are those of the CLIP as it is.
    """
    clip = as_clip(extractor(clip_name, device=device))
    visual: Any = clip.clip.visual
    side = visual.image_size if isinstance(visual.image_size, int) else visual.image_size[0]

    def network(images: Tensor) -> Tensor:
        x = images.float()
        if x.shape[-1] > side:
            x = F.interpolate(x, side, mode="area")
        elif x.shape[-1] < side:
            x = F.interpolate(x, side, mode="bilinear", antialias=True)
        return clip.network(x)

    return replace(clip, key=f"{clip.key}[{label}]", protocol=label, prepare=None, network=network)
