"""Scores that every picture has by itself, such as a CLIP score: rows with paired differences to the baseline."""

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
    """A score of single pictures, as rows name it.

    Attributes:
        metric, key, family, better, unit, detail: as :class:`diffaccel.eval.comparison.row.Row` has them.
    """

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
    other_values: Tensor | None = None,
) -> tuple[list[Row], dict[str, Tensor]]:
    """Return a row of the baseline and of each run, and by run the scores of its pairs.

    Args:
        score: the score that was measured.
        values: by run, the score of each of its pictures, in their order; of the baseline too.
        baseline, runs: the runs that were measured.
        pairs: by run, which of its pictures belongs to which of the baseline.
        other_values: scores of the baseline's pictures of other seeds, for the floor of the difference.
    """
    base_values = values[baseline.name]
    floor = None if other_values is None else abs(float(other_values.mean() - base_values.mean()))
    score_rows = [_row(score, baseline, base_values, cluster_labels(baseline))]
    pair_values = {baseline.name: base_values}
    for run in runs:
        run_pairs = pairs[run.name]
        run_values, paired_values = values[run.name][[j for _, j in run_pairs]], base_values[[i for i, _ in run_pairs]]
        clusters = cluster_labels(baseline, run_pairs)
        row = _row(score, run, run_values, clusters)
        row.delta, row.floor = float((run_values - paired_values).mean()), floor
        if row.interval is not None:
            difference = intervals.paired_difference(run_values, paired_values, clusters=clusters, better=score.better)
            row.delta_interval = difference.interval
            wins = difference.wins
            row.detail["wins"] = {"share": wins.value, "low": wins.low, "high": wins.high}
        score_rows.append(row)
        pair_values[run.name] = run_values
    return score_rows, pair_values


def cluster_labels(baseline: Run, pairs: Pairs | None = None) -> list[Any]:
    """Return the label of every pair's cluster, the unit that bootstrap intervals resample.

    It is the pair's prompt, or the position of the baseline's picture where there are no prompts.

    Args:
        baseline: the run whose prompts are the labels.
        pairs: of which labels are wanted; None for every picture of the baseline.
    """
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
