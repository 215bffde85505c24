"""Paired metrics by category of prompt: on which prompts an acceleration costs quality, and on which it does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.eval.comparison.row import Row, Section, digits, within_bounds, without_lone_carrier
from diffaccel.eval.sets import prompts
from diffaccel.eval.sets.run import Run
from diffaccel.eval.uncertainty import intervals
from diffaccel.eval.uncertainty.intervals import LEAST_FOR_VERDICT

if TYPE_CHECKING:
    from diffaccel.eval.comparison.result import Comparison

KEY = "categories"
FAMILIES = ("fidelity", "alignment")
FEWEST = LEAST_FOR_VERDICT  # prompts of a category; intervals of fewer are far too narrow


def category_of_prompts(baseline: Run, source: str | None = None) -> dict[str, str]:
    """Look up the category of every prompt of a run; empty where there are none.

    Args:
        baseline: the run.
        source: a prompt file with categories, or the name of a packaged set; None looks through the packaged ones for
            one that holds every prompt of the run.

    Raises:
        DiffAccelError: for a file without categories, or without a prompt of the run.
    """
    run_prompts = set(baseline.prompts or ())
    for name in [source] if source is not None else prompts.names() if run_prompts else []:
        prompt_set = prompts.read(name)
        categories = {
            text: category for text, category in zip(prompt_set.texts, prompt_set.categories, strict=True) if category
        }
        if run_prompts <= categories.keys():
            return {text: categories[text] for text in run_prompts}
        if source is not None:
            lacking = sorted(run_prompts - categories.keys())
            raise DiffAccelError(
                f"'{source}' names no category of {len(lacking)} of {len(run_prompts)} prompts of '{baseline.name}', "
                f"such as '{lacking[0]}'. Give the file that the run was drawn from, with a category of every prompt."
            )
    return {}


def section(comparison: Comparison, categories: Mapping[str, str]) -> Section | None:
    """Tabulate by run and category the mean of every distance, and the difference of every score to the baseline.

    Args:
        comparison: with its rows and the values of every pair.
        categories: by prompt, of :func:`category_of_prompts`.

    Returns:
        The table; None where all prompts are of one category.
    """
    names = sorted(set(categories.values()))
    keys = dict.fromkeys(row.key for row in comparison.rows if row.family in FAMILIES and not row.missing)
    if len(names) < 2 or not keys:
        return None
    lines, data = [], []
    for run in comparison.runs:
        texts = comparison.clusters(run.name)
        for name in names:
            positions = [i for i, text in enumerate(texts) if categories[text] == name]
            cells = {key: _category_cell(comparison, key, run.name, positions) for key in keys}
            lines.append((run.name, name, str(len(positions)), *(text for text, _ in cells.values())))
            metrics = {key: numbers for key, (_, numbers) in cells.items()}
            data.append({"run": run.name, "category": name, "n": len(positions), "metrics": metrics})
    heads = [f"{key}, difference" if _is_score(comparison, key) else key for key in keys]
    note = (
        f"Means over the pairs of a category, with 95 % intervals over its prompts where it has {FEWEST}; scores are "
    )
    note += "differences to the baseline. Of many intervals one in twenty excludes 0 by chance alone."
    return Section(
        key=KEY, title="By category of prompt", columns=("run", "category", "n", *heads), rows=tuple(lines),
        note=note,
        data={"categories": data},
    )  # fmt: skip


def _is_score(comparison: Comparison, key: str) -> bool:
    return any(row.key == key and row.family == "alignment" for row in comparison.rows)


def _category_cell(comparison: Comparison, key: str, run: str, positions: Sequence[int]) -> tuple[str, Any]:
    """Return the text and the numbers of a metric at the pairs of one category; "" and None where there are none."""
    row = next((row for row in comparison.rows if (row.key, row.run) == (key, run)), None)
    if row is None or not positions or (values := comparison.pair_values(row)) is None:
        return "", None
    if row.family == "alignment":
        base_values = comparison.values[key][comparison.baseline.name]
        values = values - base_values[[i for i, _ in comparison.pairs[run]]]
    prompts_of_pairs = comparison.clusters(run)
    return _cell(row, values[list(positions)], [prompts_of_pairs[i] for i in positions])


def _cell(row: Row, values: Tensor, texts: Sequence[str]) -> tuple[str, Any]:
    """Return the mean of values as text and as numbers, with its interval where there are enough prompts."""
    finite, count = torch.isfinite(values), len(values)
    clusters = [text for text, is_finite in zip(texts, finite.tolist(), strict=True) if is_finite]
    if not clusters:
        return "identical", {"value": None, "identical": True}
    values, sign, places = values[finite], "+" if row.family == "alignment" else "", digits(row.metric)
    equal = count - len(values)
    more = f", {equal} identical" if equal else ""
    numbers: dict[str, Any] = {"identical_pairs": equal} if equal else {}
    if len(set(clusters)) < FEWEST:
        return f"{float(values.mean()):{sign}.{places}f}{more}", {"value": float(values.mean()), **numbers}
    mean = intervals.bootstrap_mean(values, clusters=clusters)
    interval, note, carriers = without_lone_carrier(
        within_bounds(row.metric, mean, is_difference=row.family == "alignment")
    )
    if carriers is not None:
        more = f"{more}, {note}"
        numbers["carried_by"] = carriers
    if interval is None:
        return f"{mean.value:{sign}.{places}f}{more}", {"value": mean.value, **numbers}
    numbers |= {"value": interval.value, "low": interval.low, "high": interval.high}
    value, low, high = (f"{number:{sign}.{places}f}" for number in (interval.value, interval.low, interval.high))
    return f"{value} ({low} to {high}){more}", numbers
