"""Fit of one set of pictures to its prompts, and its likeness to a paired set, in the features of a CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from diffaccel.eval.comparison.clip_scores import ClipScores
from diffaccel.eval.comparison.distribution import CACHE
from diffaccel.eval.comparison.paired_scores import mean_estimate
from diffaccel.eval.comparison.row import Row
from diffaccel.eval.features.extract import extract
from diffaccel.eval.metrics.clip_score import clip_i
from diffaccel.eval.networks.extractors.clip import ClipExtractor
from diffaccel.eval.sets.run import Run, pair
from diffaccel.eval.uncertainty import intervals
from diffaccel.eval.uncertainty.intervals import Interval

_W25 = 0.025  # from 100 max(cos, 0) to 2.5 max(cos, 0)


def rows(
    run: Run, clip: ClipExtractor, prompts: Sequence[str] | None, *, paired: Run | None = None, **extraction: Any
) -> tuple[list[Row], list[str]]:
    """Measure the CLIP score in both conventions where prompts are known, and CLIP-I where there is a paired set.

    The score is ``100 max(cos, 0)`` of a picture and its prompt, then the mean; the other convention is
    ``2.5 max(cos, 0)`` (arXiv 2104.08718). CLIP-I is the cosine of paired pictures (arXiv 2208.12242). Intervals
    resample whole prompts.

    Args:
        run: the pictures.
        clip: network that reads pictures and prompts.
        prompts: one a picture, in the pictures' order.
        paired: pictures that belong to these, by prompt and seed or by name. Its score, of the same prompts, is
            subtracted.
        extraction: batch and progress of :func:`diffaccel.eval.features.extract.extract`.

    Returns:
        The rows, and warnings.

    Raises:
        DiffAccelError: for another number of prompts than pictures, and sets that are not paired.
    """
    features = _features(run, clip, extraction)
    detail = {"extractor": clip.name, "weights_sha256": clip.weights_sha256, "protocol": clip.protocol}
    paired_features = None
    if paired is not None:
        place = dict(pair(run, paired))
        paired_features = _features(paired, clip, extraction)[[place[i] for i in range(len(run))]]
        detail["reference"] = paired.name
    measured, warnings = [], list(run.warnings)
    clusters = list(range(len(run))) if prompts is None else list(prompts)
    if prompts is not None:
        scores = ClipScores(clip)
        values, cut = scores.of_features(features, prompts), scores.truncated(prompts)
        paired_values = None if paired_features is None else scores.of_features(paired_features, prompts)
        row = _row("clip_score", f"clip_score[{clip.name}]", run, values, clusters, detail | {"truncated": cut})
        _add_difference(row, values, paired_values, clusters)
        measured += [row, _in_w25(row, f"clip_score_w2.5[{clip.name}]", values)]
        if cut:
            warnings.append(f"{cut} of {len(run)} prompts are longer than {clip.name} reads and were cut.")
    if paired_features is not None:
        similarity = clip_i(paired_features, features)
        measured.append(_row("clip_i", f"CLIP-I[{clip.name}]", run, similarity, clusters, detail))
    return measured, warnings


def _features(run: Run, clip: ClipExtractor, extraction: dict[str, Any]) -> Tensor:
    """Return features in the order of the pictures; a run's folder keeps them, and a comparison finds them there."""
    features = extract(run.source, clip, cache=run.path / CACHE if run.record else None, **extraction)
    return features.rows([picture.id for picture in run.pictures])


def _row(metric: str, key: str, run: Run, values: Tensor, clusters: Sequence[Any], detail: dict[str, Any]) -> Row:
    row = Row(
        metric=metric, key=key, family="alignment", run=run.name, better="higher", value=float(values.mean()),
        n=len(values), m=len(values), detail=dict(detail),
    )  # fmt: skip
    mean = mean_estimate(values, clusters)
    row.add_note(mean.note)
    row.set_interval("interval", mean.interval)
    return row


def _add_difference(row: Row, values: Tensor, paired_values: Tensor | None, clusters: Sequence[Any]) -> None:
    """Add the paired difference to a row, where there is a paired set and more than one prompt."""
    if paired_values is None or len(set(clusters)) < 2:
        return
    difference = intervals.paired_difference(values, paired_values, clusters=clusters)
    row.delta = difference.interval.value
    row.set_interval("delta_interval", difference.interval)
    wins = difference.wins
    row.detail["wins"] = {"share": wins.value, "low": wins.low, "high": wins.high}


def _in_w25(row: Row, key: str, values: Tensor) -> Row:
    """Return the row of a CLIP score in the convention ``2.5 max(cos, 0)``."""
    return replace(
        row, metric="clip_score_w2.5", key=key, value=_W25 * float(values.mean()), interval=_scaled(row.interval),
        delta=None if row.delta is None else _W25 * row.delta, delta_interval=_scaled(row.delta_interval),
        detail=dict(row.detail),
    )  # fmt: skip


def _scaled(interval: Interval | None) -> Interval | None:
    if interval is None:
        return None
    value, low, high = (_W25 * end for end in (interval.value, interval.low, interval.high))
    return replace(interval, value=value, low=low, high=high)
