"""The page: one HTML file that needs nothing else, from what is in ``report.json`` and the pictures beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from diffaccel.eval.comparison import verdict
from diffaccel.eval.comparison.text import of_things
from diffaccel.eval.report import call_times, charts, tables
from diffaccel.eval.report.credits import credits_of
from diffaccel.eval.report.names import shell_line, short_names, split_key
from diffaccel.eval.report.summary import headline, how_to_read, main_keys, summaries, things_of
from diffaccel.terminal import printable

TEMPLATES = files(__name__.rpartition(".")[0])
LONG = 44  # letters above which a cell wraps
ENDINGS = {verdict.BETTER: "good", verdict.WORSE: "bad"}  # classes of verdicts; others are plain


def html_text(report: Mapping[str, Any], pictures: Mapping[str, Any] | None = None) -> str:
    """Return the page as HTML.

    Args:
        report: what is in ``report.json``.
        pictures: what :func:`diffaccel.eval.report.pictures.of_page` returns; None for a page without pictures.
    """
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined, finalize=_finalize,
        loader=jinja2.FunctionLoader(lambda name: (TEMPLATES / name).read_text(encoding="utf-8")),
    )  # fmt: skip
    filters = {"shell": shell_line, "split_key": split_key, "verdict_class": _verdict_class, "minus": _minus}
    environment.filters |= filters
    shown = pictures or {}
    return environment.get_template("report.html.jinja").render(
        report={"warnings": [], "reference": "", "command": [], "versions": {}, **report},
        headline=headline(report),
        counted=tables.counted(report),
        summaries=summaries(report),
        how_to_read=how_to_read(report),
        main_keys=main_keys(report),
        names=short_names(row["key"] for row in report["metrics"]),
        first_plots=charts.first_plots(report),
        plots=charts.quality_plots(report),
        strip=shown.get("strip"),
        galleries=shown.get("galleries") or [],
        metric_tables=tables.metric_tables(report),
        full_tables=tables.full_tables(report),
        explained=of_things(verdict.EXPLAINED, things_of(report)),
        sections=[(section, _columns(section)) for section in (report.get("sections") or {}).values()],
        curves=charts.curves(report),
        steps=call_times.steps(report),
        credits=credits_of(report),
        baseline=report["baseline"],
        things=things_of(report),
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


def _columns(section: Mapping[str, Any]) -> list[_Column]:
    """Return the columns of a section that have a text in some row."""
    columns = []
    for index, head in enumerate(section["columns"]):
        cells: Sequence[str] = [row[index] for row in section["rows"] if row[index]]
        long = any(len(cell) > LONG for cell in cells)
        words = long or not any(re.match(r"[+-]?\d", cell) for cell in cells)
        if cells:
            columns.append(_Column(head, index, words, long))
    return columns


def _finalize(value: Any) -> Any:
    """Take control characters out of every text that the page shows; autoescaping follows."""
    return printable(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


def _verdict_class(word: str) -> str:
    return ENDINGS.get(word, "plain")


def _minus(text: str) -> str:
    """Return numbers with the sign of typography."""
    return re.sub(r"(?<![\w.)-])-(?=\d)", "−", text)
