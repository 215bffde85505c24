"""Time an embedded world model as ``diffaccel play`` runs it: an action in, a frame drawn, its pixels out as a PNG.

    python -m scripts.bench_play --device cpu --threads 2 --out docs/results

Numbers of steps take turns of some frames each, under actions that are held for a while, after the window is full. A
row has the median frames a second over turns with the 95 % interval of order statistics, the share of the
threads' time that the process got (1 is a machine of its own; less means that other work slowed it), and the load
average when the measurement began and ended.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

import torch

from diffaccel.cli import play
from diffaccel.cli.play_session import PlaySession
from diffaccel.cli.world import open_sampler
from diffaccel.eval.uncertainty.intervals import median_ratio
from diffaccel.files import write_json
from diffaccel.record import describe_device
from diffaccel.samplers.nfd.streams import held_actions

HELD = 8.0  # frames that an action stays, on average


def open_session(model: str, steps: int, device: str, threads: int) -> PlaySession:
    """Return a game with a full window, as ``diffaccel play MODEL --steps K`` has it."""
    words = [model, "--steps", str(steps), "--device", device, "--threads", str(threads)]
    session = PlaySession(*open_sampler(play.make_parser().parse(words)))
    session.sampler.warm_up(poll=True)
    for _ in range(session.sampler.window + 2):
        session.next_picture()
    return session


def one_turn(session: PlaySession, actions: Sequence[int]) -> tuple[float, float]:
    """Play through actions; return the seconds on the clock, and those that the process had a core."""
    start, start_of_process = time.perf_counter(), time.process_time()
    for action in actions:
        session.want(action)
        session.next_picture()
    return time.perf_counter() - start, time.process_time() - start_of_process


def measure(sessions: dict[int, PlaySession], turns: int, frames: int, threads: int) -> list[dict[str, Any]]:
    """Let numbers of steps take turns, and return a row for each."""
    stream = cycle(held_actions(1000, next(iter(sessions.values())).actions, HELD, seed=1))
    readings: dict[int, list[tuple[float, float]]] = {steps: [] for steps in sessions}
    for _ in range(turns):
        actions = list(islice(stream, frames))
        for steps, session in sessions.items():
            readings[steps].append(one_turn(session, actions))
    rows = []
    for steps, pairs in readings.items():
        seconds = [clock for clock, _ in pairs]
        ratio = median_ratio([float(frames)] * turns, seconds).to_dict()
        rows.append({
            "steps": steps, "fps": ratio["value"], "low": ratio["low"], "high": ratio["high"], "turns": turns,
            "frames a turn": frames, "share": median(own / clock / threads for clock, own in pairs),
        })  # fmt: skip
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="coinrun-nfd", help="a zoo name or a folder (default coinrun-nfd)")
    parser.add_argument("--steps", default="4,2,1", metavar="K,K", help="numbers of steps (default 4,2,1)")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--frames", type=int, default=24, help="of a turn (default 24)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kind", default="cpu", help="name of the machine, for the record")
    parser.add_argument("--out", type=Path, default=None, help="folder for the JSON record")
    args = parser.parse_args()
    before = os.getloadavg()[0]
    sessions = {int(k): open_session(args.model, int(k), args.device, args.threads) for k in args.steps.split(",")}
    rows = measure(sessions, args.turns, args.frames, args.threads)
    facts = {
        "command": f"python -m scripts.bench_play {' '.join(sys.argv[1:])}", "model": args.model,
        "device": describe_device(torch.device(args.device))["name"], "kind": args.kind, "threads": args.threads,
        "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__,
        "load": {"before": before, "after": os.getloadavg()[0]},
    }  # fmt: skip
    print(
        f"{args.model} on {facts['device']}, {args.threads} threads, load {before:.1f} to {facts['load']['after']:.1f}"
    )
    for row in rows:
        ends = "" if row["low"] is None else f" ({row['low']:.2f} to {row['high']:.2f})"
        print(f"  {row['steps']} steps: {row['fps']:.2f} frames a second{ends}, {row['share']:.2f} of its threads")
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        write_json(args.out / f"bench_play_{args.model}_{args.kind}.json", {**facts, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
