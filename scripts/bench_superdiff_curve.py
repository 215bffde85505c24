"""Compare AND over the number of steps, this package's kernel against the published sampler at 1000 steps.

    python -m scripts.bench_superdiff_curve --minutes 8 --kind nvidia-h200 --out out/superdiff --record docs/results

The pairs, the pictures, the judge and the scores of ``scripts.bench_superdiff`` (held out). Every rule sends three rows
a step through the network, so equal steps are equal network rows. "Worse score" is the judge's of the concept that it
sees less of, and decides; a difference is over pairs, with the seeds of a pair together, and both sides begin at the
same noise. A rule at N steps is called "level" with the reference where the whole 95 % interval of its difference lies
above minus a point of a hundred (``--margin``). Every (kernel, steps, block of seeds) is kept as it is finished: the
same command goes on, and more ``--blocks`` add seeds.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from diffaccel import record
from diffaccel.eval.uncertainty import intervals
from diffaccel.files import write_json
from diffaccel.training.loop import Deadline
from scripts import bench_superdiff
from scripts.earlier import earlier
from scripts.ends import ends, ends_text

STEPS = (25, 50, 100, 250, 1000)
# options of SuperDiff; Euler-Maruyama begins between pure noise and the second level of 1000 steps, 0.99933
KERNELS: dict[str, dict[str, Any]] = {
    "euler": {"kernel": "euler", "repair": False, "first_sigma": 0.9999},
    "matched": {},
}
REFERENCE = "euler"
SCORES = ("worse", "both", "one")


def cells(steps: list[int], blocks: int) -> list[tuple[str, int, int]]:
    """Return kernel, steps and block of all cells, in the order in which they are drawn."""
    return [(kernel, n, block) for block in range(blocks) for n in sorted(steps) for kernel in KERNELS]


def draw(bench: bench_superdiff.Bench, kernel: str, steps: int, block: int) -> dict[str, Any]:
    """Draw and judge a cell: every pair under the seeds of a block."""
    seeds = range(block * bench.args.seeds, (block + 1) * bench.args.seeds)
    bench.items = [(pair, seed) for pair in range(len(bench.pairs)) for seed in seeds]
    images, cost = bench.draw("and", KERNELS[kernel], steps)
    return {"kernel": kernel, "steps": steps, "block": block, "rows_a_picture": cost["forwards"] / len(images),
            "seconds": cost["seconds"], "pairs": bench.clusters(), **bench.scores(images)}  # fmt: skip


def table(done: list[dict[str, Any]], margin: float) -> list[dict[str, Any]]:
    """Return a row of each kernel and number of steps, over the blocks that all of them have."""
    by_way: dict[tuple[str, int], dict[int, dict[str, Any]]] = {}
    for cell in done:
        by_way.setdefault((cell["kernel"], cell["steps"]), {})[cell["block"]] = cell
    blocks = sorted(set.intersection(*(set(parts) for parts in by_way.values()))) if by_way else []
    if not blocks:
        return []
    joined = {
        way: {key: [v for block in blocks for v in parts[block][key]] for key in (*SCORES, "pairs")}
        for way, parts in by_way.items()
    }
    longest = max(steps for _, steps in by_way)
    rows = []
    for (kernel, steps), values in sorted(joined.items(), key=lambda item: (item[0][1], item[0][0])):
        first = by_way[kernel, steps][blocks[0]]
        entry: dict[str, Any] = {
            "kernel": kernel, "steps": steps, "pictures": len(values["worse"]),
            "rows_a_picture": first["rows_a_picture"],
            "seconds": sum(by_way[kernel, steps][block]["seconds"] for block in blocks),
        }  # fmt: skip
        for key in SCORES:
            entry[key] = ends(intervals.bootstrap_mean(values[key], clusters=values["pairs"]))
        for name, other in (("longest", (REFERENCE, longest)), ("equal", (REFERENCE, steps))):
            if other in joined and other != (kernel, steps):
                lead = intervals.paired_difference(values["worse"], joined[other]["worse"], clusters=values["pairs"])
                entry[name] = ends(lead.interval)
        if "longest" in entry:
            entry["verdict"] = verdict(entry["longest"], margin)
        rows.append(entry)
    return rows


def verdict(difference: list[float], margin: float) -> str:
    """Return what the interval of a difference to the reference says of a rule."""
    _, low, high = difference
    return "level or better" if low > -margin else "worse" if high < -margin else "open"


def head(rows: list[dict[str, Any]]) -> str:
    """Return the head of the table."""
    longest = max((row["steps"] for row in rows), default=0)
    return (
        "| kernel | steps | rows a picture | pictures | worse score | both found | one found "
        f"| minus {REFERENCE} at {longest} | minus {REFERENCE} at equal steps | against {longest} |\n"
        + "|---" * 10
        + "|"
    )


def shown(entry: dict[str, Any]) -> str:
    """Return a row of the table as text."""
    cells = [
        entry["kernel"], str(entry["steps"]), f"{entry['rows_a_picture']:.0f}", str(entry["pictures"]),
        ends_text(entry["worse"]), ends_text(entry["both"], 100) + " %", f"{100 * entry['one'][0]:.1f} %",
        ends_text(entry.get("longest"), 1, "+"), ends_text(entry.get("equal"), 1, "+"), entry.get("verdict", ""),
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the options: those of the bench that pictures depend on, and how far to go."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--minutes", type=float, default=8.0, help="of this call; a cell that has begun is finished")
    add("--points", type=int, nargs="*", default=list(STEPS), help="numbers of steps")
    add("--blocks", type=int, default=1, help="blocks of seeds")
    add("--seeds", type=int, default=5, help="of a block")
    add("--margin", type=float, default=1.0, help="points of the worse score that count as level")
    add("--pairs", type=int, default=None, help="only the first of the held-out pairs")
    add("--size", type=int, default=128)
    add("--batch", type=int, default=640, help="pictures in one pipeline call")
    add("--rows", type=int, default=2000, help="rows in one network call")
    add("--compile", action="store_true")
    add("--device", default="auto")
    add("--dtype", default="auto")
    add("--kind", default=None, help="name of the machine, for the record")
    add("--out", type=Path, default=Path("out/superdiff"), help="folder of finished cells")
    add("--record", type=Path, default=None, help="folder for the record (default: that of the cells)")
    return parser


PICTURES = ("pairs", "size", "seeds", "compile", "device", "dtype")  # options that pictures depend on


def main(arguments: list[str] | None = None) -> None:
    """Draw what is missing, judge, print."""
    args = make_parser().parse_args(arguments)
    args.split = "held-out"
    args.out.mkdir(parents=True, exist_ok=True)
    deadline = Deadline(60 * args.minutes)
    bench = bench_superdiff.Bench(args)
    settings = {key: getattr(args, key) for key in PICTURES} | {"kernels": KERNELS}
    file = args.out / "cells_curve.json"
    done: list[dict[str, Any]] = earlier(file, {"settings": settings}, ("settings",)).get("cells", [])
    wanted = cells(args.points, args.blocks)
    missing = [cell for cell in wanted if cell not in {(c["kernel"], c["steps"], c["block"]) for c in done}]
    for kernel, steps, block in missing:
        if deadline.over():
            break
        done.append(draw(bench, kernel, steps, block))
        write_json(file, {"settings": settings, "cells": done})
        print(f"{kernel}, {steps} steps, block {block}: {done[-1]['seconds']:.1f} s", flush=True)
    rows = table(done, args.margin)
    target = args.record or args.out
    target.mkdir(parents=True, exist_ok=True)
    write_json(target / f"bench_superdiff_curve_{args.kind or bench.device.type}.json", {
        "settings": settings, "margin": args.margin, "pairs": bench.pairs, "cells": len(done), "of": len(wanted),
        "device": record.describe_device(bench.device), "versions": record.versions(), "judge": bench_superdiff.JUDGE,
        "judge_weights_sha256": bench.judge.weights_sha256, "kind": args.kind, "date": time.strftime("%Y-%m-%d"),
        "rows": rows,
    })  # fmt: skip
    print(head(rows))
    print("\n".join(map(shown, rows)))
    print(f"{len(done)} of {len(wanted)} cells")


if __name__ == "__main__":
    main()
