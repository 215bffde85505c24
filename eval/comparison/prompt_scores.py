"""How well one set of pictures fits its prompts, and how alike it is to another set, in the features of a CLIP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from diffaccel.eval.comparison.distribution import CACHE
from diffaccel.eval.comparison.row import Row
from diffaccel.eval.features.extract import extract
from diffaccel.eval.metrics import clip_score as alignment
from diffaccel.eval.networks.extractors.clip import ClipExtractor
from diffaccel.eval.sets.run import Run, pair
from diffaccel.eval.uncertainty import intervals
from diffaccel.eval.uncertainty.intervals import Interval

_W25 = 0.025  # from 100 max(cos, 0) to 2.5 max(cos, 0)


def rows(
    run: Run, clip: ClipExtractor, prompts: Sequence[str] | None, *, other: Run | None = None, **extraction: Any
) -> tuple[list[Row], list[str]]:
    """CLIP score in both conventions where prompts are known, CLIP-I where there is another set; and warnings.

    The score is ``100 max(cos, 0)`` of a picture and its prompt, then the mean; the other convention is
    ``2.5 max(cos, 0)`` (arXiv 2104.08718). CLIP-I is the cosine of paired pictures (arXiv 2208.12242). Intervals draw
    whole prompts.

    Args:
        run: the pictures.
        clip: reads both.
        prompts: one a picture, in the pictures' order.
        other: pictures that belong to these, by prompt and seed or by name. Of the same prompts, its score is
            subtracted.
        extraction: batch and progress of :func:`diffaccel.eval.features.extract.extract`.

    Raises:
        DiffAccelError: for another number of prompts than pictures, and sets that are not paired.
    """
    mine = _features(run, clip, extraction)
    about = {"extractor": clip.name, "weights_sha256": clip.weights_sha256, "protocol": clip.protocol}
    theirs = None
    if other is not None:
        at = dict(pair(run, other))
        theirs = _features(other, clip, extraction)[[at[i] for i in range(len(run))]]
        about["reference"] = other.name
    found, said = [], list(run.source.warnings)
    units = list(range(len(run))) if prompts is None else list(prompts)
    if prompts is not None:
        texts, cut = _texts(clip, prompts, len(run))
        values = alignment.clip_score(mine, texts)
        score = _row("clip_score", f"clip_score[{clip.name}]", run, values, units, about | {"truncated": cut})
        if theirs is not None and len(set(units)) > 1:
            apart = intervals.paired_difference(values, alignment.clip_score(theirs, texts), clusters=units)
            score.delta, score.delta_interval = apart.interval.value, apart.interval
            score.detail["wins"] = {"share": apart.wins.value, "low": apart.wins.low, "high": apart.wins.high}
        w25 = replace(
            score, metric="clip_score_w2.5", key=f"clip_score_w2.5[{clip.name}]", value=_W25 * float(values.mean()),
            interval=_scaled(score.interval), delta=None if score.delta is None else _W25 * score.delta,
            delta_interval=_scaled(score.delta_interval), detail=dict(score.detail),
        )  # fmt: skip
        found += [score, w25]
        if cut:
            said.append(f"{cut} of {len(run)} prompts are longer than {clip.name} reads and were cut.")
    if theirs is not None:
        found.append(_row("clip_i", f"CLIP-I[{clip.name}]", run, alignment.clip_i(theirs, mine), units, about))
    return found, said


def _features(run: Run, clip: ClipExtractor, extraction: dict[str, Any]) -> Tensor:
    """In the order of the pictures; a run keeps them in its own folder, where a comparison finds them again."""
    found = extract(run.source, clip, cache=run.path / CACHE if run.record else None, **extraction)
    return found.rows([picture.id for picture in run.pictures])


def _texts(clip: ClipExtractor, prompts: Sequence[str], images: int) -> tuple[Tensor, int]:
    """Features of every picture's prompt, each different one read once; and how many pictures have one that was cut."""
    alignment.check_prompts(prompts, images)
    different = list(dict.fromkeys(prompts))
    place = {text: i for i, text in enumerate(different)}
    cut = {text for text in different if clip.truncated([text])}
    return clip.texts(different)[[place[text] for text in prompts]], sum(text in cut for text in prompts)


def _row(metric: str, key: str, run: Run, values: Tensor, units: Sequence[Any], about: dict[str, Any]) -> Row:
    row = Row(
        metric=metric, key=key, family="alignment", run=run.name, better="higher", value=float(values.mean()),
        n=len(values), m=len(values), detail=dict(about),
    )  # fmt: skip
    if len(set(units)) > 1:
        row.interval = intervals.bootstrap_mean(values, clusters=units)
    return row


def _scaled(interval: Interval | None) -> Interval | None:
    if interval is None:
        return None
    value, low, high = (_W25 * end for end in (interval.value, interval.low, interval.high))
    return replace(interval, value=value, low=low, high=high)
