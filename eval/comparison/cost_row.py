"""A row of cost: its name on a page, and the sentence for a run that knows a part of its own cost only."""

from __future__ import annotations

from typing import Any

from diffaccel.eval.comparison.row import Row
from diffaccel.eval.sets.run import Run

LABELS = {
    "nfe": "NFE", "forwards": "rows through the network", "speedup": "speed-up", "peak_memory": "peak memory",
    "energy_ratio": "energy, of the baseline's", "first_call": "first call", "set_up": "set-up",
}  # fmt: skip


def cost_row(metric: str, run: Run, value: float, *, better: Any = "lower", unit: str = "", detail: Any = None) -> Row:
    """Return a row of the family of costs; ``n`` is the number of pictures until it is set."""
    return Row(
        metric=metric, key=LABELS.get(metric, metric), family="cost", run=run.name, better=better,
        value=float(value), unit=unit, n=len(run), detail=detail or {},
    )  # fmt: skip


def part_of_a_search(run: Run) -> str:
    """Return why a run's own times, rows and memory are those of a part: it ends a search that was stopped; or ""."""
    resumed = (run.record.get("cost") or {}).get("resumed")
    if resumed is None:
        return ""
    return (
        f"a search went on that had been stopped after {resumed['nfe']} of its NFE: what the process before took is "
        "not in the record"
    )
