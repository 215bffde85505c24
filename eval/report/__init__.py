"""A comparison as ``report.json``, ``report.md`` and one ``report.html`` that needs nothing else."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from diffaccel.eval.comparison import text
from diffaccel.eval.comparison.result import Comparison
from diffaccel.eval.comparison.row import Section
from diffaccel.eval.report import charts, pictures
from diffaccel.eval.report.markdown import markdown
from diffaccel.files import write_json, write_text

TEMPLATE = files(__name__) / "report.html.jinja"
LARGEST = 10 * 2**20  # bytes of the page
LONG = 44  # letters above which a cell wraps


def write(comparison: Comparison, out: Path, *, command: list[str] | None = None, pairs: int = 8) -> dict[str, Any]:
    """Write the three files of a report and return what is in ``report.json``.

    Args:
        comparison: everything that was measured.
        out: the folder; made if need be.
        command: the command line, for the record.
        pairs: number of pairs shown of each run, half of them its worst; fewer where the page would pass 10 MiB.
    """
    report = comparison.to_dict() | {"command": command or [], "verdicts": text.verdicts(comparison)}
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "report.json", report)
    write_text(out / "report.md", markdown(comparison, report))
    page = _page(comparison, report, pairs)
    while len(page.encode()) > LARGEST and pairs > 1:  # many runs: fewer pictures of each
        pairs //= 2
        page = _page(comparison, report, pairs)
    write_text(out / "report.html", page)
    return report


def _page(comparison: Comparison, report: dict[str, Any], pairs: int) -> str:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        report=report,
        table=text.table(comparison),
        plots=charts.pareto(comparison),
        curves=charts.curves(comparison),
        steps=charts.steps(comparison),
        galleries=[pictures.gallery(comparison, run, pairs) for run in comparison.runs],
        sections=[(section, _columns(section)) for section in comparison.sections],
        baseline=comparison.baseline.name,
        things="videos" if comparison.baseline.is_video else "pictures",
    )


@dataclass(frozen=True)
class _Column:
    """A column of a section.

    Attributes:
        head: its title.
        index: its place among the columns of the section.
        words: whether it holds words, aligned to the left, and not numbers, aligned to the right.
        long: whether it holds long texts, which wrap.
    """

    head: str
    index: int
    words: bool
    long: bool


def _columns(section: Section) -> list[_Column]:
    """Return the columns of a section that have a text in some row."""
    columns = []
    for index, head in enumerate(section.columns):
        cells = [row[index] for row in section.rows if row[index]]
        long = any(len(cell) > LONG for cell in cells)
        words = long or not any(re.match(r"[+-]?\d", cell) for cell in cells)
        if cells:
            columns.append(_Column(head, index, words, long))
    return columns
