"""Tables of a report: runs x metrics with verdicts, and below them every row as it was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffaccel.eval.comparison import verdict
from diffaccel.eval.comparison.text import FAMILIES, of_things
from diffaccel.eval.comparison.verdict import Row
from diffaccel.eval.report.names import clean
from diffaccel.eval.report.summary import (
    Cell,
    cell,
    count_text,
    counted_things,
    noise_text,
    note_text,
    rows_of,
    things_of,
)

MOST_NOTES = 6  # of single runs below a table
FULL_HEADS = ("run", "metric", "value", "95 % interval", "difference", "verdict", "other seeds", "n", "note")

GROUPS = {
    "Quality, picture by picture": ("alignment", "fidelity", "video"),
    "Distribution": ("distribution",),
    "Cost of a picture": ("cost",),
}


@dataclass(frozen=True)
class MetricTable:
    """A table of runs x metrics.

    Attributes:
        title: as the page shows it.
        family: of its first metrics.
        heads: a metric's full name, an arrow to its better side, and what other seeds of the baseline do.
        rows: a run's name, and a cell for every metric.
        notes: a sentence on some metrics, and their names.
    """

    title: str
    family: str
    heads: list[dict[str, str]]
    rows: list[tuple[str, list[Cell]]]
    notes: list[tuple[str, list[str]]]


@dataclass(frozen=True)
class FullTable:
    """All rows of a family as text, with the columns that hold something."""

    title: str
    heads: tuple[str, ...]
    rows: list[tuple[str, ...]]


def arrow(row: Row) -> str:
    """Return an arrow towards the better side."""
    return "↓" if row["better"] == "lower" else "↑"


def metric_tables(report: Mapping[str, Any]) -> list[MetricTable]:
    """Return tables of runs x metrics: quality by prompt, distribution and cost, in the order of the runs."""
    return [table for title, families in GROUPS.items() if (table := _metric_table(report, title, families)).heads]


def _metric_table(report: Mapping[str, Any], title: str, families: Sequence[str]) -> MetricTable:
    runs, things = [run["name"] for run in report["runs"]], things_of(report)
    by_run = {run: rows_of(report, run) for run in runs}
    rows = [row for family in families for row in report["metrics"] if row["family"] == family]
    first = {row["key"]: row for row in reversed(rows)}
    keys = list(dict.fromkeys(row["key"] for row in rows))
    heads = [
        {"key": key, "arrow": arrow(first[key]), "noise": _shared([r for r in rows if r["key"] == key], noise_text)}
        for key in keys
    ]
    lines = [
        (run, [cell(by_run[run].get(key), key, things) for key in keys])
        for run in runs
        if any(key in by_run[run] for key in keys)
    ]
    return MetricTable(of_things(title, things), families[0], heads, lines, _notes(keys, rows, things))


def full_tables(report: Mapping[str, Any]) -> list[FullTable]:
    """Return every row as text, grouped by family and metric by metric, each in the order of the runs."""
    tables, things = [], things_of(report)
    for family, title in FAMILIES.items():
        rows = [row for row in report["metrics"] if row["family"] == family]
        order = {key: place for place, key in enumerate(dict.fromkeys(row["key"] for row in rows))}
        lines = [_full_line(row, things) for row in sorted(rows, key=lambda row: order[row["key"]])]
        if lines:
            kept = [i for i, head in enumerate(FULL_HEADS) if i < 3 or any(line[i] for line in lines)]
            heads = tuple(FULL_HEADS[i] for i in kept)
            tables.append(FullTable(of_things(title, things), heads, [tuple(line[i] for i in kept) for line in lines]))
    return tables


def _full_line(row: Row, things: str) -> tuple[str, ...]:
    text = cell(row, row["key"], things)
    counts = str(row.get("n") or "") if row.get("m") in (None, row.get("n")) else f"{row['n']} / {row['m']}"
    note = text.note
    if pairs := (row.get("detail") or {}).get("identical_pairs"):
        note = "; ".join(filter(None, (note, f"without {pairs} identical pairs, which have no {row['key']}")))
    return (
        clean(row["run"]), f"{clean(row['key'])} {arrow(row)}", text.value, text.interval, text.difference,
        verdict.word(row), noise_text(row), counts, note,
    )  # fmt: skip


def _notes(keys: Sequence[str], rows: Sequence[Row], things: str) -> list[tuple[str, list[str]]]:
    """Return notes on metrics, each with the metrics that have it, and their runs where not all runs have it.

    Notes of single runs are left to the table of every number where there are more than :data:`MOST_NOTES`.
    """
    notes: dict[str, list[str]] = {}
    single: dict[str, list[str]] = {}
    for key in keys:
        shown = [row for row in rows if row["key"] == key and row.get("value") is not None]
        by_run = {row["run"]: note_text(row, things) for row in shown}
        for note in dict.fromkeys(by_run.values()):
            runs = [run for run, text in by_run.items() if text == note]
            if note and len(runs) == len(by_run):
                notes.setdefault(note, []).append(key)
            elif note:
                single.setdefault(note, []).append(f"{key} of {' and '.join(runs)}")
    return [*notes.items(), *(single.items() if len(single) <= MOST_NOTES else ())]


def _shared(rows: Sequence[Row], text_of: Any) -> str:
    """Return the one text that rows share; "" where they differ."""
    texts = {text_of(row) for row in rows} - {""}
    return texts.pop() if len(texts) == 1 else ""


def counted(report: Mapping[str, Any]) -> str:
    """Return in words how many pictures or videos, on which device and when: the line above a report."""
    base = next((run for run in report["runs"] if run["name"] == report["baseline"]), report["runs"][0])
    things = things_of(report)
    device = clean((base.get("device") or {}).get("name") or "")
    texts = (count_text(row, things) for row in report["metrics"])
    prompts = next((text for text in texts if "prompts" in text), "")
    counts = sorted({run["images"] for run in report["runs"]})
    if len(counts) > 1:  # of which the prompts of one run say nothing
        images, prompts = f"{counts[0]} to {counted_things(counts[-1], things)}", ""
    else:
        images = counted_things(base["images"], things)
    parts = [f"{images} a run", f"of {prompts}" if prompts else "", device, report["made"][:10]]
    return ", ".join(filter(None, [" ".join(filter(None, parts[:2])), *parts[2:]]))
