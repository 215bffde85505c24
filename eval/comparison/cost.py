"""What a picture costs: time, network evaluations, memory, energy; and the ratio to the baseline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffaccel.eval.comparison.row import Row, Section
from diffaccel.eval.sets.run import Run
from diffaccel.eval.uncertainty.intervals import median_ratio
from diffaccel.runs.request import WAY

KEY, PARTS = "where_time_goes", ("text", "network", "decode")
TURNS, OWN = "turns on one machine", "the run itself, not in turns"
LABELS = {
    "nfe": "NFE", "forwards": "rows through the network", "speedup": "speed-up", "peak_memory": "peak memory",
    "first_call": "first call", "set_up": "set-up",
}  # fmt: skip
COUNTED = {
    "nfe": "predictions a picture; a guided one counts once",
    "forwards": "rows through the network a picture",
}


def rows(baseline: Run, runs: list[Run], timing: dict[str, Any] | None) -> list[Row]:
    """Rows of every run.

    With ``timing`` (of :mod:`diffaccel.eval.timing.turns`, where variants took turns on one machine) seconds and ratios
    come from there, for runs that one of the variants drew. Without it seconds are those of the runs themselves, which
    may have met a machine in different moods: a ratio then has no interval, and its row says where it comes from.
    """
    timed = _timed(timing, (baseline, *runs))
    found: list[Row] = []
    for run in (baseline, *runs):
        found += _of_run(run, baseline) + _speed(run, baseline, timed) + _used(run, baseline, timed)
    return found


def _of_run(run: Run, baseline: Run) -> list[Row]:
    cost = run.record.get("cost")
    if not cost:
        return []
    base, found = baseline.record.get("cost"), []
    for metric, what in COUNTED.items():
        if metric not in cost:  # nobody counted them in a function of the user's
            continue
        row = _row(metric, run, cost[metric] / len(run), detail={"what": what})
        if run is not baseline and base and metric in base:
            row.delta = cost[metric] / len(run) - base[metric] / len(baseline)
        found.append(row)
    return found


def _used(run: Run, baseline: Run, timed: dict[str, Any]) -> list[Row]:
    """Peak memory, energy and the first call, of turns or else of the runs; differences where both are of one kind."""
    entry, base = timed.get(run.name), timed.get(baseline.name)
    found: list[Row] = []
    if entry is None:
        entry = run.record.get("cost") or {}
        base = {} if base is not None else baseline.record.get("cost") or {}
    where = "" if run.record.get("device", {}).get("type") == "cuda" else "of the whole process"
    for metric, key, unit, scale, source in (
        ("peak_memory", "peak_memory", "GiB", 2.0**30, where),
        ("energy", "energy_joules", "J", 1.0, "NVML"),
        ("first_call", "first_call_seconds", "s", 1.0, "the first of all its calls, a whole batch"),
        ("set_up", "set_up_seconds", "s", 1.0, "once: putting the methods on, with weights converted and calibrated"),
    ):
        if entry.get(key) is None:
            continue
        row = _row(metric, run, entry[key] / scale, unit=unit, detail={"from": source})
        if run is not baseline and base is not None and base.get(key) is not None:
            row.delta = (entry[key] - base[key]) / scale
        found.append(row)
    return found


def _speed(run: Run, baseline: Run, timed: dict[str, Any]) -> list[Row]:
    entry = timed.get(run.name)
    if entry is not None:
        seconds = _row("seconds", run, entry["seconds_per_image"], unit="s", detail={"from": TURNS})
        if run is baseline or (base := timed.get(baseline.name)) is None:
            return [seconds]
        interval = median_ratio(base["seconds"], entry["seconds"])  # whichever variant the timing's own ratios are to
        detail = {"from": TURNS, "turns": entry["turns"], "significant": interval.significant}
        speedup = _row("speedup", run, interval.value, better="higher", unit="x", detail=detail)
        speedup.interval = interval
        return [seconds, speedup]
    cost = run.record.get("cost")
    if not cost:
        return []
    where = {"from": OWN}
    found = [_row("seconds", run, cost["seconds"] / len(run), unit="s", detail=where)]
    base = baseline.record.get("cost")
    if run is not baseline and base and not timed and _same_machine(run, baseline):
        ratio = base["seconds"] / len(baseline) / (cost["seconds"] / len(run))
        found.append(_row("speedup", run, ratio, better="higher", unit="x", detail=where))
    return found


def _same_machine(run: Run, baseline: Run) -> bool:
    return run.record.get("device") == baseline.record.get("device")


def _row(metric: str, run: Run, value: float, *, better: Any = "lower", unit: str = "", detail: Any = None) -> Row:
    return Row(
        metric=metric, key=LABELS.get(metric, metric), family="cost", run=run.name, better=better,
        value=float(value), unit=unit, n=len(run), detail=detail or {},
    )  # fmt: skip


def section(baseline: Run, runs: Sequence[Run], timing: dict[str, Any] | None) -> Section | None:
    """Where the time of a call goes: text encoders, network, decoder, the rest; and what a first call takes.

    None where no run says.
    """
    timed, images = _timed(timing, (baseline, *runs)), (timing or {}).get("images_a_call", 1)
    lines, data = [], {}
    for run in (baseline, *runs):
        found = _split(run, timed.get(run.name), images)
        if found is None:
            continue
        data[run.name] = found
        lines.append((
            run.name, *(_milliseconds(found[part]) for part in (*PARTS, "other", "seconds")),
            _milliseconds(found["first_call"]), "within noise" if found["noise"] else _milliseconds(found["one_off"]),
            _milliseconds(found["set_up"]),
            str(found["calls"] or ""), found["from"],
        ))  # fmt: skip
    if not lines:
        return None
    parts = ("text", "network", "decoder", "other", "all", "first call", "one-off", "set-up")
    heads = (*(f"{part}, ms" for part in parts), "calls", "measured")
    note = "Milliseconds a picture. The first call is of a whole batch; one-off is what it took beyond a later one: "
    note += "compilation, caches. Set-up puts the methods on, once: converted weights, calibration. Calls are of the "
    note += "network, in one call of the pipeline."
    return Section(
        key=KEY, title="Where the time goes", columns=("run", *heads), rows=tuple(lines), note=note,
        data={"runs": data},
    )  # fmt: skip


def _split(run: Run, entry: dict[str, Any] | None, images: int) -> dict[str, Any] | None:
    """Seconds a picture by part; of a first call, and what it took beyond a later one."""
    cost = run.record.get("cost") or {}
    if entry is not None:
        parts, seconds, source = {p: s / images for p, s in entry["parts"].items()}, entry["seconds_per_image"], TURNS
        first = entry["first_call_seconds"]
        one_off = first - seconds * images
        noise = one_off <= max(entry["seconds"]) - min(entry["seconds"])
        more = {
            "first_call": first,
            "one_off": one_off,
            "noise": noise,
            "set_up": entry.get("set_up_seconds"),
            "calls": len(entry["steps"]),
        }
    elif cost.get("parts"):
        parts = {part: seconds / len(run) for part, seconds in cost["parts"].items()}
        seconds, source = cost["seconds"] / len(run), OWN
        more = {
            "first_call": None,
            "one_off": None,
            "noise": False,
            "set_up": None,
            "calls": len(cost.get("steps") or ()),
        }
    else:
        return None
    other = seconds - sum(parts.values())
    return {part: parts.get(part) for part in PARTS} | {"other": other, "seconds": seconds, "from": source, **more}


def steps(run: Run, timing: dict[str, Any] | None) -> list[float]:
    """Seconds of every network call of one call of the pipeline: medians over turns, else over the run's batches."""
    entry = _timed(timing, [run]).get(run.name)
    return (entry or run.record.get("cost") or {}).get("steps") or []


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1000 * seconds:.1f}"


def doubts(runs: Sequence[Run], timing: dict[str, Any] | None) -> list[str]:
    """Runs that a timing says nothing of."""
    timed = _timed(timing, runs)
    lacking = [run.name for run in runs if run.name not in timed]
    if not timing or not lacking:
        return []
    known = ", ".join(entry["name"] for entry in timing["variants"])
    return [f"No variant of the timing drew {', '.join(lacking)}: it has {known}. Their seconds are the runs' own."]


def _timed(timing: dict[str, Any] | None, runs: Sequence[Run]) -> dict[str, Any]:
    """By a run's name the entry of the variant that drew it: of that name, or with the settings of its record."""
    entries = (timing or {}).get("variants", [])
    found = {entry[key]: entry for entry in entries for key in ("name", "folder")}
    for run in runs:
        settings = run.record.get("settings", {})
        for entry in entries:
            if (drawn := entry.get("drawn")) and all(key in settings and settings[key] == drawn[key] for key in WAY):
                found.setdefault(run.name, entry)
    return found
