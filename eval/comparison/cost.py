"""Cost of a picture: time, network evaluations, memory, energy; and the speed-up over the baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from diffaccel.eval.comparison.cost_row import LABELS, cost_row, part_of_a_search
from diffaccel.eval.comparison.resources import resource_rows
from diffaccel.eval.comparison.row import Row, Section, missing
from diffaccel.eval.comparison.text import of_things
from diffaccel.eval.comparison.verdict import NOT_SHOWN
from diffaccel.eval.sets.run import Run
from diffaccel.eval.uncertainty.intervals import LEAST_TURNS, median_ratio
from diffaccel.runs.request import WAY

KEY, PARTS = "where_time_goes", ("text", "network", "decode")
TURNS, OWN = "turns on one machine", "the run itself, not in turns"
SHORTEST_RUN = 0.01  # seconds, of which a record keeps 0.0001
EXACT = "counted over these pictures, not estimated"
COUNTED = {
    "nfe": "predictions a picture; a guided one counts once",
    "forwards": "rows through the network a picture",
}


def rows(baseline: Run, runs: list[Run], timing: dict[str, Any] | None) -> list[Row]:
    """Return the cost rows of the baseline and of every run.

    With ``timing`` (of :mod:`diffaccel.eval.timing.turns`, where variants took turns on one machine) seconds and ratios
    come from there, for runs that one of the variants drew. Without it seconds are those of the runs themselves, during
    which the machine may have been busy with other work: a ratio then has no interval, and its row names the source.
    """
    entries, images = _entries_by_run(timing, (baseline, *runs)), (timing or {}).get("images_a_call")
    cost_rows: list[Row] = []
    for run in (baseline, *runs):
        cost_rows += _counted_rows(run, baseline)
        measured = [*_speed_rows(run, baseline, entries), *resource_rows(run, baseline, entries)]
        for row in measured:
            row.detail["batch"] = images if run.name in entries else _batch_of_run(run)
        cost_rows += measured
    return cost_rows


def _things(run: Run) -> str:
    return "videos" if run.is_video else "pictures"


def _batch_of_run(run: Run) -> int | None:
    """Return how many pictures a call of a run drew at most; a short run never filled its batch."""
    batch = run.record.get("settings", {}).get("batch")
    return None if batch is None else min(batch, len(run))


def _counted_rows(run: Run, baseline: Run) -> list[Row]:
    """Return the rows of network evaluations; a user's function is drawn without counting them."""
    cost, base_cost = run.record.get("cost"), baseline.record.get("cost")
    if not cost:
        return []
    counted = []
    for metric, description in COUNTED.items():
        if metric not in cost:
            continue
        if metric == "forwards" and (why := part_of_a_search(run)):
            counted.append(missing(metric, LABELS[metric], "cost", run.name, "lower", why))
            continue
        what, source = (of_things(text, _things(run)) for text in (description, EXACT))
        row = cost_row(metric, run, cost[metric] / len(run), detail={"what": what, "from": source})
        is_whole = metric == "nfe" or not part_of_a_search(baseline)
        if run is not baseline and base_cost and metric in base_cost and is_whole:
            row.delta = cost[metric] / len(run) - base_cost[metric] / len(baseline)
        counted.append(row)
    return counted


def _speed_rows(run: Run, baseline: Run, entries: dict[str, Any]) -> list[Row]:
    """Return seconds a picture and the speed-up, from turns where a variant drew the run."""
    if run.name in entries:
        return _timed_speed_rows(run, baseline, entries)
    cost, base_cost = run.record.get("cost"), baseline.record.get("cost")
    if not cost:
        return []
    if why := part_of_a_search(run):
        absent = [missing("seconds", "seconds", "cost", run.name, "lower", why)]
        is_compared = run is not baseline and not entries
        return [*absent, *([missing("speedup", LABELS["speedup"], "cost", run.name, "higher", why)] * is_compared)]
    detail = {"from": OWN}
    speed_rows = [cost_row("seconds", run, cost["seconds"] / len(run), unit="s", detail=detail)]
    if run is not baseline and not entries and (why := part_of_a_search(baseline)):
        speed_rows.append(missing("speedup", LABELS["speedup"], "cost", run.name, "higher", f"{baseline.name}: {why}"))
    elif run is not baseline and base_cost and not entries and _same_machine(run, baseline):
        if (shortest := min(base_cost["seconds"], cost["seconds"])) < SHORTEST_RUN:
            why = f"a run of {shortest:.4f} s is too short for a ratio by the runs' own clocks"
            speed_rows.append(missing("speedup", LABELS["speedup"], "cost", run.name, "higher", why))
        else:
            ratio = base_cost["seconds"] / len(baseline) / (cost["seconds"] / len(run))
            speed_rows.append(cost_row("speedup", run, ratio, better="higher", unit="x", detail=detail))
    return speed_rows


def _timed_speed_rows(run: Run, baseline: Run, entries: dict[str, Any]) -> list[Row]:
    entry = entries[run.name]
    seconds = cost_row(
        "seconds", run, entry["seconds_per_image"], unit="s", detail={"from": _turns_note(entry["turns"])}
    )
    seconds.n = entry["turns"]
    images = median(entry["seconds"]) / entry["seconds_per_image"]
    if interval := median_ratio(entry["seconds"], [images] * len(entry["seconds"])).interval:
        seconds.interval = replace(interval, null=None)
    if run is baseline or (base_entry := entries.get(baseline.name)) is None:
        return [seconds]
    if entry is base_entry:
        why = f"drawn as {baseline.name} is, and timed once for both"
        return [seconds, missing("speedup", LABELS["speedup"], "cost", run.name, "higher", why)]
    # the timing's own ratios are to its first variant, which may be another one than this baseline's
    turns = min(len(base_entry["seconds"]), len(entry["seconds"]))  # a slow way is timed in the first ones alone
    ratio = median_ratio(base_entry["seconds"][:turns], entry["seconds"][:turns])
    detail = {
        "from": _turns_note(turns),
        "turns": turns,
        "significant": ratio.to_dict()["significant"],
    }
    speedup = cost_row("speedup", run, ratio.value, better="higher", unit="x", detail=detail)
    speedup.interval, speedup.n = ratio.interval, turns
    return [seconds, speedup]


def _turns_note(turns: int) -> str:
    """Return where times of turns come from, and why so few of them have no interval."""
    return TURNS if turns >= LEAST_TURNS else f"{TURNS}, too few for an interval ({LEAST_TURNS})"


def _same_machine(run: Run, baseline: Run) -> bool:
    return run.record.get("device") == baseline.record.get("device")


def section(baseline: Run, runs: Sequence[Run], timing: dict[str, Any] | None) -> Section | None:
    """Tabulate where the time of a call goes: text encoders, network, decoder, the rest; and the first call.

    None where neither the timing nor a record of a run has it.
    """
    entries, images = _entries_by_run(timing, (baseline, *runs)), (timing or {}).get("images_a_call", 1)
    lines, data = [], {}
    for run in (baseline, *runs):
        if run.name not in entries and (why := part_of_a_search(run)):
            lines.append((run.name, *[""] * (len(PARTS) + 5), "", why))
            continue
        split = _time_split(run, entries.get(run.name), images)
        if split is None:
            continue
        data[run.name] = split
        lines.append((
            run.name, *(_milliseconds(split[part]) for part in (*PARTS, "other", "seconds")),
            _milliseconds(split["first_call"]), NOT_SHOWN if split["noise"] else _milliseconds(split["one_off"]),
            _milliseconds(split["set_up"]),
            str(split["calls"] or ""), split["from"],
        ))  # fmt: skip
    if not lines:
        return None
    parts = ("text", "network", "decoder", "other", "all", "first call", "one-off", "set-up")
    heads = (*(f"{part}, ms" for part in parts), "calls", "measured")
    note = f"Milliseconds a picture, {images} to a call of the turns. " if entries else "Milliseconds a picture. "
    if entries:
        note += "The first call is of a whole batch; one-off is what it took beyond a later one: "
        note += f"compilation, caches; {NOT_SHOWN} where the turns differ by more. Set-up puts the methods on, once: "
        note += "converted weights, calibration. "
    note += "Medians or means without intervals. Calls are of the network, in one call of the pipeline."
    return Section(
        key=KEY, title="Where the time goes", columns=("run", *heads), rows=tuple(lines),
        note=of_things(note, _things(baseline)),
        data={"runs": data, "images_a_call": images if entries else None},
    )  # fmt: skip


def _time_split(run: Run, entry: dict[str, Any] | None, images: int) -> dict[str, Any] | None:
    """Return seconds a picture by part; those of a first call, and what it took beyond a later one.

    Args:
        run: the run.
        entry: of the variant that drew it, in a timing; None takes the run's own record.
        images: pictures in a call of the timing.
    """
    cost = run.record.get("cost") or {}
    if entry is not None:
        parts = {part: part_seconds / images for part, part_seconds in entry["parts"].items()}
        seconds, source = entry["seconds_per_image"], TURNS
        first = entry["first_call_seconds"]
        one_off = first - seconds * images
        start = {
            "first_call": first,
            "one_off": one_off,
            "noise": one_off <= max(entry["seconds"]) - min(entry["seconds"]),
            "set_up": entry.get("set_up_seconds"),
            "calls": len(entry["steps"]),
        }
    elif cost.get("parts"):
        parts = {part: part_seconds / len(run) for part, part_seconds in cost["parts"].items()}
        seconds, source = cost["seconds"] / len(run), OWN
        calls = len(cost.get("steps") or ())
        start = {"first_call": None, "one_off": None, "noise": False, "set_up": None, "calls": calls}
    else:
        return None
    other = seconds - sum(parts.values())
    return {part: parts.get(part) for part in PARTS} | {"other": other, "seconds": seconds, "from": source, **start}


def steps(run: Run, timing: dict[str, Any] | None) -> list[float]:
    """Return seconds of every network call of a pipeline call: medians over turns, else over the run's batches."""
    entry = _entries_by_run(timing, [run]).get(run.name)
    return (entry or run.record.get("cost") or {}).get("steps") or []


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1000 * seconds:.1f}"


def timing_warnings(runs: Sequence[Run], timing: dict[str, Any] | None) -> list[str]:
    """Return a warning that names the runs which no variant of the timing drew."""
    entries = _entries_by_run(timing, runs)
    lacking = [run.name for run in runs if run.name not in entries]
    if not timing or not lacking:
        return []
    names = ", ".join(entry["name"] for entry in timing["variants"])
    return [f"No variant of the timing drew {', '.join(lacking)}: it has {names}. Their seconds are the runs' own."]


def _entries_by_run(timing: dict[str, Any] | None, runs: Sequence[Run]) -> dict[str, Any]:
    """Return by a run's name the timing's entry of the variant that drew it.

    It is the entry of that name, or the one whose settings are those of the run's record.
    """
    entries = (timing or {}).get("variants", [])
    by_name = {entry[key]: entry for entry in entries for key in ("name", "folder")}
    for run in runs:
        settings = run.record.get("settings", {})
        for entry in entries:
            if (drawn := entry.get("drawn")) and all(key in settings and settings[key] == drawn[key] for key in WAY):
                by_name.setdefault(run.name, entry)
    return by_name
