"""A report made anew from its ``report.json``, without measuring."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffaccel.errors import DiffAccelError
from diffaccel.eval.report import PICTURES, changes, write_texts
from diffaccel.eval.report.summary import verdicts
from diffaccel.files import COUNT, misfit

_REPORT = {
    "baseline": str, "made": str, "runs": [{"name": str, "images": COUNT, "settings": dict}],
    "metrics": [{"family": str, "n": (COUNT, None)}], "sections?": dict, "reference?": str,
    "warnings?": [str], "command?": [str],
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
    part = misfit(report, _REPORT)
    part = part or next((p for s in (report.get("sections") or {}).values() if (p := misfit(s, _SECTION))), "")
    if part:
        raise DiffAccelError(f"The report '{path}' is damaged: {part} is missing or no such value. Make it again.")
    report["verdicts"] = verdicts(report)
    write_texts(report, out or path.parent, _pictures(path.parent / PICTURES))
    return report


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
