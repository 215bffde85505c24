"""How well pictures fit their prompts, by a CLIP that looks at both, and what changed since the baseline.

The score is 100 max(cos, 0) of a picture's and its prompt's features (arXiv 2104.08718), then the mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.eval import alignment, intervals
from diffaccel.eval.comparison.distribution import features
from diffaccel.eval.comparison.row import Row
from diffaccel.eval.extractors.clip import ClipExtractor
from diffaccel.eval.runs import Pairs, Run


def rows(
    baseline: Run, runs: Sequence[Run], pairs: Mapping[str, Pairs], others: Run | None, clip: ClipExtractor
) -> tuple[list[Row], dict[str, Tensor]]:
    """The baseline's row and one of each run with paired differences; and every pair's score by run."""
    everyone = [baseline, *runs, *([others] if others is not None else [])]
    for run in everyone:
        if run.prompts is None:
            raise DiffAccelError(
                f"The prompts of '{run.name}' are not known. Leave --clip out, or compare runs of diffaccel."
            )
    texts = list(dict.fromkeys(prompt for run in everyone for prompt in run.prompts or []))
    place, embedded = {text: i for i, text in enumerate(texts)}, clip.texts(texts)

    def scores(run: Run) -> Tensor:
        return alignment.clip_score(features(run, clip), embedded[[place[prompt] for prompt in run.prompts or []]])

    values = {baseline.name: scores(baseline)}
    for run in runs:
        values[run.name] = scores(run)[[j for _, j in pairs[run.name]]]
    floor = None if others is None else abs(float(scores(others).mean() - values[baseline.name].mean()))
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
