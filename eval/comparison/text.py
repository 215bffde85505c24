"""A comparison as plain text, for ``Comparison.table()``: verdicts, aligned tables and warnings."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffaccel.eval.comparison import verdict
from diffaccel.eval.comparison.row import Row, digits

if TYPE_CHECKING:
    from diffaccel.eval.comparison.result import Comparison

FAMILIES = {
    "fidelity": "Fidelity to the baseline at equal prompt and seed",
    "video": "Videos over time",
    "alignment": "Fit to the prompt",
    "distribution": "Distribution",
    "cost": "Cost of a picture",
}
HEADS = ("run", "metric", "value", "interval", "difference", "other seeds", "n", "note")


@dataclass(frozen=True)
class Line:
    """A row of the table, every cell as text."""

    run: str
    metric: str
    arrow: str
    value: str
    interval: str
    delta: str
    floor: str
    n: str
    note: str


def of_things(text: str, things: str) -> str:
    """Return a text of ours that speaks of pictures as it is said of ``things``, which are "pictures" or "videos"."""
    return re.sub(r"\bpicture", things.removesuffix("s"), text)


def table(comparison: Comparison) -> list[tuple[str, list[Line]]]:
    """Return lines grouped under the title of their family, metric by metric, each in the order of runs."""
    groups, things = [], "videos" if any(row.family == "video" for row in comparison.rows) else "pictures"
    for family, title in FAMILIES.items():
        rows = [row for row in comparison.rows if row.family == family]
        order = {key: position for position, key in enumerate(dict.fromkeys(row.key for row in rows))}
        lines = [_line(row) for row in sorted(rows, key=lambda row: order[row.key])]
        if lines:
            groups.append((of_things(title, things), lines))
    return groups


def _line(row: Row) -> Line:
    def number(value: float | None, sign: str = "") -> str:
        return "" if value is None else f"{value:{sign}z.{digits(row.metric)}f}"  # z: no -0.000

    value = number(row.value) + (f" {row.unit}" if row.unit and row.value is not None else "")
    if row.identical:
        value = "identical"
    interval = (
        f"{number(row.interval.low)} to {number(row.interval.high)}" if row.interval and not row.identical else ""
    )
    delta = number(row.delta, "+")
    if row.delta is not None and row.delta_interval is not None:
        delta += f" ({number(row.delta_interval.low, '+')} to {number(row.delta_interval.high, '+')})"
    note = "; ".join(filter(None, (row.missing or row.detail.get("from", ""), "" if row.missing else row.too_few)))
    sign = "+" if row.floor_interval is not None and row.floor_interval.null == 0 else ""
    floor = number(row.floor, sign)
    if row.floor_interval is not None:
        floor += f" ({number(row.floor_interval.low, sign)} to {number(row.floor_interval.high, sign)})"
    counts = str(row.n or "") if row.m in (None, row.n) else f"{row.n} / {row.m}"
    arrow = "↓" if row.better == "lower" else "↑"
    return Line(row.run, row.key, arrow, value, interval, delta, floor, counts, note)


def verdicts(comparison: Comparison) -> list[dict[str, str]]:
    """Return a sentence for every run: how much faster, how far from the baseline, and whether chance explains it."""
    sentences = []
    for run in comparison.runs:
        parts = [_speed_text(comparison.row("speedup", run.name))]
        fidelity = [r for r in comparison.rows if r.run == run.name and r.family == "fidelity" and not r.missing]
        if any(row.identical for row in fidelity if row.metric == "psnr"):
            parts.append(f"pixel for pixel the baseline's {'videos' if run.is_video else 'pictures'}")
        else:
            parts += [_fidelity_text(row) for row in fidelity if row.metric in ("lpips", "ssim", "psnr")]
        parts += [
            _change_text(row)
            for row in comparison.rows
            if row.run == run.name and row.family != "cost" and row.delta_interval is not None
        ]
        sentences.append({"run": run.name, "text": ", ".join(filter(None, parts))})
    return sentences


def _speed_text(row: Row | None) -> str:
    if row is None or row.value is None:
        return "speed not measured"
    if row.interval is None and (turns := row.detail.get("turns")):
        return f"{row.value:.2f}x as fast ({turns} turns, too few for an interval)"
    if row.interval is None:
        return f"{row.value:.2f}x as fast by the runs' own clocks"
    if not row.interval.significant:
        return "speed-up not shown"
    return f"{row.value:.2f}x as fast ({row.interval.low:.2f} to {row.interval.high:.2f})"


def _fidelity_text(row: Row) -> str:
    if row.value is None:
        return ""
    places = digits(row.metric)
    text = f"{row.key} {row.value:.{places}f}{' ' + row.unit if row.unit else ''}"
    return text if row.floor is None else f"{text} (other seeds {row.floor:.{places}f})"


def _change_text(row: Row) -> str:
    return f"{row.key} {row.delta:+.{digits(row.metric)}f} ({row.too_few or verdict.word(row.to_dict())})"


def plain(comparison: Comparison) -> str:
    """Return verdicts, aligned tables and warnings, without markup."""
    base = comparison.baseline
    lines = [f"{sentence['run']}: {sentence['text']}" for sentence in verdicts(comparison)]
    lines += ["", f"{len(base)} {'videos' if base.is_video else 'pictures'} a run against {base.name}; 95 % intervals"]
    for title, group in table(comparison):
        cells = [
            (
                line.run,
                f"{line.metric} {line.arrow}",
                line.value,
                line.interval,
                line.delta,
                line.floor,
                line.n,
                line.note,
            )
            for line in group
        ]
        lines += ["", title, *_aligned(HEADS, cells)]
    for section in comparison.sections:
        lines += [
            "",
            section.title,
            *_aligned(section.columns, section.rows),
            *([section.note] if section.note else []),
        ]
    return "\n".join([*lines, *(["", *comparison.warnings] if comparison.warnings else [])])


def _aligned(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table as lines of aligned columns; columns without a text are left out."""
    columns = [i for i, _ in enumerate(heads) if any(row[i] for row in rows)]
    widths = {i: max(len(cells[i]) for cells in (heads, *rows)) for i in columns}
    return ["  " + "  ".join(f"{cells[i]:<{widths[i]}}" for i in columns).rstrip() for cells in (heads, *rows)]
