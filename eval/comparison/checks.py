"""What cannot be compared, and what a reader of a comparison must be warned of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from diffaccel.errors import DiffAccelError
from diffaccel.eval.images.source import Source
from diffaccel.eval.networks.extractors.base import Extractor
from diffaccel.eval.networks.scorers import Scorer
from diffaccel.eval.sets.run import Pairs, Run, same_noise

SAME = ("model", "model_digest", "dtype", "device", "size", "guidance")  # settings that runs should share


def kinds(baseline: Run, runs: Sequence[Run]) -> None:
    """Refuse pictures beside videos."""
    what = {True: "videos", False: "pictures"}
    for run in runs:
        if run.is_video != baseline.is_video:
            raise DiffAccelError(
                f"'{run.name}' holds {what[run.is_video]} and '{baseline.name}' {what[baseline.is_video]}. "
                "Compare runs of one kind."
            )


def of_videos(
    extractors: Sequence[Extractor],
    clips: Sequence[Extractor],
    scorers: Sequence[Scorer],
    reference: Source | Path | None,
) -> None:
    """Refuse networks of pictures for runs of videos."""
    given = [*(network.name for network in (*extractors, *clips)), *(scorer.name for scorer in scorers)]
    given += [reference.name] if reference is not None else []
    if given:
        raise DiffAccelError(
            f"The runs hold videos, and {', '.join(given)} go with pictures. Give a network of videos: --fvd."
        )


def warnings(baseline: Run, runs: Sequence[Run], pairs: Mapping[str, Pairs]) -> list[str]:
    """What a reader must know of the runs."""
    everyone = (baseline, *runs)
    said = [f"{run.name}: {text}" for run in everyone if not run.is_video for text in run.source.warnings]
    for run in runs:
        shared = len(pairs[run.name])
        if not shared == len(run) == len(baseline):
            said.append(
                f"{run.name} has {len(run)} pictures, {baseline.name} {len(baseline)}, and {shared} are in both: pairs "
                "are of those, and distances of distributions, of all, do not compare between different counts."
            )
        if same_noise(baseline, run, pairs[run.name]) is False:
            said.append(f"{run.name} and {baseline.name} did not start from equal noise, though seeds are equal.")
        for key in SAME:
            mine, base = (each.record.get("settings", {}).get(key) for each in (run, baseline))
            drawn = all("model" in each.record.get("settings", {}) for each in (run, baseline))
            if mine != base and drawn:  # a function's pictures say nothing of a model
                said.append(f"{run.name} differs from {baseline.name} in {key}: {base} -> {mine}.")
    return said
