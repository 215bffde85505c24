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
LONG = 44  # letters of a cell that wraps


def write(comparison: Comparison, out: Path, *, command: list[str] | None = None, pairs: int = 8) -> dict[str, Any]:
    """Write the three files and return what is in ``report.json``.

    Args:
        comparison: what was measured.
        out: the folder; made if need be.
        command: the command line, for the record.
        pairs: pictures shown of each run, half of them its worst; fewer where the page would pass 10 MiB.
    """
    made = comparison.to_dict() | {"command": command or [], "verdicts": text.verdicts(comparison)}
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "report.json", made)
    write_text(out / "report.md", markdown(comparison, made))
    page = _page(comparison, made, pairs)
    while len(page.encode()) > LARGEST and pairs > 1:  # many runs: fewer pictures of each
        pairs //= 2
        page = _page(comparison, made, pairs)
    write_text(out / "report.html", page)
    return made


def _page(comparison: Comparison, made: dict[str, Any], pairs: int) -> str:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        made=made,
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
    """A column of a section that is not empty; words stand to the left, numbers to the right, long texts wrap."""

    head: str
    at: int
    words: bool
    long: bool


def _columns(section: Section) -> list[_Column]:
    found = []
    for at, head in enumerate(section.columns):
        cells = [row[at] for row in section.rows if row[at]]
        long = any(len(cell) > LONG for cell in cells)
        words = long or not any(re.match(r"[+-]?\d", cell) for cell in cells)
        if cells:
            found.append(_Column(head, at, words, long))
    return found
