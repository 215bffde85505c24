"""Metrics of videos: flicker, drift over frames, Fréchet video distance by a given network.

A video is uint8 ``(T, 3, H, W)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from diffaccel.errors import DiffAccelError
from diffaccel.eval.metrics import frechet, frechet_intervals
from diffaccel.eval.metrics.paired import check_images
from diffaccel.eval.uncertainty.influence import LEAST_ROWS
from diffaccel.eval.uncertainty.intervals import Interval


def temporal_flicker(video: Tensor) -> float:
    """Compute ``mean |x_{t+1} - x_t|`` over frames, channels and pixels, in levels 0 to 255.

    Motion counts too: compare it with the baseline's, at equal prompt and seed.

    Raises:
        DiffAccelError: unless ``video`` is uint8 ``(T, 3, H, W)`` with ``T >= 2``.
    """
    check_images(video, "frames")
    if len(video) < 2:
        raise DiffAccelError(f"Flicker is between frames, and the video has {len(video)}.")
    frames = video.to(torch.int32)
    total = (frames[1:] - frames[:-1]).abs().sum(dtype=torch.int64)
    return int(total) / frames[1:].numel()


def drift(curve: Tensor) -> float | None:
    """Fit the least-squares line through a curve and return its slope per frame, which shows accumulating errors.

    ``inf``, the PSNR of identical frames, is left out; returns None where fewer than two frames remain.

    Raises:
        DiffAccelError: for another shape than (T,), or NaN.
    """
    y = curve.detach().cpu().to(torch.float64)
    if y.ndim != 1 or bool(y.isnan().any()):
        raise DiffAccelError(f"A curve is (T,) without NaN; got {tuple(y.shape)}, {int(y.isnan().sum())} of them NaN.")
    t = torch.arange(len(y), dtype=torch.float64)[y.isfinite()]
    y = y[y.isfinite()]
    if len(y) < 2:
        return None
    t = t - t.mean()
    return float((t * y).sum() / (t * t).sum())


# -- Fréchet video distance -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FrameSampling:
    """Frames of a video that a feature network sees, and their size. Distances of different samplings do not compare.

    Attributes:
        frames: number of frames in a clip.
        stride: step from one frame of the clip to the next, in frames of the video.
        start: first frame.
        resolution: height and width, by antialiased bilinear resizing of the shorter side and a centre crop; None keeps
            the size of the video.
    """

    frames: int = 16
    stride: int = 1
    start: int = 0
    resolution: int | None = None

    def __post_init__(self) -> None:
        if (
            self.frames < 1
            or self.stride < 1
            or self.start < 0
            or (self.resolution is not None and self.resolution < 1)
        ):
            raise DiffAccelError(f"A clip needs frames, stride and resolution >= 1 and start >= 0; got {self}.")

    def clip(self, video: Tensor) -> Tensor:
        """Cut the clip uint8 ``(frames, 3, H, W)`` out of a video.

        Raises:
            DiffAccelError: for a video that is too short, or not uint8 ``(T, 3, H, W)``.
        """
        check_images(video, "frames")
        needed = self.start + (self.frames - 1) * self.stride + 1
        if len(video) < needed:
            raise DiffAccelError(f"{self} needs {needed} frames, and the video has {len(video)}. Take fewer.")
        clip = video[self.start : needed : self.stride]
        return clip if self.resolution is None else _square(clip, self.resolution)


@dataclass(frozen=True)
class VideoDistance:
    """Fréchet distance of videos, with the settings that a report must print beside it.

    Attributes:
        key: metric and network, such as ``FVD[i3d-kinetics400]``.
        value: the distance.
        interval: its 95 % interval; None for fewer than 30 clips.
        n, m: numbers of clips.
        extractor, weights_sha256: name and weights of the feature network.
        sampling: frames, stride, start and resolution.
    """

    key: str
    value: float
    interval: Interval | None
    n: int
    m: int
    extractor: str
    weights_sha256: str
    sampling: FrameSampling

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-ready dict."""
        return asdict(self)


def clip_features(
    videos: Iterable[Tensor], network: Callable[[Tensor], Tensor], sampling: FrameSampling, *, batch: int = 8
) -> Tensor:
    """Compute features ``(n, d)``, one clip per video, by a network from uint8 ``(B, frames, 3, H, W)`` to ``(B, d)``.

    Raises:
        DiffAccelError: for no video, clips of different sizes in one batch, or a network with another output shape.
    """
    batches: list[Tensor] = []
    clips: list[Tensor] = []

    def flush() -> None:
        if len({clip.shape for clip in clips}) > 1:
            raise DiffAccelError("Videos differ in size. Give the sampling a resolution.")
        with torch.no_grad():
            features = network(torch.stack(clips))
        if features.ndim != 2 or len(features) != len(clips):
            raise DiffAccelError(f"A video network must return ({len(clips)}, d); got {tuple(features.shape)}.")
        batches.append(features.cpu())
        clips.clear()

    for video in videos:
        clips.append(sampling.clip(video))
        if len(clips) == batch:
            flush()
    if clips:
        flush()
    if not batches:
        raise DiffAccelError("There is no video to take features of.")
    return torch.cat(batches)


def fvd(
    features_a: Tensor,
    features_b: Tensor,
    *,
    sampling: FrameSampling,
    extractor: str,
    weights_sha256: str,
    pairs: Sequence[tuple[int, int]] = (),
) -> VideoDistance:
    """Compute the Fréchet distance of clip features ``(n, d)`` and ``(m, d)`` (arXiv 1812.01717; VideoMAE: 2404.12391).

    Public implementations differ by some 10 % in resizing and sampling alone, so the result carries both.

    Args:
        features_a, features_b: of the clips.
        sampling, extractor, weights_sha256: what the features are of.
        pairs: rows of both that are of one id, and move together in the interval.

    Raises:
        DiffAccelError: as :func:`diffaccel.eval.metrics.frechet.distance_of_features` raises it.
    """
    value = frechet.distance_of_features(features_a, features_b)
    interval = None
    if len(features_a) >= LEAST_ROWS:
        interval = frechet_intervals.distance_interval(features_a, features_b, pairs=pairs)
    return VideoDistance(
        f"FVD[{extractor}]", value, interval, len(features_a), len(features_b), extractor, weights_sha256, sampling
    )


def _square(clip: Tensor, size: int) -> Tensor:
    """Resize the shorter side of a clip to ``size``, and crop the centre."""
    height, width = clip.shape[-2:]
    scale = size / min(height, width)
    shape = (max(size, round(height * scale)), max(size, round(width * scale)))
    if shape != (height, width):
        resized = F.interpolate(clip.to(torch.float32), shape, mode="bilinear", antialias=True)
        clip = resized.round().clamp(0, 255).to(torch.uint8)
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    return clip[..., top : top + size, left : left + size]
