"""A report in a terminal: a sentence and a row for every run, then every number, in aligned columns."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from diffaccel.eval.comparison import verdict
from diffaccel.eval.report import tables
from diffaccel.eval.report.names import clean, short_names
from diffaccel.eval.report.summary import bracketed, headline, main_keys, summaries

COLOURS = {verdict.BETTER: "green", verdict.WORSE: "red", verdict.SAME: "cyan", verdict.NOT_SHOWN: "dim"}
Table = tuple[str, Sequence[str], Sequence[Sequence[str]]]  # title, heads, rows


def write(report: Mapping[str, Any]) -> None:
    """Write the report to stdout: as wide as the terminal and coloured where it can be, else plain.

    Args:
        report: what is in ``report.json``.
    """
    sys.stdout.write(text(report, sys.stdout) + "\n")
    sys.stdout.flush()


def text(report: Mapping[str, Any], stream: TextIO) -> str:
    """Return the report as text for a stream; whatever names hold, no control character is in it but colours."""
    parts = [clean(f"{headline(report)}. {tables.counted(report)}, against {report['baseline']}; 95 % intervals"), ""]
    parts += [clean(f"{run.run}: {run.sentence}.") for run in summaries(report)]
    watched = stream.isatty()
    blocks = [_summary_table(report), *(_full_table(table, watched) for table in tables.full_tables(report))]
    blocks += [
        (section["title"], section["columns"], section["rows"])
        for section in (report.get("sections") or {}).values()
    ]  # fmt: skip
    for title, heads, rows in blocks:
        kept = [i for i in range(len(heads)) if any(row[i] for row in rows)]
        cells = [[printable_cell(row[i]) for i in kept] for row in (heads, *rows)]
        parts += ["", clean(title), _drawn(cells, stream) if watched else _aligned(cells)]
    warnings = [clean(note) for note in (report.get("reference"), *(report.get("warnings") or ())) if note]
    return "\n".join([*parts, *(["", *warnings] if warnings else [])])


def printable_cell(cell: str) -> str:
    """Return a cell without control characters; spaces at its start stay."""
    return " " * (len(cell) - len(cell.lstrip(" "))) + clean(cell)


def _summary_table(report: Mapping[str, Any]) -> Table:
    """Return the table of runs: speed-up, verdict, main measures."""
    keys, names = main_keys(report), short_names(row["key"] for row in report["metrics"])
    rows = [
        (
            run.run,
            bracketed(run.speed.value, run.speed.interval),
            run.word,
            *(c.difference or bracketed(c.value, c.interval) for c in run.cells),
        )
        for run in summaries(report)
    ]
    return "Runs", ["run", "speed-up", "quality", *(names[key] for key in keys)], rows


def _full_table(table: tables.FullTable, watched: bool) -> Table:
    """Return all rows of a family; on a terminal a metric's name stands above its runs, without notes, to be narrow."""
    if not watched:
        return table.title, table.heads, table.rows
    kept = [i for i, head in enumerate(table.heads) if head not in ("run", "metric", "note")]
    rows: list[tuple[str, ...]] = []
    metric = ""
    for line in table.rows:
        if line[1] != metric:
            metric = line[1]
            rows.append((metric, *("" for _ in kept)))
        rows.append((f"  {line[0]}", *(line[i] for i in kept)))
    return table.title, ("metric, run", *(table.heads[i] for i in kept)), rows


def _aligned(cells: Sequence[Sequence[str]]) -> str:
    """Return a table aligned with spaces, a line a row."""
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = ["  " + "  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join(lines)


def _drawn(cells: Sequence[Sequence[str]], stream: TextIO) -> str:
    """Return a table as wide as the terminal at most, verdicts coloured where the terminal has colours."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as Drawing
    from rich.text import Text

    console = Console(file=stream)
    table = Drawing(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    for i, head in enumerate(cells[0]):
        table.add_column(Text(head), overflow="fold", min_width=7 if i else 12)
    for row in cells[1:]:
        table.add_row(*(Text(cell, style=COLOURS.get(cell, "")) for cell in row))
    with console.capture() as capture:  # rich itself would end the process when the reader of a pipe has left
        console.print(table)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())
