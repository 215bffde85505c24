"""Time one picture by how long CPU threads spin while they wait, on an idle machine and beside a busy process.

    python -m scripts.bench_threads --out docs/results

The picture is the embedded model's at 128 px, 28 steps, with guidance. ``GOMP_SPINCOUNT`` is how many rounds a waiting
thread of GNU's OpenMP spins before it sleeps; "default" leaves it to OpenMP. Every row has a process of its own, since
the value is read when torch loads; the first call of a process is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from diffaccel import record

ROUNDS = ("0", "1000", "5000", "20000", "default")


def calls(count: int) -> list[float]:
    """Return the seconds of whole calls, text encoders and decoder included."""
    import torch

    import diffaccel

    pipe = diffaccel.load("emoji-flux")
    pipe.set_progress_bar_config(disable=True)
    times = []
    for _ in range(count + 1):
        start = time.perf_counter()
        pipe(
            "red apple, fluent 3d",
            negative_prompt="",
            true_cfg_scale=3.0,
            height=128,
            width=128,
            num_inference_steps=28,
            max_sequence_length=32,
            generator=torch.Generator().manual_seed(0),
        )
        times.append(time.perf_counter() - start)
    return times[1:]


def measure(rounds: str, busy: bool, count: int) -> dict:
    """Time a process with that many rounds of spinning, alone or beside a busy one."""
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    if rounds != "default":
        environment["GOMP_SPINCOUNT"] = rounds
    neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
    try:
        child = [sys.executable, "-m", "scripts.bench_threads", "--child", "--calls", str(count)]
        out = subprocess.run(child, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    finally:
        if neighbour:
            neighbour.kill()
            neighbour.wait()
    return {"rounds": rounds, "busy": busy, "seconds": [round(s, 3) for s in json.loads(out)]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=3, help="counted calls a row")
    parser.add_argument("--out", type=Path, help="folder for the JSON record")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(calls(options.calls)))
        return
    import torch

    command = ["python", "-m", "scripts.bench_threads", "--calls", str(options.calls)]
    report = record.Record(kind="bench_threads", settings={"calls": options.calls}, command=command)
    report.device = record.describe_device(torch.device("cpu"))
    rows = [measure(rounds, busy, options.calls) for busy in (False, True) for rounds in ROUNDS]
    report.finish(rows=rows)
    print(f"{report.device['name']}, {report.device['threads']} threads, {report.finished[:10]}: median s of a call")
    print("| rounds | idle machine | one busy process beside it |\n|---|---|---|")
    for rounds in ROUNDS:
        idle, busy = (median(row["seconds"]) for row in rows if row["rounds"] == rounds)
        print(f"| {rounds} | {idle:.2f} | {busy:.2f} |")
    if options.out:
        report.save(options.out / "bench_threads_cpu.json")


if __name__ == "__main__":
    main()
