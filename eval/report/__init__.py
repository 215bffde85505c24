"""A comparison as ``report.json``, Markdown, CSV, LaTeX, and one ``report.html`` that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffaccel.errors import DiffAccelError
from diffaccel.eval.comparison.result import Comparison
from diffaccel.eval.comparison.text import of_things
from diffaccel.eval.report import by_batch, flops, pictures
from diffaccel.eval.report.credits import credits_of
from diffaccel.eval.report.export import csv_text, latex_text
from diffaccel.eval.report.markdown import markdown
from diffaccel.eval.report.page import html_text
from diffaccel.eval.report.summary import things_of, verdicts
from diffaccel.files import remove_leftovers, write_json, write_text

LARGEST = 10 * 2**20  # bytes of the page
PICTURES = "pictures.json"


def contents(comparison: Comparison, command: list[str] | None = None) -> dict[str, Any]:
    """Return what is in ``report.json``.

    Args:
        comparison: everything that was measured.
        command: the command line, for the record.
    """
    report = comparison.to_dict() | {"command": command or []}
    place = next((i for i, row in enumerate(report["metrics"]) if row["metric"] == "seconds"), len(report["metrics"]))
    report["metrics"][place:place] = flops.rows(report)
    if by_batch.KEY not in report["sections"] and (section := by_batch.section_of_rows(report)) is not None:
        report["sections"][by_batch.KEY] = section.to_dict()
    if (by_batch_section := report["sections"].get(by_batch.KEY)) is not None:  # made of times, which know no videos
        columns = by_batch_section["columns"]
        by_batch_section["columns"] = [of_things(column, things_of(report)) for column in columns]
    return report | {"verdicts": verdicts(report), "credits": credits_of(report)}


def check_folder(out: Path) -> None:
    """Raise for a folder that holds a run: a report among its pictures would be taken for a part of it.

    Raises:
        DiffAccelError: for a folder with a ``run.json``.
    """
    if (out / "run.json").is_file():
        raise DiffAccelError(
            f"'{out}' holds a run of its own (run.json), and a report is no part of it. Name another folder, such as "
            f"'{out.with_name('report')}'."
        )


def write(comparison: Comparison, out: Path, *, command: list[str] | None = None, pairs: int = 8) -> dict[str, Any]:
    """Write the files of a report and return what is in ``report.json``.

    Args:
        comparison: everything that was measured.
        out: the folder; made if need be.
        command: the command line, for the record.
        pairs: number of pairs shown of each run, half of them its worst; fewer where the page would pass 10 MiB.

    Raises:
        DiffAccelError: for the folder of a run.
    """
    check_folder(out)
    report = contents(comparison, command)
    out.mkdir(parents=True, exist_ok=True)
    remove_leftovers(out, r"report\.(json|md|html|csv|tex)|pictures\.json")
    write_json(out / "report.json", report)
    shown = pictures.of_page(comparison, pairs)
    page = html_text(report, shown)
    while len(page.encode()) > LARGEST and pairs > 1:  # many runs: fewer pictures of each
        pairs //= 2
        shown = pictures.of_page(comparison, pairs)
        page = html_text(report, shown)
    write_json(out / PICTURES, shown)
    write_texts(report, out, shown, page)
    return report


def write_texts(report: Mapping[str, Any], out: Path, shown: Mapping[str, Any] | None, page: str | None = None) -> None:
    """Write everything of a report that can be made anew from ``report.json`` and its pictures.

    Args:
        report: what is in ``report.json``.
        out: the folder.
        shown: what is in ``pictures.json``; None for a page without pictures.
        page: the page with these pictures; None makes it.
    """
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "report.md", markdown(report))
    write_text(out / "report.csv", csv_text(report))
    write_text(out / "report.tex", latex_text(report))
    write_text(out / "report.html", html_text(report, shown) if page is None else page)
