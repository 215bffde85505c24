"""Times of the network calls of one pipeline call, as bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffaccel.eval.report.names import clean


def steps(report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return seconds of every network call of a run as bars on one scale, short ones marked, with a summary."""
    by_run = report.get("steps") or {}
    baseline_calls = len(by_run.get(report["baseline"], ()))
    longest = max((max(times) for times in by_run.values() if times), default=0)
    charts = []
    for name, times in by_run.items():
        if not times or not longest:
            continue
        short = short_calls(times)
        bars = [
            {
                "height": round(100 * seconds / longest, 1),
                "short": i in short,
                "text": f"call {i + 1}: {1000 * seconds:.1f} ms{', short' if i in short else ''}",
            }
            for i, seconds in enumerate(times)
        ]
        charts.append({"run": clean(name), "bars": bars, "summary": _summary(times, len(short), baseline_calls)})
    return charts


def _summary(times: Sequence[float], short: int, baseline_calls: int) -> str:
    text = f"{len(times)} calls, {sum(times):.3f} s"
    if short:
        text += f"; {short} of them under a third of a full one, as cached ones are"
    if baseline_calls and len(times) != baseline_calls:
        word = "fewer" if len(times) < baseline_calls else "more"
        text += f"; {abs(baseline_calls - len(times))} {word} than the baseline"
    return text


def short_calls(times: Sequence[float]) -> set[int]:
    """Return the calls that took under a third of a full one.

    The second longest call counts as a full one, since the first call may hold a warm-up.
    """
    full = sorted(times)[-2:][0]
    return {i for i, seconds in enumerate(times) if seconds < full / 3}
