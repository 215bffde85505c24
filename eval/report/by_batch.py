"""Latency and throughput by batch, from timings in turns of one batch each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from diffaccel.eval.comparison.row import Section

KEY = "by_batch"


def section(timings: Sequence[Mapping[str, Any]]) -> Section | None:
    """Tabulate seconds of a call and pictures a second of every variant, by pictures in a call.

    Args:
        timings: results of :func:`diffaccel.eval.timing.turns.take_turns`.

    Returns:
        The table, variant by variant; None without timings.
    """
    entries = [(timing, entry) for timing in timings for entry in timing["variants"]]
    if not entries:
        return None
    names = list(dict.fromkeys(_name(entry) for _, entry in entries))
    entries.sort(key=lambda item: (names.index(_name(item[1])), item[0]["images_a_call"]))
    numbers = [_numbers(timing, entry) for timing, entry in entries]
    devices = dict.fromkeys(timing["device"].get("name") or timing["device"]["type"] for timing in timings)
    return _section(numbers, f"Medians over turns on {', '.join(devices)}; a call is the whole pipeline call.")


def _section(numbers: Sequence[Mapping[str, Any]], note: str) -> Section:
    rows = tuple(
        (
            line["run"], str(line["batch"]), f"{1000 * line['latency']:.1f}", f"{line['throughput']:.4g}",
            _ratio_text(line["ratio"]), str(line["turns"]),
        )
        for line in numbers
    )  # fmt: skip
    return Section(
        key=KEY, title="Latency and throughput by batch",
        columns=("run", "pictures in a call", "latency of a call, ms", "pictures a second", "speed-up", "turns"),
        rows=rows, note=note, data={"numbers": list(numbers)},
    )  # fmt: skip


def _name(entry: Mapping[str, Any]) -> str:
    """Return the name of a variant's folder, as its run has it."""
    return entry.get("folder") or entry["name"]


def section_of_rows(report: Mapping[str, Any]) -> Section | None:
    """Tabulate the same from the rows of a report that know their batch; None where none does."""
    rows = {(row["run"], row["metric"]): row for row in report["metrics"] if row["metric"] in ("seconds", "speedup")}
    numbers = []
    for (run, metric), row in rows.items():
        batch = (row.get("detail") or {}).get("batch")
        if metric == "seconds" and batch and row.get("value"):
            speedup = rows.get((run, "speedup"), {})
            ratio = {"value": speedup.get("value"), **(speedup.get("interval") or {})}
            turns = (speedup.get("detail") or {}).get("turns")
            latency = batch * row["value"]
            numbers.append({
                "run": run, "batch": batch, "latency": latency, "throughput": batch / latency, "ratio": ratio,
                "turns": turns or "",
            })  # fmt: skip
    return _section(numbers, "A call is the whole pipeline call.") if numbers else None


def _numbers(timing: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is known of one variant at one batch."""
    batch, latency = timing["images_a_call"], median(entry["seconds"])
    return {
        "run": _name(entry), "batch": batch, "latency": latency, "throughput": batch / latency,
        "ratio": entry.get("ratio"), "turns": entry["turns"],
    }  # fmt: skip


def _ratio_text(ratio: Mapping[str, Any] | None) -> str:
    if not ratio or ratio.get("value") is None:
        return ""
    if ratio.get("low") is None:
        return f"{ratio['value']:.2f}x"
    return f"{ratio['value']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})"
