"""Rows of a score that every picture has by itself: the baseline's, and each run's with paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from diffaccel.eval.comparison.row import Better, Family, Row
from diffaccel.eval.sets.run import Pairs, Run
from diffaccel.eval.uncertainty import intervals


@dataclass(frozen=True, kw_only=True)
class Score:
    """What is scored, as rows name it."""

    metric: str
    key: str
    family: Family
    better: Better = "higher"
    unit: str = ""
    detail: dict[str, Any] = field(default_factory=dict)


def rows(
    score: Score,
    values: Mapping[str, Tensor],
    baseline: Run,
    runs: Sequence[Run],
    pairs: Mapping[str, Pairs],
    others: Tensor | None = None,
) -> tuple[list[Row], dict[str, Tensor]]:
    """A row of the baseline and of each run, and by run the scores of its pairs.

    Args:
        score: what is scored.
        values: by run, a score of each of its pictures, in their order; of the baseline too.
        baseline, runs, pairs: which pictures belong together.
        others: scores of the baseline's pictures of other seeds, for the floor of the difference.
    """
    base = values[baseline.name]
    floor = None if others is None else abs(float(others.mean() - base.mean()))
    kept, found = {baseline.name: base}, [_row(score, baseline, base, units(baseline))]
    for run in runs:
        at = pairs[run.name]
        mine, theirs = values[run.name][[j for _, j in at]], base[[i for i, _ in at]]
        clusters = units(baseline, at)
        row = _row(score, run, mine, clusters)
        row.delta, row.floor = float((mine - theirs).mean()), floor
        if row.interval is not None:
            apart = intervals.paired_difference(mine, theirs, clusters=clusters, better=score.better)
            row.delta_interval = apart.interval
            row.detail["wins"] = {"share": apart.wins.value, "low": apart.wins.low, "high": apart.wins.high}
        found.append(row)
        kept[run.name] = mine
    return found, kept


def units(baseline: Run, pairs: Pairs | None = None) -> list[Any]:
    """What intervals draw, a label a pair: its prompt, or the picture itself where there are no prompts."""
    places = range(len(baseline)) if pairs is None else [i for i, _ in pairs]
    prompts = baseline.prompts
    return [i if prompts is None else prompts[i] for i in places]


def _row(score: Score, run: Run, values: Tensor, clusters: Sequence[Any]) -> Row:
    row = Row(
        metric=score.metric, key=score.key, family=score.family, run=run.name, better=score.better, unit=score.unit,
        value=float(values.mean()), n=len(values), m=len(values), detail=dict(score.detail),
    )  # fmt: skip
    if len(set(clusters)) > 1:
        row.interval = intervals.bootstrap_mean(values, clusters=clusters)
    return row
