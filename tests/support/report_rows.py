"""Rows and reports as ``report.json`` has them, for tests of what is made from it."""

from __future__ import annotations

from typing import Any


def row(metric: str, run: str, value: float | None = None, *, family: str = "alignment", **more: Any) -> dict[str, Any]:
    """Return a row; ``low, high`` and ``delta_low, delta_high`` become its intervals, of ``units`` prompts."""
    units = more.pop("units", 100)
    ends = {name: (more.pop(f"{name}low", None), more.pop(f"{name}high", None)) for name in ("", "delta_")}
    intervals = {
        f"{name}interval": None if low is None else {"low": low, "high": high, "units": units}
        for name, (low, high) in ends.items()
    }
    empty: dict[str, Any] = {
        "key": metric, "better": "higher", "delta": None, "floor": None, "n": units, "m": None, "unit": "",
        "identical": False, "missing": None, "detail": {},
    }  # fmt: skip
    return {**empty, "metric": metric, "family": family, "run": run, "value": value, **intervals, **more}


def score(run: str, delta: float, low: float, high: float, **more: Any) -> dict[str, Any]:
    """Return the row of a score with its paired difference to the baseline."""
    return row("clip_score", run, 80 + delta, delta=delta, delta_low=low, delta_high=high, **more)


def speedup(run: str, value: float, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    """Return the row of a speed-up."""
    return row("speedup", run, value, family="cost", low=low, high=high, key="speed-up", unit="x")


def report(*rows: dict[str, Any], baseline: str = "base", **more: Any) -> dict[str, Any]:
    """Return a report of rows and of the runs that they name."""
    names = dict.fromkeys([baseline, *(entry["run"] for entry in rows)])
    runs = [{"name": name, "images": 100, "settings": {}} for name in names]
    return {
        "baseline": baseline, "made": "2026-01-02T03:04:05", "versions": {}, "runs": runs, "metrics": list(rows), **more
    }  # fmt: skip
