"""The record and the tables of tunings that were measured one by one: leads with intervals over tunings, promises."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from diffaccel.eval.comparison.gate import parse as parse_gate
from diffaccel.eval.tuning.rule import Promise, Samples
from diffaccel.eval.uncertainty.intervals import wilson
from diffaccel.eval.uncertainty.student import student_quantile
from diffaccel.files import write_json

TUNER = "tuner"
LEAST, OF = 37, 40  # promises that hold
LEVEL = 0.95


def interval(values: Sequence[float]) -> list[float] | None:
    """Return the mean of tunings with Student's 95 % interval; None for fewer than two."""
    if len(values) < 2:
        return None
    half = student_quantile((1 + LEVEL) / 2, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return [fmean(values), fmean(values) - half, fmean(values) + half]


def speed(part: dict[str, Any], way: str) -> float:
    """Return how many times as fast as the plain pipeline a way's plan was in turns with the others."""
    plan = part["ways"][way]["plan"]
    return part["turns"]["plain"]["seconds"] / part["turns"][plan]["seconds"] if plan in part["turns"] else 1.0


def holds(part: dict[str, Any], way: str) -> bool:
    """Return whether the rule does not hold of a way's plan on the prompts that no search saw, by their mean."""
    entry = part["ways"][way]
    promise = Promise(parse_gate(part["options"]["fail_if"]), {"ssim": 1.0})
    values = {name: numbers for name, numbers in entry["truth"].items() if name in promise.gate.metrics}
    return promise.judge(Samples(values, {"speedup": speed(part, way)})).margin >= 0


def row(parts: list[dict[str, Any]], way: str, aim: str) -> dict[str, Any]:
    """Return a way's means over tunings, and by how much the tuner is ahead of it, tuning by tuning."""
    own = [part for part in parts if way in part["ways"] and "turns" in part]
    means = {
        name: fmean(fmean(part["ways"][way]["truth"][name]) for part in own) for name in own[0]["ways"][way]["truth"]
    }
    values: dict[str, Any] = {
        "way": way, "tunings": len(own), "evaluations": fmean(part["ways"][way]["evaluations"] for part in own),
        "speed": math.exp(fmean(math.log(speed(part, way)) for part in own)), "means": means,
    }  # fmt: skip
    both = [part for part in own if TUNER in part["ways"]]
    if way != TUNER and both:
        values["tuner_ahead"] = {
            name: interval(
                [fmean(p["ways"][TUNER]["truth"][name]) - fmean(p["ways"][way]["truth"][name]) for p in both]
            )
            for name in means
        }
        ratio = interval([math.log(speed(part, TUNER) / speed(part, way)) for part in both])
        values["tuner_faster"] = None if ratio is None else [math.exp(end) for end in ratio]
    if aim == "keep":
        kept = sum(holds(part, way) for part in own)
        share = wilson(kept, len(own))
        values |= {"holds": kept, "share": [share.value, share.low, share.high]}
        values["found_nothing"] = sum(not part["ways"][way]["certified"] for part in own)
        cliffs = [sentence for part in own for sentence in part["ways"][way].get("cliffs", [])]
        values["beside_a_cliff"] = sum(sentence.startswith("Cliff") for sentence in cliffs)
        values["cliffs"] = [sentence for sentence in cliffs if sentence.startswith("Cliff")]
    return values


def shown(rows: list[dict[str, Any]], aim: str) -> str:
    """Return the table of an aim."""
    names = list(rows[0]["means"])
    head = ["way", "tunings", "pictures", "speed", *names, *(f"tuner's lead, {name}" for name in names), "tuner faster"]
    head += ["promise holds", "found nothing", "cliffs named"] if aim == "keep" else []
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for entry in rows:
        cells = [entry["way"], str(entry["tunings"]), f"{entry['evaluations']:.0f}", f"{entry['speed']:.2f}x"]
        cells += [f"{entry['means'][name]:.4f}" for name in names]
        ahead = entry.get("tuner_ahead", {})
        cells += [_ends(ahead.get(name), "{:+.4f} ({:+.4f} to {:+.4f})") for name in names]
        cells.append(_ends(entry.get("tuner_faster"), "{:.2f}x ({:.2f} to {:.2f})"))
        if aim == "keep":
            cells += [f"{entry['holds']} of {entry['tunings']} ({entry['share'][1]:.0%} to {entry['share'][2]:.0%})"]
            cells += [str(entry["found_nothing"]), str(entry["beside_a_cliff"])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _ends(ends: list[float] | None, form: str) -> str:
    return "" if ends is None else form.format(*ends)


def join(parts: Path, out: Path, kind: str | None) -> int:
    """Write a record of each aim's tunings and print its table; return 1 where too few promises of the tuner hold."""
    failed = 0
    for aim in ("near", "keep"):
        tunings = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(parts.glob(f"{aim}-*.json"))]
        tunings = [part for part in tunings if "turns" in part]
        if not tunings:
            continue
        ways = dict.fromkeys(way for part in tunings for way in part["ways"])
        rows = [row(tunings, way, aim) for way in ways]
        print(shown(rows, aim), flush=True)
        shared = {key: tunings[0][key] for key in ("options", "device", "versions", "date")}
        values = {"aim": aim, "kind": kind, **shared, "rows": rows, "tunings": tunings}
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / f"bench_tuner_emoji-flux_{aim}_{kind or 'cpu'}.json", values)
        for entry in rows:
            is_short = aim == "keep" and entry["way"] == TUNER
            failed |= int(is_short and entry["holds"] < math.floor(entry["tunings"] * LEAST / OF))
    return failed
