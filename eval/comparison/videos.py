"""Runs of videos: fidelity by frames and its drift, flicker, and the Fréchet distance by a network of the user's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.eval.comparison import paired_scores as scored
from diffaccel.eval.comparison.fidelity import Distance
from diffaccel.eval.comparison.row import Row
from diffaccel.eval.images.prefetch import ahead
from diffaccel.eval.metrics import video
from diffaccel.eval.networks.by_spec import Network
from diffaccel.eval.sets.run import Pairs, Run
from diffaccel.eval.uncertainty import intervals

CUSTOMARY = 2048  # clips that published distances take
Measured = list[tuple[Distance, list[Tensor]]]  # by distance, a curve (T,) of every pair


def measure(baseline: Run, run: Run, pairs: Pairs, distances: Sequence[Distance]) -> Measured:
    """Every distance of every frame of every pair.

    Raises:
        DiffAccelError: for a pair of different sizes or numbers of frames.
    """
    curves: list[list[Tensor]] = [[] for _ in distances]
    read = ahead(lambda places: (baseline.video(places[0]), run.video(places[1])), pairs, workers=2)
    for (_, j), (one, other) in zip(pairs, read, strict=True):
        if one.shape != other.shape:
            shapes = [f"{len(v)} frames of {v.shape[3]}x{v.shape[2]}" for v in (other, one)]
            raise DiffAccelError(
                f"'{run.pictures[j].id}' of '{run.name}' has {shapes[0]}, and its pair in '{baseline.name}' has "
                f"{shapes[1]}. Make both alike."
            )
        for distance, found in zip(distances, curves, strict=True):
            found.append(distance.measure(one, other).double().cpu())
    return list(zip(distances, curves, strict=True))


def whole(distance: Distance, curves: Sequence[Tensor]) -> Tensor:
    """One number a video: the PSNR of all its pixels, the mean over frames of anything else. (n,) float64."""
    if distance.metric == "psnr":  # mean squared errors add up, decibels do not
        return torch.stack([-10 * torch.log10((10 ** (-curve / 10)).mean()) for curve in curves])
    return torch.stack([curve.mean() for curve in curves])


def mean_curve(curves: Sequence[Tensor]) -> Tensor:
    """The mean over videos of every frame that all of them have, (T,); frames that are equal in one leave it out."""
    longest = min(map(len, curves))
    stacked = torch.stack([curve[:longest] for curve in curves])
    return torch.where(stacked.isfinite(), stacked, torch.nan).nanmean(0)


def drifts(run: Run, measured: Measured, clusters: Sequence[object]) -> list[Row]:
    """The mean slope a frame of every curve: errors that accumulate show as one."""
    found = []
    for distance, curves in measured:
        slopes = [video.drift(curve) for curve in curves]
        kept = [(slope, label) for slope, label in zip(slopes, clusters, strict=True) if slope is not None]
        row = Row(
            metric=f"{distance.metric}_drift", key=f"{distance.key} drift", family="video", run=run.name,
            better=distance.better, unit=f"{distance.unit or '1'}/frame", n=len(kept), m=len(kept),
            detail={"from": "slope of the line through each video's frames"},
        )  # fmt: skip
        if kept:
            row.value = sum(slope for slope, _ in kept) / len(kept)
        else:
            row.missing = "no video has two frames that differ from the baseline's"
        if len({label for _, label in kept}) > 1:
            values, labels = zip(*kept, strict=True)
            row.interval = intervals.bootstrap_mean(values, clusters=labels)
        found.append(row)
    return found


def flicker(
    baseline: Run, runs: Sequence[Run], pairs: Mapping[str, Pairs], others: Run | None
) -> tuple[list[Row], dict[str, Tensor]]:
    """Rows of ``mean |x_{t+1} - x_t|`` in levels, the baseline's too: it holds motion, so the difference tells."""

    def of(run: Run) -> Tensor:
        found = ahead(lambda i: video.temporal_flicker(run.video(i)), range(len(run)), workers=2)
        return torch.tensor(list(found), dtype=torch.float64)

    score = scored.Score(
        metric="flicker", key="flicker", family="video", better="lower", unit="levels",
        detail={"from": "counts motion too: read the difference"},
    )  # fmt: skip
    values = {run.name: of(run) for run in (baseline, *runs)}
    return scored.rows(score, values, baseline, runs, pairs, None if others is None else of(others))


def distances(baseline: Run, runs: Sequence[Run], others: Run | None, network: Network) -> list[Row]:
    """The Fréchet distance of every run's clips to the baseline's (arXiv 1812.01717)."""

    def features(run: Run) -> Tensor:
        clips = ahead(run.video, range(len(run)), workers=2)
        return video.clip_features(clips, network.function, network.sampling)

    target = features(baseline)

    def distance(run: Run) -> video.VideoDistance:
        return video.fvd(
            features(run), target, sampling=network.sampling, extractor=network.name,
            weights_sha256=network.weights_sha256,
        )  # fmt: skip

    floor = None if others is None else distance(others).value
    found = []
    for run in runs:
        made = distance(run)
        note = f"to {baseline.name}, same seeds: not independent; {network.sampling.frames} frames a clip, stride "
        note += f"{network.sampling.stride}; published ones take {CUSTOMARY} clips"
        found.append(
            Row(metric="fvd", key=made.key, family="distribution", run=run.name, better="lower", value=made.value,
                floor=floor, n=made.n, m=made.m, detail={**made.to_dict(), "from": note})
        )  # fmt: skip
    return found
