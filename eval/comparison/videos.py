"""Metrics of videos: fidelity frame by frame and its drift, flicker, and the Fréchet distance by a user's network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError, size_text
from diffaccel.eval.comparison import paired_scores
from diffaccel.eval.comparison.fidelity import Distance
from diffaccel.eval.comparison.row import Row
from diffaccel.eval.images.prefetch import ahead
from diffaccel.eval.metrics import video
from diffaccel.eval.networks.by_spec import Network
from diffaccel.eval.sets.run import Pairs, Run, pair_by_prompt
from diffaccel.eval.uncertainty import intervals
from diffaccel.eval.uncertainty.influence import too_few_rows

CUSTOMARY = 2048  # clips of published distances
FrameCurves = list[tuple[Distance, list[Tensor]]]  # by distance, a curve (T,) of every pair


def measure(baseline: Run, run: Run, pairs: Pairs, distances: Sequence[Distance]) -> FrameCurves:
    """Measure every distance of every frame of every pair.

    Raises:
        DiffAccelError: for a pair of different sizes or numbers of frames.
    """
    curves: list[list[Tensor]] = [[] for _ in distances]
    read = ahead(lambda places: (baseline.video(places[0]), run.video(places[1])), pairs, workers=2)
    for (_, j), (base_frames, frames) in zip(pairs, read, strict=True):
        if base_frames.shape != frames.shape:
            shapes = [f"{len(v)} frames of {size_text(*v.shape[2:])}" for v in (frames, base_frames)]
            raise DiffAccelError(
                f"'{run.pictures[j].id}' of '{run.name}' has {shapes[0]}, and its pair in '{baseline.name}' has "
                f"{shapes[1]}. Make both alike."
            )
        for distance, pair_curves in zip(distances, curves, strict=True):
            pair_curves.append(distance.measure(base_frames, frames).double().cpu())
    return list(zip(distances, curves, strict=True))


def video_values(distance: Distance, curves: Sequence[Tensor]) -> Tensor:
    """Reduce every curve to one value: PSNR to that of all the video's pixels, others to their mean. (n,) float64."""
    if distance.metric == "psnr":  # mean squared errors add up, decibels do not
        return torch.stack([-10 * torch.log10((10 ** (-curve / 10)).mean()) for curve in curves])
    return torch.stack([curve.mean() for curve in curves])


def mean_curve(distance: Distance, curves: Sequence[Tensor]) -> Tensor:
    """Average curves over videos at every frame that all of them have, (T,): PSNR to that of all the pixels.

    So a video in which a frame is equal to the baseline's, whose PSNR is infinite, counts at that frame.
    """
    shortest = min(map(len, curves))
    stacked = torch.stack([curve[:shortest] for curve in curves])
    return -10 * torch.log10((10 ** (-stacked / 10)).mean(0)) if distance.metric == "psnr" else stacked.mean(0)


def drift_rows(run: Run, measured: FrameCurves, clusters: Sequence[object]) -> list[Row]:
    """Return a row for every distance: the mean slope of its curves per frame, which errors that accumulate raise."""
    rows = []
    for distance, curves in measured:
        slopes = [video.drift(curve) for curve in curves]
        labelled = [(slope, label) for slope, label in zip(slopes, clusters, strict=True) if slope is not None]
        row = Row(
            metric=f"{distance.metric}_drift", key=f"{distance.key} drift", family="video", run=run.name,
            better=distance.better, unit=f"{distance.unit or '1'}/frame", n=len(labelled), m=len(labelled),
            detail={"from": "slope of the line through each video's frames"},
        )  # fmt: skip
        if labelled:
            row.value = sum(slope for slope, _ in labelled) / len(labelled)
        else:
            row.missing = "no video has two frames that differ from the baseline's"
        if len({label for _, label in labelled}) > 1:
            values, labels = zip(*labelled, strict=True)
            row.set_interval("interval", intervals.bootstrap_mean(values, clusters=labels))
        elif labelled:
            row.add_note(paired_scores.ALONE)
        rows.append(row)
    return rows


def flicker_rows(
    baseline: Run, runs: Sequence[Run], pairs: Mapping[str, Pairs], others: Run | None
) -> tuple[list[Row], dict[str, Tensor]]:
    """Measure flicker, ``mean |x_{t+1} - x_t|`` in levels: rows of the baseline and of each run, and values of pairs.

    It counts motion too, which the baseline has as well: the difference to the baseline is what tells.
    """

    def flicker(run: Run) -> Tensor:
        values = ahead(lambda i: video.temporal_flicker(run.video(i)), range(len(run)), workers=2)
        return torch.tensor(list(values), dtype=torch.float64)

    score = paired_scores.Score(
        metric="flicker", key="flicker", family="video", better="lower", unit="levels",
        detail={"from": "counts motion too: read the difference"},
    )  # fmt: skip
    values = {run.name: flicker(run) for run in (baseline, *runs)}
    scored_others = None if others is None else (others, flicker(others))
    return paired_scores.rows(score, values, baseline, runs, pairs, scored_others)


def frechet_rows(
    baseline: Run, runs: Sequence[Run], pairs: Mapping[str, Pairs], others: Run | None, network: Network
) -> list[Row]:
    """Measure the Fréchet distance of every run's clips to the baseline's (arXiv 1812.01717), paired by id."""

    def features(run: Run) -> Tensor:
        clips = ahead(run.video, range(len(run)), workers=2)
        return video.clip_features(clips, network.function, network.sampling)

    base_features = features(baseline)

    def distance_to_baseline(run: Run, run_pairs: Pairs) -> video.VideoDistance:
        return video.fvd(
            features(run), base_features, sampling=network.sampling, extractor=network.name,
            weights_sha256=network.weights_sha256, pairs=[(j, i) for i, j in run_pairs],
        )  # fmt: skip

    floor = None if others is None else distance_to_baseline(others, pair_by_prompt(baseline, others))
    rows = []
    for run in runs:
        distance = distance_to_baseline(run, pairs[run.name])
        note = f"to {baseline.name}, same seeds: not independent; {network.sampling.frames} frames a clip, stride "
        note += f"{network.sampling.stride}; published ones take {CUSTOMARY} clips"
        reason = too_few_rows(distance.n, "clips")
        detail = {name: value for name, value in distance.to_dict().items() if name != "interval"}
        row = Row(
            metric="fvd", key=distance.key, family="distribution", run=run.name, better="lower", value=distance.value,
            n=distance.n, m=distance.m, detail={**detail, "from": f"{note}; {reason}" if reason else note},
        )  # fmt: skip
        row.set_interval("interval", distance.interval)
        if floor is not None:
            row.floor, row.floor_interval = floor.value, floor.interval
        rows.append(row)
    return rows
