"""What a gate needs: which networks measure its metrics, and a number of every pair of pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffaccel.errors import DiffAccelError, unknown
from diffaccel.eval.comparison import compare_runs
from diffaccel.eval.comparison.fidelity import BUILT_IN, LATENTS, lpips_distance
from diffaccel.eval.comparison.measures import Measures
from diffaccel.eval.comparison.result import Comparison
from diffaccel.eval.comparison.row import Row
from diffaccel.eval.networks import by_spec, scorers
from diffaccel.eval.networks.extractors import clips
from diffaccel.eval.networks.lpips import load as load_lpips
from diffaccel.eval.sets.run import Run
from diffaccel.eval.tuning.rule import COST

JUDGE, LPIPS = "emoji-clip-judge", "lpips"
PERFECT = {"ssim": 1.0, "psnr": math.inf, LPIPS: 0.0, LATENTS.metric: 0.0}  # of equal pictures; nothing is nearer
_BY_CLIP = ("clip_score", "CLIP-I")


def measures_of(metrics: Sequence[str], *, lpips: str | Path | None, device: Any) -> Measures:
    """Load what measures the metrics of a gate.

    Args:
        metrics: names as ``--fail-if`` of ``diffaccel eval compare`` takes them.
        lpips: weights of LPIPS, a file or a folder; None looks where they usually are.
        device: on which networks compute.

    Raises:
        MissingWeights: for weights that are not on this machine.
        DiffAccelError: for an unknown metric, and one of whole sets of pictures.
    """
    distances, names, preference = list(BUILT_IN), [], []
    for metric in metrics:
        head, _, network = metric.partition("[")
        if head in _BY_CLIP:
            names.append(network.removesuffix("]") or JUDGE)
        elif metric in scorers.KNOWN:
            preference.append(by_spec.scorer(metric, device))
        elif metric == LPIPS:
            distances.append(lpips_distance(load_lpips(lpips, device=device)))
        elif metric not in {*COST, LATENTS.metric, *(distance.metric for distance in BUILT_IN)}:
            known = [*COST, LATENTS.metric, LPIPS, *(d.metric for d in BUILT_IN), *scorers.KNOWN]
            raise unknown("metric of a tuning", metric, [*known, *(f"clip_score[{name}]" for name in clips())])
    return Measures.load(
        extractors=(), clips=list(dict.fromkeys(names)), device=str(device), distances=distances, scorers=preference
    )


def compare_pair(baseline: Run, run: Run, measures: Measures) -> Comparison:
    """Measure a run against the baseline's run of the same part."""
    return compare_runs(replace(baseline, name="baseline"), [replace(run, name="plan")], measures)


def numbers(comparison: Comparison, metrics: Sequence[str]) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Return by metric the number of every pair that a gate compares, and of cost one number a plan.

    Raises:
        DiffAccelError: for a metric that was not measured, with the reason.
    """
    values: dict[str, list[float]] = {}
    for metric in metrics:
        if metric in COST:
            continue
        row = _row(comparison, metric)
        pairs = comparison.values[row.key]
        own = pairs["plan"] if row.delta is None else pairs["plan"] - pairs["baseline"]
        values[metric] = [float(number) for number in own]
    gate_values = comparison.gate_values("plan")
    cost = {metric: gate_values.get(metric) for metric in ("nfe", "forwards", "peak_memory")}
    return values, {metric: float(value) for metric, value in cost.items() if value is not None}


def own_values(comparison: Comparison, metrics: Sequence[str]) -> dict[str, float]:
    """Return by metric what a gate compares of the baseline itself, from a comparison with itself."""
    values, cost = numbers(comparison, metrics)
    return {**{metric: _mean(pairs) for metric, pairs in values.items()}, **cost}


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.inf


def _row(comparison: Comparison, metric: str) -> Row:
    rows = [row for row in comparison.rows if row.run == "plan" and metric in (row.key, row.metric)]
    if len(rows) != 1 or rows[0].missing or rows[0].key not in comparison.values:
        why = rows[0].missing if rows and rows[0].missing else "it has no number of every picture here"
        if len(rows) > 1:
            why = f"it may be {' or '.join(row.key for row in rows)}"
        raise DiffAccelError(f"'{metric}' cannot be tuned for: {why}. Name another one in --fail-if.")
    return rows[0]
