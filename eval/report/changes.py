"""Changes between two ``report.json``, such as those of two commits."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from diffaccel import record
from diffaccel.errors import DiffAccelError
from diffaccel.eval.comparison.result import FORMAT
from diffaccel.eval.comparison.row import digits
from diffaccel.eval.uncertainty.intervals import too_few
from diffaccel.files import COUNT, NUMBER, misfit

# fields of a row that are compared, with their interval and what sentences call them; the first one that both have
NUMBERS = (
    ("delta", "delta_interval", "difference"),
    ("value", "interval", "value"),
)
_INTERVAL = ({"low": NUMBER, "high": NUMBER}, None)
_REPORT = {
    "format?": COUNT, "versions?": dict,
    "metrics": [
        {
            "run": str, "key": str, "metric": str, "better": (str, None), "value": (NUMBER, None),
            "interval": _INTERVAL, "delta": (NUMBER, None), "delta_interval": _INTERVAL,
        }
    ],
}  # fmt: skip


def read(path: str | Path) -> dict[str, Any]:
    """Read a ``report.json``, or that of a folder.

    Raises:
        DiffAccelError: for any other file.
    """
    file = Path(path).expanduser()
    try:
        report = json.loads((file / "report.json" if file.is_dir() else file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DiffAccelError(f"The report '{path}' cannot be read ({error}).") from error
    if not isinstance(report, dict) or not isinstance(report.get("metrics"), list):
        raise DiffAccelError(f"'{path}' is no report.json of diffaccel eval compare.")
    record.check_format(report, FORMAT, f"The report '{path}'")
    if part := misfit(report, _REPORT):
        raise DiffAccelError(f"The report '{path}' is damaged: {part} is missing or no such value. Make it again.")
    return report


def changes(old: dict[str, Any], new: dict[str, Any]) -> dict[str, list[str]]:
    """Describe what changed between two reports.

    Returns:
        Sentences under ``beyond`` (a new number outside of the old one's 95 % interval), ``unsure`` (it moved, and has
        no interval, or one of fewer than 10 prompts), ``gone`` and ``added`` (metrics of one report alone) and
        ``made`` (versions that differ).
    """
    old_rows, new_rows = ({(row["run"], row["key"]): row for row in report["metrics"]} for report in (old, new))
    sentences: dict[str, list[str]] = {"beyond": [], "unsure": []}
    for name, row in new_rows.items():
        old_row = old_rows.get(name)
        field, interval_field, word = next(
            (names for names in NUMBERS if old_row and None not in (old_row[names[0]], row[names[0]])), NUMBERS[1]
        )
        interval = None if old_row is None else old_row[interval_field]
        few = "" if interval is None else too_few(interval.get("units"))
        if old_row is None or (text := _change(old_row, row, field, word, few)) is None:
            continue
        if interval is None or row[field] is None or few:
            sentences["unsure"].append(text)
        elif not interval["low"] <= row[field] <= interval["high"]:
            places = digits(row["metric"])
            low, high = (f"{interval[end]:.{places}f}" for end in ("low", "high"))
            sentences["beyond"].append(f"{text}, outside of {low} to {high}")
    sentences["gone"] = [f"{run}: {key}" for run, key in sorted(old_rows.keys() - new_rows.keys())]
    sentences["added"] = [f"{run}: {key}" for run, key in sorted(new_rows.keys() - old_rows.keys())]
    return sentences | {"made": record.differences(old.get("versions", {}), new.get("versions", {}))}


def _change(old_row: dict[str, Any], new_row: dict[str, Any], field: str, word: str, few: str) -> str | None:
    """Return the change of a field in words, ``few`` for a verdict if it says something; None for equal texts."""
    places = digits(new_row["metric"])
    before, after = (math.nan if row[field] is None else row[field] for row in (old_row, new_row))
    texts = ["none" if math.isnan(value) else f"{value:.{places}f}" for value in (before, after)]
    if texts[0] == texts[1]:
        return None
    is_better = (after > before) == (new_row["better"] == "higher")
    verdict = "" if math.isnan(after - before) else f", {few or ('better' if is_better else 'worse')}"
    return f"{new_row['run']}: {new_row['key']}, {word} {texts[0]} -> {texts[1]}{verdict}"
