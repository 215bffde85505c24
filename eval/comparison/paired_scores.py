"""Scores that every picture has by itself, such as a CLIP score: rows with paired differences to the baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from diffaccel.eval.comparison.row import Better, Estimate, Family, Row
from diffaccel.eval.sets.run import Pairs, Run, pair_by_prompt
from diffaccel.eval.uncertainty import intervals

ALONE = "one prompt: no interval"


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
    others: tuple[Run, Tensor] | None = None,
) -> tuple[list[Row], dict[str, Tensor]]:
    """Return a row of the baseline and of each run, and by run the scores of its pairs.

    Args:
        score: the score that was measured.
        values: by run, the score of each of its pictures, in their order; of the baseline too.
        baseline, runs: the runs that were measured.
        pairs: by run, which of its pictures belongs to which of the baseline.
        others: the baseline with other seeds, and its scores: what chance alone does to the difference.
    """
    base_values = values[baseline.name]
    floor = None if others is None else _floor(baseline, base_values, *others)
    score_rows = [_row(score, baseline, base_values, cluster_labels(baseline))]
    pair_values = {baseline.name: base_values}
    for run in runs:
        run_pairs = pairs[run.name]
        run_values, paired_values = values[run.name][[j for _, j in run_pairs]], base_values[[i for i, _ in run_pairs]]
        clusters = cluster_labels(baseline, run_pairs)
        row = _row(score, run, run_values, clusters)
        row.delta = float((run_values - paired_values).mean())
        if floor is not None:
            row.set_floor(floor, is_difference=True)
        if len(set(clusters)) > 1:
            difference = intervals.paired_difference(run_values, paired_values, clusters=clusters, better=score.better)
            row.set_interval("delta_interval", difference.interval)
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


def _floor(baseline: Run, base_values: Tensor, others: Run, other_values: Tensor) -> Estimate:
    """Return the mean score of other seeds minus the baseline's, paired by prompt, with its interval."""
    pairs = pair_by_prompt(baseline, others)
    change = other_values[[j for _, j in pairs]] - base_values[[i for i, _ in pairs]]
    return mean_estimate(change, cluster_labels(baseline, pairs), null=0.0)


def mean_estimate(values: Tensor, clusters: Sequence[Any], *, null: float | None = None) -> Estimate:
    """Return the mean of values, with its interval over whole clusters where there are at least two of them.

    Args:
        values: (n,), finite.
        clusters: a label of every value.
        null: the value of "no effect", for a difference.
    """
    if len(set(clusters)) < 2:
        return Estimate(float(values.mean()), note=ALONE)
    interval = replace(intervals.bootstrap_mean(values, clusters=clusters), null=null)
    return Estimate(interval.value, interval)


def _row(score: Score, run: Run, values: Tensor, clusters: Sequence[Any]) -> Row:
    row = Row(
        metric=score.metric, key=score.key, family=score.family, run=run.name, better=score.better, unit=score.unit,
        value=float(values.mean()), n=len(values), m=len(values), detail=dict(score.detail),
    )  # fmt: skip
    mean = mean_estimate(values, clusters)
    row.add_note(mean.note)
    row.set_interval("interval", mean.interval)
    return row
