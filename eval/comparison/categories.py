"""Paired metrics by category of prompt: where an acceleration costs, and where it does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.eval.comparison.row import Row, Section, digits
from diffaccel.eval.sets import prompts
from diffaccel.eval.sets.run import Run
from diffaccel.eval.uncertainty import intervals
from diffaccel.eval.uncertainty.intervals import Interval

if TYPE_CHECKING:
    from diffaccel.eval.comparison.result import Comparison

KEY = "categories"
FAMILIES = ("fidelity", "alignment")
FEWEST = 10  # prompts of a category; intervals of fewer are far too narrow


def known(baseline: Run, source: str | None = None) -> dict[str, str]:
    """The category of every prompt of a run; empty where there are none.

    Args:
        baseline: the run.
        source: a prompt file with categories, or the name of a packaged set; None looks through the packaged ones for
            one that holds every prompt of the run.

    Raises:
        DiffAccelError: for a file without categories, or without a prompt of the run.
    """
    wanted = set(baseline.prompts or ())
    for name in [source] if source is not None else prompts.names() if wanted else []:
        found = prompts.read(name)
        of = {text: category for text, category in zip(found.texts, found.categories, strict=True) if category}
        if wanted <= of.keys():
            return {text: of[text] for text in wanted}
        if source is not None:
            lacking = sorted(wanted - of.keys())
            raise DiffAccelError(
                f"'{source}' names no category of {len(lacking)} of {len(wanted)} prompts of '{baseline.name}', such "
                f"as '{lacking[0]}'. Give the file that the run was drawn from, with a category of every prompt."
            )
    return {}


def section(comparison: Comparison, of: Mapping[str, str]) -> Section | None:
    """A line for every run and category, with each paired metric's mean and each score's difference to the baseline.

    None where all prompts are of one category.
    """
    names = sorted(set(of.values()))
    keys = dict.fromkeys(row.key for row in comparison.rows if row.family in FAMILIES and not row.missing)
    if len(names) < 2 or not keys:
        return None
    lines, data = [], []
    for run in comparison.runs:
        texts = comparison.units(run.name)
        for name in names:
            at = [i for i, text in enumerate(texts) if of[text] == name]
            found = {key: _of(comparison, key, run.name, at, [texts[i] for i in at]) for key in keys}
            lines.append((run.name, name, str(len(at)), *(text for text, _ in found.values())))
            values = {key: numbers for key, (_, numbers) in found.items()}
            data.append({"run": run.name, "category": name, "n": len(at), "metrics": values})
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


def _of(comparison: Comparison, key: str, run: str, at: Sequence[int], texts: Sequence[str]) -> tuple[str, Any]:
    row = next((row for row in comparison.rows if (row.key, row.run) == (key, run)), None)
    if row is None or not at or (values := comparison.of_pairs(row)) is None:
        return "", None
    if row.family == "alignment":
        base = comparison.values[key][comparison.baseline.name]
        values = values - base[[i for i, _ in comparison.pairs[run]]]
    return _text(row, values[list(at)], texts)


def _text(row: Row, values: Tensor, texts: Sequence[str]) -> tuple[str, Any]:
    finite = torch.isfinite(values)
    kept = [text for text, kept in zip(texts, finite.tolist(), strict=True) if kept]
    if not kept:
        return "identical", {"value": None, "identical": True}
    values, sign, places = values[finite], "+" if row.family == "alignment" else "", digits(row.metric)
    if len(set(kept)) < FEWEST:
        return f"{float(values.mean()):{sign}.{places}f}", {"value": float(values.mean())}
    found: Interval = intervals.bootstrap_mean(values, clusters=kept)
    text = f"{found.value:{sign}.{places}f} ({found.low:{sign}.{places}f} to {found.high:{sign}.{places}f})"
    return text, {"value": found.value, "low": found.low, "high": found.high}
