"""Rows of what a picture takes beside its time: peak memory, energy, the first call, set-up.

Where variants took turns, each turn has its own reading. Energy has the interval of their mean, and over the baseline's
the one of a ratio over turns. Peaks of memory mostly are equal in all turns, so their row has the range. Below 6 turns,
and where a number was read once, the row says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from diffaccel.eval.comparison.cost_row import LABELS, cost_row, part_of_a_search
from diffaccel.eval.comparison.row import Row, missing
from diffaccel.eval.sets.run import Run
from diffaccel.eval.uncertainty.intervals import LEAST_TURNS, Interval
from diffaccel.eval.uncertainty.turns import (
    energy_ratio,
    mean_difference,
    mean_of_turns,
    of_ticks,
    range_of_turns,
    too_short,
)

GIB = 2.0**30
Entry = Mapping[str, Any]  # of a variant in a timing, or the cost in a run's record
ONCE = (
    ("first_call", "first_call_seconds", "the first of all its calls, a whole batch"),
    ("set_up", "set_up_seconds", "once: putting the methods on, with weights converted and calibrated"),
)


def resource_rows(run: Run, baseline: Run, entries: Mapping[str, Entry]) -> list[Row]:
    """Return peak memory, energy, first call and set-up, from turns or else from the runs themselves.

    There is a difference to the baseline where both come from the same source, and were measured apart.

    Args:
        run, baseline: of a comparison.
        entries: by a run's name the timing's entry of the variant that drew it.
    """
    entry, base_entry = entries.get(run.name), entries.get(baseline.name)
    if entry is None and (why := part_of_a_search(run)):
        return [missing("peak_memory", LABELS["peak_memory"], "cost", run.name, "lower", why)]
    if entry is None:
        entry = _of_the_run(run)
        is_comparable = base_entry is None and not part_of_a_search(baseline)
        base_entry = _of_the_run(baseline) if is_comparable else None
    if run is baseline or base_entry is entry:
        base_entry = None
    rows = [_memory_row(run, entry, base_entry), *_energy_rows(run, entry, base_entry)]
    return [row for row in [*rows, *_rows_of_one_call(run, entry, base_entry)] if row is not None]


def _of_the_run(run: Run) -> Entry:
    """Return a run's own cost in the form of a timing's entry: energy a picture, peaks of its calls."""
    cost = run.record.get("cost") or {}
    peaks = [chunk["cost"].get("peak_memory") for chunk in run.record.get("chunks") or ()]
    joules = cost.get("joules")
    return {
        **cost,
        "peaks": peaks if all(isinstance(peak, int | float) for peak in peaks) else None,
        "energy_joules": None if joules is None else joules / len(run),
        "joules": None,  # its calls are not in turns with the baseline's, and may differ in size
    }


def _memory_row(run: Run, entry: Entry, base_entry: Entry | None) -> Row | None:
    """Return the highest peak of memory, with the range over calls; of a CPU's process there is one peak for all."""
    peak = entry.get("peak_memory")
    if peak is None:
        return None
    is_gpu = run.record.get("device", {}).get("type") == "cuda"
    peaks = [value / GIB for value in entry.get("peaks") or ()] if is_gpu else []
    row = cost_row("peak_memory", run, peak / GIB, unit="GiB")
    row.n = len(peaks) or entry.get("turns", row.n)
    row.detail["from"] = _range_note(peaks, "turns" if "turns" in entry else "calls") if is_gpu else (
        "of the whole process so far, one number"
    )  # fmt: skip
    row.interval = range_of_turns(peaks) if peaks else None
    if is_gpu and base_entry is not None and base_entry.get("peak_memory") is not None:
        row.delta = (peak - base_entry["peak_memory"]) / GIB
        base_peaks = [value / GIB for value in base_entry.get("peaks") or ()]
        if peaks and len(base_peaks) == len(peaks):
            apart = range_of_turns([a - b for a, b in zip(peaks, base_peaks, strict=True)], null=0.0)
            row.delta_interval = None if apart is None else replace(apart, value=row.delta)
    return row


def _range_note(peaks: Sequence[float], calls: str) -> str:
    """Return what is known of a peak: in how many calls it was read, and whether it was the same."""
    if not peaks:
        return "one number, its range was not kept"
    if min(peaks) == max(peaks):
        return f"the same in all {len(peaks)} {calls}" if len(peaks) > 1 else "read once"
    if len(peaks) < LEAST_TURNS:
        return f"highest of {len(peaks)} {calls}, lowest {min(peaks):.3f}"
    return f"highest of {len(peaks)} {calls}, with their range"


def _energy_rows(run: Run, entry: Entry, base_entry: Entry | None) -> list[Row]:
    """Return joules a picture and, over the baseline's, their ratio."""
    joules = entry.get("energy_joules")
    if joules is None:
        return []
    used = entry.get("joules")
    row = cost_row("energy", run, joules, unit="J")
    row.n = entry.get("turns", row.n)
    row.detail["from"] = f"NVML, {_turns_note(used, entry, _metered_seconds(entry))}"
    images = sum(used) / len(used) / joules if used and joules > 0 else 1.0  # in a call
    if used and not too_short(_metered_seconds(entry)):
        row.interval = mean_of_turns([value / images for value in used], of_ticks(_metered_seconds(entry)))
    rows = [row]
    if base_entry is None or base_entry.get("energy_joules") is None:
        return rows
    row.delta = joules - base_entry["energy_joules"]
    base_used, seconds = base_entry.get("joules"), (_metered_seconds(entry), _metered_seconds(base_entry))
    if used and base_used and len(used) == len(base_used):
        if not too_short(min(seconds)):
            ticks = (of_ticks(seconds[0]), of_ticks(seconds[1]))
            row.delta_interval = _per_picture(mean_difference(used, base_used, ticks), images)
        if (ratio := energy_ratio(used, base_used, seconds)) is not None:
            detail = {"from": f"NVML, {_turns_note(used, entry, min(seconds))}", "turns": len(used)}
            rows.append(cost_row("energy_ratio", run, ratio.value, unit="x", detail=detail))
            rows[1].interval, rows[1].n = ratio.interval, len(used)
    return rows


def _per_picture(interval: Interval | None, images: float) -> Interval | None:
    """Return an interval of a whole call as one of a picture."""
    if interval is None:
        return None
    ends = {name: getattr(interval, name) / images for name in ("value", "low", "high")}
    return replace(interval, **ends)


def _turns_note(used: Sequence[float] | None, entry: Entry, seconds: float) -> str:
    if used is None:
        return "without its turns: no interval" if "turns" in entry else "the run itself, not in turns"
    why = f"too few for an interval ({LEAST_TURNS})" if len(used) < LEAST_TURNS else too_short(seconds)
    return f"mean of {len(used)} turns{', ' if why else ''}{why}"


def _metered_seconds(entry: Entry) -> float:
    """Return the seconds that a reading of energy spans: of a call, or of several; 0 where there are no turns."""
    seconds = entry.get("seconds")
    if entry.get("metered_seconds"):
        return float(entry["metered_seconds"])
    return median(seconds) if isinstance(seconds, list) and seconds else 0.0


def _rows_of_one_call(run: Run, entry: Entry, base_entry: Entry | None) -> list[Row]:
    """Return seconds of what is measured once, whatever the number of turns or pictures."""
    rows = []
    for metric, key, source in ONCE:
        if entry.get(key) is None:
            continue
        row = cost_row(metric, run, entry[key], unit="s", detail={"from": source})
        row.n = 1
        if base_entry is not None and base_entry.get(key) is not None:
            row.delta = entry[key] - base_entry[key]
        rows.append(row)
    return rows
