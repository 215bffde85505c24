"""Checks of a comparison's runs: what cannot be compared raises, what a reader must know becomes a warning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from diffaccel.errors import DiffAccelError
from diffaccel.eval.comparison.zoo_reference import ShippedStatistics
from diffaccel.eval.images.source import Source
from diffaccel.eval.networks.extractors.base import Extractor
from diffaccel.eval.networks.scorers import Scorer
from diffaccel.eval.sets.run import Pairs, Run, pair_by_prompt, same_noise
from diffaccel.runs.request import WAY

SAME = ("model", "model_digest", "dtype", "device", "size", "guidance")  # settings that runs should share


def check_same_kind(baseline: Run, runs: Sequence[Run]) -> None:
    """Raise when pictures are compared with videos."""
    kind = {True: "videos", False: "pictures"}
    for run in runs:
        if run.is_video != baseline.is_video:
            raise DiffAccelError(
                f"'{run.name}' holds {kind[run.is_video]} and '{baseline.name}' {kind[baseline.is_video]}. "
                "Compare runs of one kind."
            )


def check_other_seeds(baseline: Run, others: Run | None) -> None:
    """Raise unless a run is the baseline with other seeds: what another way of drawing changes is no chance.

    Settings that only one of the records has, as those of a user's function, are not compared.
    """
    if others is None:
        return
    pair_by_prompt(baseline, others)
    shared = {picture.key for picture in baseline.pictures} & {picture.key for picture in others.pictures}
    if shared:
        raise DiffAccelError(
            f"'{others.name}' cannot stand for other seeds: {len(shared)} of its {len(others)} pictures have the "
            f"prompt and the seed of one of '{baseline.name}'. Draw the baseline with another --seed."
        )
    settings, base_settings = (run.record.get("settings", {}) for run in (others, baseline))
    for key in WAY:
        if key in settings and key in base_settings and settings[key] != base_settings[key]:
            raise DiffAccelError(
                f"'{others.name}' cannot stand for other seeds: it differs from '{baseline.name}' in {key} "
                f"({base_settings[key]} -> {settings[key]}). Draw the baseline itself with another --seed."
            )


def check_no_picture_networks(
    extractors: Sequence[Extractor],
    clips: Sequence[Extractor],
    scorers: Sequence[Scorer],
    reference: Source | Path | ShippedStatistics | None,
) -> None:
    """Raise when networks of pictures, or a reference of pictures, are given for runs of videos."""
    names = [*(network.name for network in (*extractors, *clips)), *(scorer.name for scorer in scorers)]
    names += [reference.name] if reference is not None else []
    if names:
        raise DiffAccelError(
            f"The runs hold videos, and {', '.join(names)} go with pictures. Give a network of videos: --fvd."
        )


def warnings(baseline: Run, runs: Sequence[Run], pairs: Mapping[str, Pairs]) -> list[str]:
    """Collect what a reader must know: damaged images, unequal counts, unequal noise, settings that differ."""
    texts = [f"{run.name}: {text}" for run in (baseline, *runs) for text in run.warnings]
    for run in runs:
        shared = len(pairs[run.name])
        if not shared == len(run) == len(baseline):
            texts.append(
                f"{run.name} has {len(run)} pictures, {baseline.name} {len(baseline)}, and {shared} are in both: pairs "
                "are of those, and distances of distributions, of all, do not compare between different counts."
            )
        if same_noise(baseline, run, pairs[run.name]) is False:
            texts.append(f"{run.name} and {baseline.name} did not start from equal noise, though seeds are equal.")
        settings, base_settings = (item.record.get("settings", {}) for item in (run, baseline))
        if "model" not in settings or "model" not in base_settings:
            continue  # the pictures of a function come from no model
        for key in SAME:
            value, base_value = settings.get(key), base_settings.get(key)
            if value != base_value:
                texts.append(f"{run.name} differs from {baseline.name} in {key}: {base_value} -> {value}.")
    return texts
