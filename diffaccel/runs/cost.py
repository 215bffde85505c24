"""The cost of a run, from those of its pipeline calls."""

from __future__ import annotations

from statistics import median
from typing import Any


def total_cost(costs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the cost of a run from those of its chunks: sums, the highest peak, the median time of each step."""
    peaks = [cost["peak_memory"] for cost in costs if cost["peak_memory"] is not None]
    counts = [key for key in ("nfe", "forwards", "calls", "joules") if all(key in cost for cost in costs)]
    resumed = [cost["resumed"]["nfe"] for cost in costs if "resumed" in cost]
    return {
        "seconds": round(sum(cost["seconds"] for cost in costs), 3),
        **{key: sum(cost[key] for cost in costs) for key in counts},
        "peak_memory": max(peaks, default=None),
        "parts": _sum_parts([cost.get("parts", {}) for cost in costs]),
        "steps": _median_steps([cost.get("steps", []) for cost in costs]),
        **({"resumed": {"nfe": sum(resumed)}} if resumed else {}),
        **_sum_caches([cost["caches"] for cost in costs if "caches" in cost]),
        **({"graphs": graphs[-1]} if (graphs := [cost["graphs"] for cost in costs if "graphs" in cost]) else {}),
    }


def _sum_caches(caches: list[dict[str, Any]]) -> dict[str, Any]:
    """Return real and skipped network calls of all chunks, and the skipped ones' share of their seconds."""
    if not caches:
        return {}
    total = {key: sum(c[key] for c in caches) for key in ("real_calls", "skipped_calls")}
    seconds = {key: round(sum(c[key] for c in caches), 4) for key in ("real_seconds", "skipped_seconds")}
    whole = sum(seconds.values())
    share = seconds["skipped_seconds"] / whole if whole else 0.0
    latest = {key: caches[-1][key] for key in ("methods", "real_steps", "history_bytes") if key in caches[-1]}
    return {"caches": {**latest, **total, **seconds, "skipped_share_of_seconds": round(share, 4)}}


def _sum_parts(parts: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(sum(part.get(name, 0.0) for part in parts), 3) for name in (parts[0] if parts else {})}


def _median_steps(steps: list[list[float]]) -> list[float]:
    """Return the seconds of each network call, the median over the chunks that made as many calls as the first."""
    equal = [times for times in steps if steps and len(times) == len(steps[0])]
    return [round(median(times), 5) for times in zip(*equal, strict=True)]


def drawn_before(record: dict[str, Any], noun: str) -> str:
    """Return what to say when a call of ``generate_run`` drew nothing, or a part only; "" when it drew everything."""
    drawn, count = record["drawn"], len(record["images"])
    resumed = record["cost"].get("resumed")
    day = str(record.get("finished"))[:10]
    if drawn == 0:
        return (
            f"nothing to draw: all {count} {noun}{'s' * (count != 1)} exist; times are of when they were drawn, {day}"
        )
    if drawn != count:
        return f"{drawn} of {count} {noun}s drawn now; times are of all of them"
    if resumed is None:
        return ""
    made = f"a search went on that had been stopped after {resumed['nfe']} of these NFE"
    return f"{made}; rows and times are of the process that ended it"


def without_steps(cost: dict[str, Any]) -> dict[str, Any]:
    """Return a cost without the seconds of each network call."""
    return {key: value for key, value in cost.items() if key != "steps"}
