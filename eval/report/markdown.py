"""A report as Markdown, for a pull request or a note; whatever names hold is text there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffaccel.eval.comparison import verdict
from diffaccel.eval.comparison.text import of_things
from diffaccel.eval.report import tables
from diffaccel.eval.report.credits import credits_of
from diffaccel.eval.report.names import markdown_text, shell_line
from diffaccel.eval.report.summary import bracketed, compared_runs, headline, main_keys, summaries, things_of

NAMED = 6  # runs in the heading; of more it tells the number


def markdown(report: Mapping[str, Any]) -> str:
    """Return verdicts, tables, warnings and credits as Markdown.

    Args:
        report: what is in ``report.json``.
    """
    base = report["baseline"]
    runs = summaries(report)
    names = [markdown_text(name) for name in compared_runs(report)]
    compared = ", ".join(names) if len(names) <= NAMED else f"{len(names)} runs"
    lines = [f"# {compared} against {markdown_text(base)}", ""]
    lines += [f"{headline(report)}.", ""]
    lines += [f"- **{markdown_text(run.run)}**: {markdown_text(run.sentence)}." for run in runs]
    lines += ["", f"{markdown_text(tables.counted(report))}. 95 % intervals.", ""]
    heads = ("run", "speed-up", "verdict", *main_keys(report))
    cells = [
        (
            run.run,
            bracketed(run.speed.value, run.speed.interval),
            run.word,
            *(" ".join(filter(None, (c.difference or bracketed(c.value, c.interval), c.word))) for c in run.cells),
        )
        for run in runs
    ]
    lines += [*_markdown_table(heads, cells), "", of_things(verdict.EXPLAINED, things_of(report)), ""]
    lines += [markdown_text(report["reference"]), ""] if report.get("reference") else []
    for table in tables.full_tables(report):
        lines += [f"## {table.title}", "", *_markdown_table(table.heads, table.rows), ""]
    for section in report.get("sections", {}).values():
        lines += [f"## {markdown_text(section['title'])}", ""]
        lines += [*_markdown_table(section["columns"], section["rows"]), ""]
        lines += [markdown_text(section["note"]), ""] if section.get("note") else []
    if report.get("warnings"):
        lines += ["## Warnings", "", *(f"- {markdown_text(warning)}" for warning in report["warnings"]), ""]
    for model, credit in credits_of(report).items():
        lines += [f"## Credits of {markdown_text(model)}", "", *(f"- {markdown_text(line)}" for line in credit), ""]
    if report.get("command"):
        lines += [*_code(shell_line(report["command"])), ""]
    return "\n".join(lines)


def _code(text: str) -> list[str]:
    fence = "```"
    while fence in text:
        fence += "`"
    return [fence, text, fence]


def _markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [[markdown_text(cell) for cell in row] for row in (heads, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return [lines[0], "|" + "---|" * len(heads), *lines[1:]]
