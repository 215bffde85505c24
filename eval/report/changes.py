"""What changed between two ``report.json``, such as those of two commits."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from diffaccel import record
from diffaccel.errors import DiffAccelError
from diffaccel.eval.comparison.row import digits

NUMBERS = (
    ("delta", "delta_interval", "difference"),
    ("value", "interval", "value"),
)  # the paired one where there is one


def read(path: str | Path) -> dict[str, Any]:
    """A report.

    Raises:
        DiffAccelError: for a file that is none.
    """
    try:
        found = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DiffAccelError(f"The report '{path}' cannot be read ({error}).") from error
    if not isinstance(found, dict) or not isinstance(found.get("metrics"), list):
        raise DiffAccelError(f"'{path}' is no report.json of diffaccel eval compare.")
    return found


def changes(old: dict[str, Any], new: dict[str, Any]) -> dict[str, list[str]]:
    """Sentences under ``beyond`` (a new number outside of the old one's 95 % interval), ``unsure`` (it moved, and has
    no interval), ``gone`` and ``added`` (metrics of one report alone) and ``made`` (versions that differ).
    """
    sides = [{(row["run"], row["key"]): row for row in report["metrics"]} for report in (old, new)]
    found: dict[str, list[str]] = {"beyond": [], "unsure": []}
    for name, row in sides[1].items():
        before = sides[0].get(name)
        field, interval, word = next(
            (n for n in NUMBERS if before and None not in (before[n[0]], row[n[0]])), NUMBERS[1]
        )
        if before is None or (text := _moved(before, row, field, word)) is None:
            continue
        known = before[interval]
        if known is None or row[field] is None:
            found["unsure"].append(text)
        elif not known["low"] <= row[field] <= known["high"]:
            places = digits(row["metric"])
            found["beyond"].append(f"{text}, outside of {known['low']:.{places}f} to {known['high']:.{places}f}")
    one, other = (set(side) for side in sides)
    found["gone"] = [f"{run}: {key}" for run, key in sorted(one - other)]
    found["added"] = [f"{run}: {key}" for run, key in sorted(other - one)]
    return found | {"made": record.differences(old.get("versions", {}), new.get("versions", {}))}


def _moved(old: dict[str, Any], new: dict[str, Any], field: str, word: str) -> str | None:
    """The change in words; None for none that is printed."""
    places = digits(new["metric"])
    was, now = (math.nan if side[field] is None else side[field] for side in (old, new))
    texts = ["none" if math.isnan(value) else f"{value:.{places}f}" for value in (was, now)]
    if texts[0] == texts[1]:
        return None
    better = "" if math.isnan(now - was) else ", better" if (now > was) == (new["better"] == "higher") else ", worse"
    return f"{new['run']}: {new['key']}, {word} {texts[0]} -> {texts[1]}{better}"
