"""A report made anew from its ``report.json``, without measuring."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffaccel.errors import DiffAccelError
from diffaccel.eval.report import PICTURES, changes, write_texts
from diffaccel.eval.report.summary import verdicts
from diffaccel.files import COUNT, NUMBER, misfit

_INTERVAL = (
    None,
    {"value?": NUMBER, "low": NUMBER, "high": NUMBER, "units?": (COUNT, None), "carriers?": (NUMBER, None)},
)
_REPORT = {
    "baseline": str, "made": str,
    "runs": [{"name": str, "images": COUNT, "settings": dict, "device?": ({"name?": (str, None)}, None)}],
    "metrics": [
        {
            "family": str, "n": (COUNT, None), "interval?": _INTERVAL, "delta_interval?": _INTERVAL,
            "floor_interval?": _INTERVAL, "detail?": (dict, None), "missing?": (str, None), "unit?": (str, None),
        }
    ],
    "sections?": dict, "steps?": (dict, None), "curves?": (dict, None), "reference?": str, "warnings?": [str],
    "command?": [str], "credits?": (dict, None),
}  # fmt: skip
_SECTION = {"title": str, "columns": [str], "rows": [[str]]}
_PICTURE = {"src": str, "width": COUNT, "height": COUNT, "small": bool}
_PAIR = {"prompt": str, "seed": (int, None), "measured": str, "images": [_PICTURE], "worst": bool}
_PICTURES = {
    "strip": {"prompts": [str], "runs": [{"run": str, "pictures": [_PICTURE]}], "left_out": [str]},
    "galleries": [{"run": str, "metric": str, "pairs": [_PAIR]}],
}  # fmt: skip


def remake(file: Path, out: Path | None = None) -> dict[str, Any]:
    """Write page, Markdown, CSV and LaTeX of a report again and return what is in ``report.json``.

    Pictures are those of ``pictures.json`` beside the file; without it the page has none.

    Args:
        file: ``report.json``, or the folder that holds it.
        out: the folder to write to; None for the file's own.

    Raises:
        DiffAccelError: for any other file, and for a damaged one.
    """
    path = file / "report.json" if file.is_dir() else file
    report = changes.read(path)
    if part := _damage(report):
        raise DiffAccelError(f"The report '{path}' is damaged: {part} is missing or no such value. Make it again.")
    report["verdicts"] = verdicts(report)
    write_texts(report, out or path.parent, _pictures(path.parent / PICTURES))
    return report


def _damage(report: dict[str, Any]) -> str:
    """Return the first part of a report that is none; "" for a whole one."""
    if part := misfit(report, _REPORT) or ("" if report["runs"] else "runs"):
        return part
    for name, section in report.get("sections", {}).items():
        if part := misfit(section, _SECTION, f"sections.{name}"):
            return part
        if any(len(row) != len(section["columns"]) for row in section["rows"]):
            return f"sections.{name}.rows"
    curves = {f"curves.{key}": by_run for key, by_run in (report.get("curves") or {}).items()}
    lists = [("steps", report.get("steps") or {}, NUMBER), ("credits", report.get("credits") or {}, str)]
    for name, by_run, shape in (*lists, *((name, by_run, (NUMBER, None)) for name, by_run in curves.items())):
        if not isinstance(by_run, dict):
            return name
        if part := next(filter(None, (misfit(values, [shape], f"{name}.{run}") for run, values in by_run.items())), ""):
            return part
    return ""


def _pictures(path: Path) -> dict[str, Any] | None:
    """Read the pictures of a page; None where there are none.

    Raises:
        DiffAccelError: for a damaged file.
    """
    if not path.exists():
        return None
    try:
        pictures = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DiffAccelError(f"The pictures '{path}' cannot be read ({error}). Take the file away.") from error
    part = misfit(pictures, _PICTURES) if isinstance(pictures, dict) else "all of it"
    if not part and any(not src.startswith("data:image/webp;base64,") for src in _sources(pictures)):
        part = "a picture as data URL"
    if not part and not _has_all_pictures(pictures):
        part = "a picture"
    if part:
        raise DiffAccelError(f"The pictures '{path}' are damaged: {part} is missing or no such value. Take it away.")
    return pictures


def _has_all_pictures(pictures: dict[str, Any]) -> bool:
    strip, galleries = pictures["strip"], pictures["galleries"]
    counts = {len(run["pictures"]) for run in strip["runs"]} - {len(strip["prompts"])}
    return not counts and all(len(pair["images"]) == 3 for gallery in galleries for pair in gallery["pairs"])


def _sources(pictures: dict[str, Any]) -> list[str]:
    strip = [picture["src"] for run in pictures["strip"]["runs"] for picture in run["pictures"]]
    pairs = [pair for gallery in pictures["galleries"] for pair in gallery["pairs"]]
    return strip + [picture["src"] for pair in pairs for picture in pair["images"]]
