"""What a picture costs: time, network evaluations, memory, energy; and the ratio to the baseline."""

from __future__ import annotations

from typing import Any

from diffaccel.eval.comparison.row import Row
from diffaccel.eval.intervals import Interval
from diffaccel.eval.runs import Run

COUNTED = {
    "nfe": "predictions a picture; a guided one counts once",
    "forwards": "rows through the network a picture",
}


def rows(baseline: Run, runs: list[Run], timing: dict[str, Any] | None) -> list[Row]:
    """Rows of every run.

    With ``timing`` (of :mod:`diffaccel.eval.timing`, where variants took turns on one machine) seconds and ratios come
    from there, for runs whose name is a variant's or that of its folder. Without it seconds are those of the runs
    themselves, which may have met a machine in different moods: a ratio then has no interval, and its row says where
    it comes from.
    """
    entries = (timing or {}).get("variants", [])
    timed = {entry[key]: entry for entry in entries for key in ("name", "folder")}
    found: list[Row] = []
    for run in (baseline, *runs):
        found += _of_run(run, baseline) + _speed(run, baseline, timed)
        entry = timed.get(run.name)
        if entry is not None and entry.get("energy_joules") is not None:
            found.append(_row("energy", run, entry["energy_joules"], unit="J", detail={"from": "NVML"}))
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
    if cost.get("peak_memory"):
        found.append(_row("peak_memory", run, cost["peak_memory"] / 2**30, unit="GiB"))
    return found


def _speed(run: Run, baseline: Run, timed: dict[str, Any]) -> list[Row]:
    entry = timed.get(run.name)
    if entry is not None:
        seconds = _row("seconds", run, entry["seconds_per_image"], unit="s", detail={"from": "turns on one machine"})
        if run is baseline or "ratio" not in entry:
            return [seconds]
        ratio = entry["ratio"]
        interval = Interval(ratio["value"], ratio["low"], ratio["high"], method=ratio["method"], null=1.0)
        detail = {"from": "turns on one machine", "turns": entry["turns"], "significant": interval.significant}
        speedup = _row("speedup", run, ratio["value"], better="higher", unit="x", detail=detail)
        speedup.interval = interval
        return [seconds, speedup]
    cost = run.record.get("cost")
    if not cost:
        return []
    where = {"from": "the run itself, not in turns"}
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
        metric=metric, key=metric, family="cost", run=run.name, better=better, value=float(value), unit=unit,
        n=len(run), detail=detail or {},
    )  # fmt: skip
