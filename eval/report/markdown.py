"""A comparison as Markdown, for a terminal, a pull request or a note."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffaccel.eval.comparison.result import Comparison
from diffaccel.eval.comparison.text import HEADS, table


def markdown(comparison: Comparison, report: dict[str, Any]) -> str:
    """Return verdicts, tables and warnings as Markdown.

    Args:
        comparison: everything that was measured.
        report: what is in ``report.json``.
    """
    base = comparison.baseline
    lines = [f"# {', '.join(run.name for run in comparison.runs)} against {base.name}", ""]
    lines += [f"- **{verdict['run']}**: {verdict['text']}." for verdict in report["verdicts"]]
    device = base.record.get("device", {}).get("name")
    lines += [
        "",
        f"{len(base)} {'videos' if base.is_video else 'pictures'} a run{f', {device}' if device else ''}, "
        f"{report['made'][:10]}. 95 % intervals.",
        "",
    ]
    for title, group in table(comparison):
        cells = [
            (
                line.run,
                f"{line.metric} {line.arrow}",
                line.value,
                line.interval,
                line.delta,
                line.floor,
                line.n,
                line.note,
            )
            for line in group
        ]
        lines += [f"## {title}", "", *_markdown_table((*HEADS, ""), cells), ""]
    for section in comparison.sections:
        lines += [f"## {section.title}", "", *_markdown_table(section.columns, section.rows), ""]
        lines += [section.note, ""] if section.note else []
    if report["warnings"]:
        lines += ["## Warnings", "", *(f"- {warning}" for warning in report["warnings"]), ""]
    if report["command"]:
        lines += ["```", " ".join(report["command"]), "```", ""]
    return "\n".join(lines)


def _markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in row] for row in (heads, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return [lines[0], "|" + "---|" * len(heads), *lines[1:]]
