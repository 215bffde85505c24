"""What runs are worth: decibels over clips with paired intervals, norms of early gradients, and curves as pictures."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffaccel.eval.metrics.world_model import psnr
from diffaccel.eval.uncertainty.influence import influence_interval
from diffaccel.eval.uncertainty.intervals import Interval
from diffaccel.files import atomic

Errors = Sequence[Tensor]  # (N,) of every seed


def decibels(errors: Errors) -> float:
    """Return the mean over seeds of the PSNR of mean squared errors of frames in [-1, 1]; nan is left out."""
    return statistics.fmean(float(psnr(rows)) for rows in errors)


def gain(first: Errors, second: Errors) -> Interval:
    """Return how many dB the first are better, with an interval over clips that both share; seeds are averaged.

    The influence of clip i on ``10 log10(4 / mean e)`` is ``-(10 / ln 10) (e_i / mean e - 1)``.
    """
    whole = torch.stack([*first, *second]).isfinite().all(0)  # a frame without a pixel seen before has no error
    sides = [torch.stack([rows[whole] for rows in side]).double() for side in (first, second)]

    def influences(rows: Tensor) -> Tensor:
        shares = [(side[:, rows] / side[:, rows].mean(1, keepdim=True)).mean(0) for side in sides]
        return (shares[1] - shares[0]) * (10 / math.log(10))

    value = decibels(list(sides[0])) - decibels(list(sides[1]))
    return influence_interval(value, influences, int(whole.sum()), held="seeds as they are")


def log_of(folder: Path) -> list[dict[str, float]]:
    """Return the entries of a run's log; of a step that was made twice, the last."""
    entries: dict[tuple[bool, int], dict[str, float]] = {}
    file = folder / "log.jsonl"
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        entry = json.loads(line)
        entries["loss" in entry, entry["step"]] = entry
    return sorted(entries.values(), key=lambda entry: entry["step"])


def early_norm(log: list[dict[str, float]], steps: int) -> float:
    """Return the mean norm of gradients in the first fifth of a run; entries are means of the steps before them."""
    total, weight, last = 0.0, 0.0, 0.0
    for entry in log:
        if "norm" not in entry or (weight and entry["step"] > steps / 5):
            continue
        span = entry["step"] - last
        total, weight, last = total + span * entry["norm"], weight + span, entry["step"]
    return total / weight if weight else math.nan


def told(interval: Interval) -> str:
    """Return an interval in words of a table."""
    return f"{interval.value:+.2f} [{interval.low:+.2f}, {interval.high:+.2f}]"


def rows_of(
    groups: dict[tuple[int, str], list[dict[str, Any]]], plain: dict[str, Tensor], baseline: str
) -> list[dict[str, Any]]:
    """Return a row for each number of bits and way: means over seeds, and dB against full precision and a baseline.

    Args:
        groups: results of the seeds, each with ``columns`` of errors ``(N,)``.
        plain: the columns of the full-precision network.
        baseline: the way that others are compared with.
    """
    rows = []
    for (bits, way), found in groups.items():
        row: dict[str, Any] = {"bits": bits, "way": way, "steps": found[0]["steps"]}
        row["seeds"] = [r["seed"] for r in found]
        for key in ("early_norm", "distance", "seconds"):
            row[key] = statistics.fmean(r[key] for r in found)
            row[f"{key} of seeds"] = [r[key] for r in found]
        row["columns"] = {}
        other = {r["seed"]: r for r in groups.get((bits, baseline), [])}
        pairs = [(r, other[r["seed"]]) for r in found if way != baseline and r["seed"] in other]
        for name in plain:
            mine = [r["columns"][name] for r in found]
            column: dict[str, Any] = {
                "dB": decibels(mine),
                "dB of seeds": [decibels([errors]) for errors in mine],
                "over full precision": gain(mine, [plain[name]] * len(mine)),
            }
            if pairs:
                column[f"over {baseline}"] = gain(
                    [r["columns"][name] for r, _ in pairs], [o["columns"][name] for _, o in pairs]
                )
            row["columns"][name] = column
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]], plain: dict[str, Tensor], baseline: str) -> str:
    """Return the rows as Markdown, with a block of lines for each column of errors."""
    lines = [
        "| bits | way | steps | seeds | norm of early gradients | distance | dB | over full precision "
        f"| over {baseline} |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, errors in plain.items():
        lines.append(f"| **{name}** | full precision | | | | | {decibels([errors]):.2f} | | |")
        for row in rows:
            column = row["columns"][name]
            versus = told(column[f"over {baseline}"]) if f"over {baseline}" in column else ""
            spread = f" (sd {statistics.stdev(column['dB of seeds']):.2f})" if len(row["seeds"]) > 1 else ""
            lines.append(
                f"| W{row['bits']}A{row['bits']} | {row['way']} | {row['steps']} | {len(row['seeds'])} | "
                f"{row['early_norm']:.4f} | {row['distance']:.5f} | {column['dB']:.2f}{spread} | "
                f"{told(column['over full precision'])} | {versus} |"
            )
    return "\n".join(lines)


def plot(logs: dict[tuple[int, str], list[list[dict[str, float]]]], title: str, file: Path) -> None:
    """Draw training loss, norm of gradients and held-out distance of every way; a line is a seed.

    Args:
        logs: of the seeds, by bits and way.
    """
    from matplotlib.figure import Figure

    kinds = sorted({bits for bits, _ in logs}, reverse=True)
    ways = list(dict.fromkeys(way for _, way in logs))
    shown = (("loss", "training loss"), ("norm", "norm of gradients"), ("distance", "distance to full precision"))
    figure = Figure(figsize=(13, 3.6 * len(kinds)), layout="constrained")
    grid = figure.subplots(len(kinds), len(shown), squeeze=False)
    for row, bits in enumerate(kinds):
        for place, (key, label) in enumerate(shown):
            axes = grid[row][place]
            for number, way in enumerate(ways):
                for seed, log in enumerate(logs.get((bits, way), [])):
                    points = [(entry["step"], entry[key]) for entry in log if key in entry]
                    if points:
                        axes.plot(
                            *zip(*points, strict=True), color=f"C{number}", linewidth=1, alpha=0.8,
                            label=way if seed == 0 else None, marker="." if key == "distance" else None,
                        )  # fmt: skip
            axes.set(title=f"W{bits}A{bits}: {label}", xlabel="step", yscale="log")
            axes.grid(alpha=0.3)
            axes.legend(fontsize=7)
    figure.suptitle(title)
    with atomic(file) as opened:
        figure.savefig(opened, dpi=110, format="png")
