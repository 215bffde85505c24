"""Time next-frame diffusion with random weights: frames a second, drafts, latencies, decoders, long rollouts.

    python -m scripts.bench_nfd --rows speed --autotune --kind nvidia-h200 --out docs/results
    python -m scripts.bench_nfd --rows drafts,latency,fan,decoder,long,peer --kind nvidia-h200 --out docs/results

Batch 1, bf16 on a GPU. Every row has the keys and values of its frame written ("KV pass"); "compiled" are the layers
around their attention. FPS is of frames that follow each other, with one wait for the device at the end. Weights are
random: rows say what computing costs, and nothing of pictures.

Sections: ``speed`` (ways for K = 4, 2, 1), ``drafts`` (cost c(N) of a round; FPS and thrown-away frames for streams
that repeat with probability p), ``latency`` (from an action that arrives at a random time to its frame), ``fan`` (the
next frame under several actions), ``decoder``, ``long`` (10,000 frames), ``peer`` (774M, 1,560 tokens), ``demo``
(64x64). ``drafts-8`` looks back at 8 frames; ``fan-demo`` and ``drafts-demo`` are of the 64x64 model.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from diffaccel.files import write_json
from diffaccel.record import describe_device
from diffaccel.samplers.nfd.streams import held_actions
from scripts import nfd_beds as beds

Row = dict[str, Any]
COUNTS, REPEATS, STEPS = (1, 2, 4, 8), (0.5, 0.8, 0.9, 0.95), (4, 2, 1)


class Rows(list[Row]):
    """Rows of a section, each one printed and kept as soon as it is measured: a machine may be gone at any moment."""

    def __init__(self, keep: Callable[[list[Row]], None]) -> None:
        super().__init__()
        self.keep = keep

    def append(self, row: Row) -> None:
        super().append(row)
        print(json.dumps(row), flush=True)
        self.keep(self)


def fps(sampler: Any, frames: int, stream: list[int] | None = None) -> float:
    """Return the frames a second of a rollout, after one that records its graphs."""
    beds.full(sampler)
    actions = stream or [1] * frames
    sampler.rollout(actions[: max(20, frames // 4)])
    sampler.reset()
    beds.full(sampler)
    start = time.perf_counter()
    rollout = sampler.rollout(actions)
    return rollout.frames.shape[1] / (time.perf_counter() - start)


def speed(bed: beds.Bed, frames: int, rows: list[Row]) -> None:
    """Add the rows of K = 4, 2, 1 in every way, those that need a compiler last."""
    ways = ("eager", "captured", "captured, w8a8", "captured, compiled", "captured, compiled, w8a8")
    for way in ways if bed.is_cuda else ways[:1]:
        with bed.prepared(way) as model:
            for steps in STEPS:
                sampler = beds.sampler(model, bed, steps, capture=None if "captured" in way else False)
                rows.append({"way": way, "steps": steps, "fps": fps(sampler, frames), "draft": 1})
    for steps in STEPS:
        for way, milliseconds in beds.recomputed(bed, steps).items():
            rows.append({"way": way, "steps": steps, "fps": 1000 / milliseconds, "draft": 1})
    for steps in STEPS if bed.is_cuda else ():
        rows.append({"way": "compiled block stack in one graph, KV pass merged, adaLN rows given", "draft": 1,
                     "steps": steps, "fps": 1000 / beds.block_stack(bed, steps)})  # fmt: skip


def drafts(bed: beds.Bed, frames: int, rows: list[Row]) -> None:
    """Add the cost of a round by its frames, and what streams of held actions make of it."""
    with bed.prepared("captured, compiled" if bed.is_cuda else "eager") as model:
        for steps in (4, 1):
            seconds = {}
            for count in range(1, min(8, bed.window - 1) + 1):
                sampler = beds.sampler(model, bed, steps, draft=count)
                seconds[count] = count / fps(sampler, frames)
                rows.append({"table": "c(N)", "steps": steps, "draft": count, "cost": seconds[count] / seconds[1],
                             "ms": 1000 * seconds[count]})  # fmt: skip
            for repeats in REPEATS:
                stream = held_actions(4 * frames, bed.actions, 1 / (1 - repeats), seed=1)
                for count in COUNTS:
                    sampler = beds.sampler(model, bed, steps, draft=count)
                    rate = fps(sampler, len(stream), stream)
                    rows.append({"table": "stream", "steps": steps, "draft": count, "repeats": repeats, "fps": rate,
                                 "discarded": sampler.stats.discard_rate})  # fmt: skip


def latency(bed: beds.Bed, frames: int, rows: list[Row]) -> None:
    """Add the milliseconds from an action, at a random time in a round, to its frame: p50 and p99."""
    with bed.prepared("captured, compiled" if bed.is_cuda else "eager") as model:
        for steps in (4, 2, 1):
            for count in COUNTS:
                for limit in (None, 10.0):
                    sampler = beds.sampler(model, bed, steps, draft=count, latency=limit)
                    waits = beds.action_to_frame(sampler, frames)
                    rows.append({"steps": steps, "draft": count, "stops_between_steps": limit is not None, **waits})


def fan(bed: beds.Bed, frames: int, rows: list[Row]) -> None:
    """Add the cost of the next frame under several actions, relative to one."""
    with bed.prepared("captured, compiled" if bed.is_cuda else "eager") as model:
        for count in (1, 2, 4, bed.actions):
            sampler = beds.sampler(model, bed, 4, fan_out=count)
            beds.full(sampler)
            milliseconds = beds.timed(lambda s=sampler, n=count: s.prepare(range(n)), frames)  # type: ignore[misc]
            rows.append(
                {"actions": count, "ms": milliseconds, "cost": milliseconds / (rows[0]["ms"] if rows else milliseconds)}
            )


def decoder(bed: beds.Bed, frames: int, rows: list[Row]) -> None:
    """Add rows with a decoder: alone, in line, and on a stream of its own beside the next frame."""
    with bed.prepared("captured, compiled" if bed.is_cuda else "eager") as model:
        for steps in (4, 2, 1):
            sampler = beds.sampler(model, bed, steps)
            plain = fps(sampler, frames)
            rows.append({"steps": steps, "way": "latents only", "fps": plain})
            for way, rate in beds.with_decoder(sampler, bed, frames).items():
                rows.append(
                    {"steps": steps, "way": way, **rate, "slower": 1 - rate["fps"] / plain if "fps" in rate else None}
                )


def long(bed: beds.Bed, frames: int, rows: list[Row]) -> None:
    """Add FPS, memory and graphs of each tenth of a long rollout of N = 1."""
    with bed.prepared("captured, compiled" if bed.is_cuda else "eager") as model:
        sampler = beds.sampler(model, bed, 4)
        beds.full(sampler)
        for tenth in range(10):
            start = time.perf_counter()
            for _ in sampler.frames([1] * max(frames // 10, 1)):
                pass
            beds.wait(bed.device)
            rows.append({
                "tenth": tenth, "fps": max(frames // 10, 1) / (time.perf_counter() - start),
                "bytes": torch.cuda.memory_allocated() if bed.is_cuda else 0, "captures": sampler.engine.captures,
                "largest_key": float(sampler.engine.cache.keys.abs().max()),
            })  # fmt: skip


SECTIONS: dict[str, tuple[str, Callable[[beds.Bed, int, list[Row]], None], int]] = {
    "speed": ("310M", speed, 200),
    "drafts": ("310M", drafts, 100),
    "drafts-8": ("310M-8", drafts, 100),
    "latency": ("310M", latency, 300),
    "fan": ("310M", fan, 100),
    "fan-demo": ("demo", fan, 100),
    "decoder": ("310M", decoder, 200),
    "long": ("310M", long, 10_000),
    "peer": ("774M", speed, 60),
    "demo": ("demo", speed, 400),
    "drafts-demo": ("demo", drafts, 200),
}


def table(section: str, bed: beds.Bed, device: str, rows: list[Row]) -> str:
    """Return rows as a Markdown table under a line that says what they are of."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    lines = [
        f"{section}: {bed.describe()}, window {bed.window}, batch 1, one {device}", "",
        f"| {' | '.join(keys)} |", f"|{'---|' * len(keys)}",
    ]  # fmt: skip
    show = lambda value: f"{value:.3f}" if isinstance(value, float) else "" if value is None else str(value)  # noqa: E731
    return "\n".join([*lines, *(f"| {' | '.join(show(row.get(key)) for key in keys)} |" for row in rows)]) + "\n"


def _write(file: Path | None, facts: dict[str, Any], rows: list[Row]) -> None:
    if file:
        write_json(file, {**facts, "rows": rows})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="speed", help=f"sections with commas between: {', '.join(SECTIONS)}")
    parser.add_argument("--bed", choices=sorted(beds.BEDS), help="another model than the section's own")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--autotune", action="store_true", help="compile with max-autotune: minutes of set-up")
    parser.add_argument("--frames", type=int, help="instead of the section's own number")
    parser.add_argument("--kind", default=None, help="name of the machine, for the record")
    parser.add_argument("--out", type=Path, default=None, help="folder for the JSON records")
    args = parser.parse_args()
    device = describe_device(torch.device(args.device))["name"]
    modes = ("default", "max-autotune-no-cudagraphs")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    for section in args.rows.split(","):
        name, measure, frames = SECTIONS[section]
        bed = beds.make(args.bed or name, torch.device(args.device), modes[args.autotune])
        facts = {
            "command": f"python -m scripts.bench_nfd {' '.join(sys.argv[1:])}", "device": device, "kind": args.kind,
            "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "section": section, "model": bed.facts(),
        }  # fmt: skip
        file = None if args.out is None else args.out / f"bench_nfd_{section}_{args.kind or args.device}.json"
        rows = Rows(functools.partial(_write, file, facts))
        measure(bed, args.frames or frames, rows)
        print(table(section, bed, device, rows), flush=True)
        del bed
        if args.device == "cuda":
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
