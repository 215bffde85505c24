"""How well pictures fit their prompts, by a CLIP that looks at both, and what changed since the baseline."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.eval import alignment, intervals
from diffaccel.eval.comparison.distribution import features
from diffaccel.eval.comparison.row import Row
from diffaccel.eval.extractors.clip import ClipExtractor
from diffaccel.eval.runs import Run, pair


def scores(run: Run, clip: ClipExtractor) -> Tensor:
    """100 max(cos, 0) of every picture and its prompt (arXiv 2104.08718): (n,) float64."""
    prompts = run.prompts
    if prompts is None:
        raise DiffAccelError(
            f"The prompts of '{run.name}' are not known. Leave --clip out, or compare runs of diffaccel."
        )
    texts = list(dict.fromkeys(prompts))
    place = {text: i for i, text in enumerate(texts)}
    embedded = clip.texts(texts)[[place[prompt] for prompt in prompts]]
    return alignment.clip_score(features(run, clip), embedded)


def rows(
    baseline: Run, runs: Sequence[Run], others: Run | None, clip: ClipExtractor
) -> tuple[list[Row], dict[str, Tensor]]:
    """The baseline's row and one of each run with paired differences; and every pair's score by run."""
    values = {baseline.name: scores(baseline, clip)}
    for run in runs:
        order = torch.tensor([j for _, j in pair(baseline, run)])
        values[run.name] = scores(run, clip)[order]
    floor = None if others is None else abs(float(scores(others, clip).mean() - values[baseline.name].mean()))
    detail = {"extractor": clip.name, "weights_sha256": clip.weights_sha256, "convention": "100 max(cos, 0) a picture"}
    if cut := clip.truncated(list(dict.fromkeys(baseline.prompts or []))):
        detail["from"] = f"{cut} prompts were too long for it and cut"
    found = []
    for run in (baseline, *runs):
        mine = values[run.name]
        row = Row(
            metric="clip_score", key=f"clip_score[{clip.name}]", family="alignment", run=run.name, better="higher",
            value=float(mine.mean()), n=len(mine), m=len(mine), detail=dict(detail),
        )  # fmt: skip
        if len(set(baseline.prompts or [])) > 1:
            row.interval = intervals.bootstrap_mean(mine, clusters=baseline.prompts)
            if run is not baseline:
                apart = intervals.paired_difference(mine, values[baseline.name], clusters=baseline.prompts)
                row.delta_interval = apart.interval
                row.detail["wins"] = {"share": apart.wins.value, "low": apart.wins.low, "high": apart.wins.high}
        if run is not baseline:
            row.delta, row.floor = float((mine - values[baseline.name]).mean()), floor
        found.append(row)
    return found, {run.name: values[run.name] for run in runs}
