"""Say which variants of a comparison at equal seconds lie on the front of seconds and score, with intervals.

    python -m scripts.pareto_front out/equal/bench_equal_seconds_emoji-flux_nvidia-h200_pictures.json

A variant is *on* the front when it surely scores higher than every one that takes no longer: each paired difference has
its 95 % interval above zero, which needs no correction, since all must hold. It is *off* when one that takes no longer
surely scores higher: that interval is widened for the number of those rivals (Bonferroni), since one is enough. Else it
is *open*, and its closest rival is named. Seconds are medians over turns and are taken as they are.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffaccel.eval.uncertainty.intervals import Interval, paired_difference
from diffaccel.files import write_json
from diffaccel.runs.variant import parse

ERROR = 0.05
LOWER = ("lpips",)  # scores of which less is better
ON, OFF, OPEN = "on", "off", "open"


def lead(own: Sequence[float], other: Sequence[float], score: str, level: float = 1 - ERROR) -> Interval:
    """Return by how much one list of scores is better than another, picture by picture, with its interval."""
    first, second = (other, own) if score in LOWER else (own, other)
    return paired_difference(first, second, level=level).interval


def verdict(row: dict[str, Any], rows: list[dict[str, Any]], score: str, part: str = "loop") -> dict[str, Any]:
    """Return where a row stands: ``verdict``, the ``rival`` that decides it, and the ``lead`` over that one.

    Args:
        rows: with ``seconds`` by part and the score of every picture under its name.
        score: name of the score.
        part: which seconds.
    """
    own = row["seconds"][part]
    rivals = [other for other in rows if other is not row and other["seconds"][part] <= own]
    if not rivals:
        return {"verdict": ON, "rival": None, "lead": None}
    leads = [(lead(row[score], other[score], score), other) for other in rivals]
    least, rival = min(leads, key=lambda entry: entry[0].low)
    if least.low > 0:
        return _told(ON, rival, least)
    for interval, other in sorted(leads, key=lambda entry: entry[0].high):
        if interval.high >= 0:
            break
        wide = lead(row[score], other[score], score, 1 - ERROR / len(rivals))
        if wide.high < 0:
            return _told(OFF, other, wide)
    return _told(OPEN, rival, least)


def _told(word: str, rival: dict[str, Any], interval: Interval) -> dict[str, Any]:
    return {"verdict": word, "rival": rival["variant"], "lead": ends(interval)}


def ends(interval: Interval) -> list[float]:
    """Return the value of an interval and its ends, rounded."""
    return [round(value, 4) for value in (interval.value, interval.low, interval.high)]


def family(text: str) -> str:
    """Return the methods of a variant, with the preset of its stages, and of a method with kinds its kind."""
    words = []
    for config in parse(text).methods:
        name = config.name
        if preset := getattr(config, "preset", None):
            name = f"{preset}, fresh noise" if config.noise == "fresh" else preset
        words.append(f"{name} {config.kind}" if hasattr(config, "kind") else name)
    return " + ".join(word for word in words if word != "euler" or len(words) == 1) or "plain"


def unbeaten(rows: list[dict[str, Any]], score: str, part: str = "loop") -> list[str]:
    """Return of each family the variants that none of it beats in both seconds and mean score: options to report."""
    kept: list[str] = []
    for name in dict.fromkeys(family(row["variant"]) for row in rows):
        best: float | None = None
        own = [row for row in rows if family(row["variant"]) == name]
        for row in sorted(own, key=lambda row: row["seconds"][part]):
            mean = sum(row[score]) / len(row[score]) * (-1 if score in LOWER else 1)
            if best is None or mean > best:
                best = mean
                kept.append(row["variant"])
    return kept


def fronts(rows: list[dict[str, Any]], scores: Sequence[str], part: str) -> dict[str, list[dict[str, Any]]]:
    """Return by score the verdicts of all rows, the fastest first."""
    ordered = sorted(rows, key=lambda row: row["seconds"][part])
    return {
        score: [
            {"variant": row["variant"], "family": family(row["variant"]), "seconds": row["seconds"][part],
             "mean": round(sum(row[score]) / len(row[score]), 4), **verdict(row, rows, score, part)}
            for row in ordered
        ]
        for score in scores
    }  # fmt: skip


def shown(values: dict[str, list[dict[str, Any]]]) -> str:
    """Return the verdicts as tables, and a line a score that names the families with a variant on the front."""
    lines = []
    for score, rows in values.items():
        lines += [f"| variant | ms | {score} | front | decided by | lead |", "|---" * 6 + "|"]
        for row in rows:
            ends = "" if row["lead"] is None else "{:+.4f} ({:+.4f} to {:+.4f})".format(*row["lead"])
            cells = [row["variant"], f"{1000 * row['seconds']:.2f}", f"{row['mean']:.4f}", row["verdict"]]
            lines.append("| " + " | ".join([*cells, row["rival"] or "", ends]) + " |")
        for word in (ON, OPEN):
            names = dict.fromkeys(row["family"] for row in rows if row["verdict"] == word)
            lines.append(f"{score}, {word} the front: {', '.join(names) or 'none'}.")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Print the verdicts of a file of pictures' scores, and keep them beside it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("pictures", type=Path, help="a file *_pictures.json of scripts.bench_equal_seconds")
    parser.add_argument("--scores", nargs="+", default=["ssim", "judge"])
    parser.add_argument("--part", choices=["loop", "whole"], default="loop", help="seconds of the loop, or of the call")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON of the verdicts")
    args = parser.parse_args()
    rows = [row for row in json.loads(args.pictures.read_text(encoding="utf-8"))["rows"] if row["seconds"]]
    values = fronts(rows, args.scores, args.part)
    print(shown(values))
    if args.out:
        write_json(args.out, {"of": args.pictures.name, "part": args.part, "fronts": values})


if __name__ == "__main__":
    main()
