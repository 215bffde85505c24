"""A report as CSV, every number with its ends, and as a LaTeX table of the runs with booktabs."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any

from diffaccel.eval.comparison import verdict
from diffaccel.eval.comparison.verdict import Row
from diffaccel.eval.report import tables
from diffaccel.eval.report.names import clean, split_key
from diffaccel.eval.report.names import latex_text as escaped
from diffaccel.eval.report.summary import Cell, RunSummary, cell, main_keys, rows_of, summaries, things_of

COLUMNS = (
    "run", "metric", "key", "family", "better", "verdict", "value", "low", "high", "delta", "delta_low", "delta_high",
    "floor", "floor_low", "floor_high", "n", "m", "unit", "identical", "missing", "note",
)  # fmt: skip
IN_TURNS = ("energy_ratio", "energy", "peak_memory")  # costs of the LaTeX table beside the speed-up
_FORMULAS = ("=", "+", "-", "@")  # with these a spreadsheet would take a text for a formula


def csv_text(report: Mapping[str, Any]) -> str:
    """Return all rows as CSV: a line for every metric of every run, numbers to their last digit.

    A number that is not there is an empty cell. A text that a spreadsheet would take for a formula has ``'`` before it.
    """
    buffer, things = io.StringIO(), things_of(report)
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in report["metrics"]:
        values = _values(row, things)
        writer.writerow([_csv_cell(values[column]) for column in COLUMNS])
    return buffer.getvalue()


def _values(row: Row, things: str) -> dict[str, Any]:
    interval, delta = row.get("interval") or {}, row.get("delta_interval") or {}
    floor, floor_ends = verdict.floor(row)
    low, high = floor_ends or (None, None)
    return {
        **{column: row.get(column) for column in COLUMNS},
        "verdict": verdict.word(row), "low": interval.get("low"), "high": interval.get("high"),
        "delta_low": delta.get("low"), "delta_high": delta.get("high"),
        "floor": floor, "floor_low": low, "floor_high": high,
        "note": "" if row.get("missing") else cell(row, row["key"], things).note,
    }  # fmt: skip


def _csv_cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    text = clean(value)
    return f"'{text}" if text.startswith(_FORMULAS) else text


def latex_text(report: Mapping[str, Any]) -> str:
    """Return a table of the runs: speed-up, main measures, energy and memory with their intervals, the baseline first.

    Energy and memory are there where turns were read for them.

    Needs the packages ``booktabs`` and, for names beyond ASCII, ``inputenc`` in UTF-8.
    """
    keys, runs, things = main_keys(report), summaries(report), things_of(report)
    first = {row["key"]: row for row in reversed(report["metrics"])}
    costs = [key for key, row in first.items() if row["metric"] in IN_TURNS and row.get("interval")]
    arrows = {key: tables.arrow(first[key]) for key in (*keys, *costs)}
    heads = ["Run", r"Speed-up $\uparrow$", *(_head(key, arrow) for key, arrow in arrows.items()), "Verdict"]
    base = rows_of(report, report["baseline"])
    lines = [
        r"% needs \usepackage{booktabs}",
        r"\begin{table}",
        r"\centering",
        f"\\caption{{Against {escaped(report['baseline'])}: {escaped(tables.counted(report))}. Differences to the "
        r"baseline where there are some, else values; in brackets 95\,\% intervals.}",
        f"\\begin{{tabular}}{{l{'r' * (len(arrows) + 1)}l}}",
        r"\toprule",
        f"{' & '.join(heads)} \\\\",
        r"\midrule",
        " & ".join(
            [
                escaped(report["baseline"]),
                "1",
                *(_base_cell(base.get(key)) for key in keys),
                *_costs(base, costs, things),
                "",
            ]
        )
        + r" \\",
        *(_line(run, _costs(rows_of(report, run.run), costs, things)) for run in runs),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _head(key: str, arrow: str) -> str:
    name, network = split_key(key)
    small = f" {{\\scriptsize {escaped(network)}}}" if network else ""
    return f"{escaped(name)}{small} {escaped(arrow)}"


def _base_cell(row: Row | None) -> str:
    return _signed(verdict.number(row, row.get("value"))) if row else ""


def _line(run: RunSummary, costs: list[str]) -> str:
    speed = run.speed.value + _small(run.speed.interval)
    return " & ".join([escaped(run.run), speed, *(_cell(cell) for cell in run.cells), *costs, run.word]) + r" \\"


def _costs(rows: Mapping[str, Row], keys: list[str], things: str) -> list[str]:
    """Return the cells of energy and memory; the baseline's ratio to itself is left empty."""
    cells = [cell(rows.get(key), key, things) for key in keys]
    return [f"{escaped(one.value)}{_small(one.interval)}" for one in cells]


def _cell(cell: Cell) -> str:
    if cell.delta:
        return f"{_signed(cell.delta)}{_small(cell.delta_interval)}"
    return f"{escaped(cell.value)}{_small(cell.interval)}"


def _small(interval: str) -> str:
    """Return an interval in small print, its ends in brackets."""
    if not interval:
        return ""
    low, _, high = interval.partition(" to ")
    return f" {{\\scriptsize [{_signed(low)}, {_signed(high)}]}}"


def _signed(number: str) -> str:
    """Return a number with a sign as mathematics, so that its minus is one."""
    return f"${number}$" if number[:1] in ("-", "+") else number
