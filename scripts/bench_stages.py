"""Time stages and step caches on large models with random weights, beside what FLOPs and single forwards predict.

    python -m scripts.bench_stages --model flux --kind nvidia-h200 --out docs/results

FLUX.1-dev at 1024x1024, Wan2.1-1.3B at 832x480 with 81 frames, and FLUX in 8 steps; weights are random, so that only
seconds have a meaning. The prediction of every row is written before anything is timed: the ratio of the FLOPs of the
real steps. It is compared with the measured ratio of the denoising loops; so is the ratio that single forwards, timed
at each size, give: what is missing there is the cost of the engine. A cache's real steps are those of a rule that looks
at no data, so that they are known beforehand. Eager first, then with ``FusedBlocks()`` where they are asked for, in
CUDA graphs, and with ``compile_repeated_blocks``.

``--pattern FILE`` measures plain steps and the pattern of a record of ``scripts.bench_pattern``, and raises where the
run made other real steps; the model's other rows come with it by ``--stages``. ``--peers`` adds caches of other
packages as they come, and SPEED's rule with its own tolerances and fresh noise: of caches that look at data random
weights decide the steps, which are counted afterwards, so that their seconds say what a skipped step costs and nothing
of how many may be skipped. The record is written after each turn, and a run of other ``--ways`` adds to it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch

import diffaccel
from diffaccel import record
from diffaccel.errors import DiffAccelError, first_line, size_text
from diffaccel.files import write_json
from diffaccel.modules import Capture, FusedBlocks
from diffaccel.runs.request import Request
from diffaccel.runs.variant import parse
from diffaccel.samplers import Bottleneck
from scripts import big_models, stage_patterns
from scripts.earlier import earlier

SPEED = "bottleneck:preset=speed,tolerance={},scales={}"
MIX = "bottleneck+spectrum:bottleneck.preset=speed,bottleneck.tolerance={},bottleneck.scales={},spectrum.warmup=2"
TWO, THREE = "[0.5,1.0]", "[0.5,0.75,1.0]"
CACHED = "euler+spectrum"
STAGED = ("euler", SPEED.format(0.05, TWO), SPEED.format(0.05, THREE), "bottleneck:preset=bottleneck", CACHED,
          MIX.format(0.05, TWO), MIX.format(0.05, THREE))  # fmt: skip
FEW = ("euler", SPEED.format(0.05, TWO), SPEED.format(0.2, TWO), "bottleneck:preset=selflift-zero,switches=[0.75]")
WAN = ("euler", SPEED.format(0.05, TWO), SPEED.format(0.01, THREE), CACHED, MIX.format(0.01, THREE))
PEERS = (
    "euler+cache_dit:cache_dit.first_blocks={},cache_dit.two_calls=false",  # one network call a step
    "euler+diffusers_cache", "euler+diffusers_cache:diffusers_cache.kind=taylorseer",
    "bottleneck:preset=speed,noise=fresh", "bottleneck:preset=speed,noise=fresh,tolerance=0.05",
)  # fmt: skip
OF_OTHERS = ("euler+cache_dit", "euler+diffusers_cache")
WAYS = {"eager": (), "fused": (FusedBlocks(),), "captured": (Capture(),), "compiled": ()}  # what is compiled stays so
ROWS = {"flux": STAGED, "flux-8-steps": FEW, "wan": WAN, "small": STAGED, "small-8-steps": FEW}


class Bench:
    """One pipeline, its call, and the rows."""

    def __init__(self, model: str, device: torch.device, rows: tuple[str, ...] | None = None) -> None:
        self.device = device
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.pipe, self.arguments = big_models.make(model, device, dtype)
        self.size = big_models.MODELS[model][0]
        request = Request(model=model, size=(self.size["height"], self.size["width"]), prompts=("x",))
        self.methods = {text: parse(text).of(request).methods for text in rows or ROWS[model]}
        self.plans = {text: self.plan(methods) for text, methods in self.methods.items()}
        self.last: tuple[Any, ...] = ()  # what every row of a way has in common

    def plan(self, methods: tuple[Any, ...]) -> dict[str, Any]:
        """Return the stages of a row, their sizes, steps and FLOPs."""
        staged = methods[0] if isinstance(methods[0], Bottleneck) else Bottleneck(preset="speed", scales=(1.0,))
        call = {key: value for key, value in self.arguments.items() if key != "output_type"}
        return Bottleneck.plan(self.pipe, config=staged, **call).to_dict()

    def run(self, methods: tuple[Any, ...]) -> tuple[float, float, dict[str, Any]]:
        """Return the seconds of one loop, those of the call without encoders and decoder, and the cost of the run."""
        diffaccel.accelerate(self.pipe, *methods, *self.last)
        try:
            if any(isinstance(method, Capture) for method in self.last):
                # graphs live as long as the methods are on: a call before fills them
                self.call()
            compiled = compilations()
            whole = self.call()
            if compilations() != compiled:  # others' hooks, as they come and go, have blocks compiled anew
                whole = self.call()
            run = diffaccel.summary(self.pipe).last_run or {}
            if any(config.name == "cache_dit" for config in methods):
                run["caches"] = counted_by_cache_dit(self.pipe, run["steps"])
        finally:
            diffaccel.remove(self.pipe)
        return run["seconds"], whole, run

    def call(self) -> float:
        """Return the seconds of one call."""
        self.wait()
        start = time.perf_counter()
        self.pipe(**self.arguments, generator=torch.Generator().manual_seed(0))
        self.wait()
        return time.perf_counter() - start

    def forward(self, size: tuple[int, int]) -> float:
        """Return the median seconds of one network call at a size, in a plain loop of twelve steps."""
        network, seconds = self.pipe.transformer, []
        if self.last:
            diffaccel.accelerate(self.pipe, *self.last)
        plain, own = network.forward, vars(network).get("forward")

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.wait()
            start = time.perf_counter()
            output = plain(*args, **kwargs)
            self.wait()
            seconds.append(time.perf_counter() - start)
            return output

        network.forward = timed
        try:
            self.pipe(**{**self.arguments, "height": size[0], "width": size[1], "num_inference_steps": 12})
        finally:
            del network.forward
            if own is not None:
                network.forward = own
            diffaccel.remove(self.pipe)
        return median(seconds[4:])

    def decoding(self) -> float:
        """Return the seconds of the decoder, which every row has alike."""
        output = self.pipe(**{**self.arguments, "num_inference_steps": 1})
        latents = output.frames if hasattr(output, "frames") else output.images
        for _ in range(2):
            self.wait()
            start = time.perf_counter()
            big_models.decode(self.pipe, latents, self.size)
            self.wait()
        return time.perf_counter() - start

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def measure(self, turns: int) -> Iterator[dict[str, Any]]:
        """Yield after each turn the medians so far: seconds of single forwards at each size, and those of every row."""
        sizes = sorted({tuple(stage["size"]) for plan in self.plans.values() for stage in plan["stages"]})
        start = time.perf_counter()
        for size in sizes:
            self.forward(size)  # compiles, warms up
        print(f"  set-up and forwards {time.perf_counter() - start:.1f} s", flush=True)
        taken: dict[str, list[tuple[float, float, dict[str, Any]]]] = {text: [] for text in self.methods}
        for text, methods in self.methods.items():
            try:
                if text != "euler":
                    self.run(methods)  # warms up its sizes
            except Exception as error:  # a method of another package may not fit this network or compiler
                if not text.startswith(OF_OTHERS):
                    raise
                print(f"  left out: {text}: {first_line(error)}", flush=True)
                del taken[text]
        decoder = self.decoding()
        print(f"  warm after {time.perf_counter() - start:.1f} s", flush=True)
        singles: dict[tuple[int, int], list[float]] = {size: [] for size in sizes}
        for _ in range(turns):  # single forwards take their turn: eager launches depend on what else the host does
            for size in sizes:
                singles[size].append(self.forward(size))
            for text in taken:
                taken[text].append(self.run(self.methods[text]))
            yield self.medians(singles, taken, decoder)

    def medians(self, singles: dict[Any, list[float]], taken: dict[str, list[Any]], decoder: float) -> dict[str, Any]:
        """Return the medians of the turns so far, and what they say of every row."""
        forwards = {size: median(values) for size, values in singles.items()}
        plain, plain_call = (median(run[part] for run in taken["euler"]) for part in (0, 1))
        rows = {}
        for text, runs in taken.items():
            loop, call = median(run[0] for run in runs), median(run[1] for run in runs)
            costs = {
                "loop": loop,
                "call": call,
                "caches": runs[-1][2]["caches"],
                "nfe": runs[-1][2]["nfe_by_resolution"],
                "whole_speed": (plain_call + decoder) / (call + decoder),
            }
            rows[text] = costs | compared(plain / loop, loop, costs["caches"], self.plans[text], forwards)
        sizes_text = {size_text(*size): seconds for size, seconds in forwards.items()}
        turns = len(taken["euler"])
        return {"turns": turns, "forwards": sizes_text, "decoder": decoder, "rows": rows}


def compilations() -> int:
    """Return how many graphs PyTorch has compiled so far."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def real_steps(stages: list[dict[str, Any]], caches: dict[str, Any]) -> list[int]:
    """Return how many steps of every stage were real; a stage counts its steps from 0, and its first is real.

    Of a cache of another package in a call without stages, by the number of calls that were real.
    """
    patterns = caches.get("real_steps")
    if patterns:
        return [len(part) for part in stage_patterns.by_stage(next(iter(patterns.values())))]
    if caches.get("real_calls") and len(stages) == 1:
        return [caches["real_calls"]]
    return [stage["steps"] for stage in stages]


def counted_by_cache_dit(pipe: Any, steps: int) -> dict[str, Any]:
    """Return the real and skipped steps of a run, as cache-dit leaves them on the network that it is on."""
    skipped = len(pipe.transformer._cached_steps)
    return {"methods": ["cache_dit"], "real_calls": steps - skipped, "skipped_calls": skipped}


def check_pattern(pattern: list[dict[str, Any]], stages: list[dict[str, Any]], caches: dict[str, Any]) -> None:
    """Raise where a run did not make the stages and real steps of a pattern."""
    steps = [stage["steps"] for stage in stages]
    patterns = caches.get("real_steps")
    real = stage_patterns.by_stage(next(iter(patterns.values()))) if patterns else [list(range(n)) for n in steps]
    if steps != [stage["steps"] for stage in pattern] or real != [stage["real"] for stage in pattern]:
        raise DiffAccelError(f"The run made the real steps {real} of {steps}, which are not those of the pattern.")


def compared(
    speed: float, loop: float, caches: dict[str, Any], plan: dict[str, Any], forwards: dict[tuple[int, int], float]
) -> dict[str, Any]:
    """Return the measured speed of a row beside its two predictions, and the time of a skipped step."""
    stages = plan["stages"]
    real = real_steps(stages, caches)
    tflop = sum(count * stage["tflop"] / stage["steps"] for count, stage in zip(real, stages, strict=True))
    seconds = sum(count * forwards[tuple(stage["size"])] for count, stage in zip(real, stages, strict=True))
    steps = sum(stage["steps"] for stage in stages)
    by_flops, by_forwards = plan["plain_tflop"] / tflop, plain_steps(plan) * max(forwards.values()) / seconds
    counts = zip(real, stages, strict=True)
    return {
        "real": [f"{size_text(*stage['size'])}: {count} of {stage['steps']}" for count, stage in counts],
        "speed": speed, "by_flops": by_flops, "by_forwards": by_forwards,
        "of_flops": speed / by_flops, "of_forwards": speed / by_forwards,
        **step_times(loop, seconds, steps, sum(real), caches),
    }  # fmt: skip


def step_times(loop: float, forwards: float, steps: int, real: int, caches: dict[str, Any]) -> dict[str, float | None]:
    """Return milliseconds of a real and of a skipped step, and of all that is neither: changes of size, the sampler.

    A cache that is told its steps has timed them, and the rest is what the loop takes beside them. Without such times a
    real step takes what single forwards do, and a skipped one what the loop takes beside these.
    """
    timed = caches.get("skipped_calls") and caches.get("real_calls") and "skipped_seconds" in caches
    if timed:
        own, skipped = caches["real_seconds"], caches["skipped_seconds"]
        return {"real_ms": 1000 * own / caches["real_calls"], "skipped_ms": 1000 * skipped / caches["skipped_calls"],
                "rest_ms": 1000 * (loop - own - skipped)}  # fmt: skip
    left = 1000 * (loop - forwards)
    if steps == real:
        return {"real_ms": 1000 * forwards / real, "skipped_ms": None, "rest_ms": left}
    return {"real_ms": 1000 * forwards / real, "skipped_ms": left / (steps - real), "rest_ms": None}


def plain_steps(plan: dict[str, Any]) -> float:
    """Return the number of steps at full size whose FLOPs the plan names as those of the plain call."""
    full = max(plan["stages"], key=lambda stage: stage["size"][0] * stage["size"][1])
    return plan["plain_tflop"] / (full["tflop"] / full["steps"])


def rows_of(model: str, pattern: str | None, peers: bool, stages: bool = False) -> tuple[str, ...]:
    """Return the variants to measure on a model, plain steps first."""
    rows = ROWS[model] if stages or not (pattern or peers) else ("euler",)
    rows += (pattern,) if pattern else ()
    if not peers:
        return rows
    others = [text.format(1 if model.startswith("small") else 8) for text in PEERS]  # 8 is cache-dit's own default
    if importlib.util.find_spec("cache_dit") is None:
        print("cache-dit is not installed, so that it has no row: pip install cache-dit", flush=True)
        others = others[1:]
    if model == "wan":  # diffusers' taylorseer hooks nothing there by default
        others = [text for text in others if "taylorseer" not in text]
    return (*rows, *others)


def shown(values: dict[str, Any]) -> str:
    """Return the table of a record."""
    head = ["", "row", "real steps", "predicted by FLOPs", "by forwards", "measured", "of FLOPs", "of forwards",
            "loop, s", "call with decoder, s", "measured", "a real step, ms", "a skipped step, ms",
            "the rest, ms"]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for way, measured in values["ways"].items():
        for text, row in measured["rows"].items():
            skipped = "" if row["skipped_ms"] is None else f"{row['skipped_ms']:.1f}"
            cells = [way, text, ", ".join(row["real"]), f"{row['by_flops']:.2f}", f"{row['by_forwards']:.2f}",
                     f"{row['speed']:.2f}", f"{row['of_flops']:.3f}", f"{row['of_forwards']:.3f}", f"{row['loop']:.2f}",
                     f"{row['call'] + measured['decoder']:.2f}", f"{row['whole_speed']:.2f}", f"{row['real_ms']:.1f}",
                     skipped, "" if row["rest_ms"] is None else f"{row['rest_ms']:.0f}"]  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Predict, measure way by way, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--model", choices=sorted(ROWS), default="flux")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--turns", type=int, default=2)
    add("--ways", nargs="+", default=["eager", "captured", "compiled"], choices=list(WAYS))
    add("--pattern", type=Path, metavar="FILE", help="plain steps and the pattern of this record alone")
    add("--stages", action="store_true", help="with --pattern or --peers: the model's other rows too")
    add("--peers", action="store_true", help="and caches of other packages; cache-dit where it is installed")
    add("--kind", default=None, help="name of the machine, for the record")
    add("--out", type=Path, default=Path("docs/results"))
    args = parser.parse_args()
    device = torch.device(args.device)
    told = stage_patterns.read(args.pattern, args.model, big_models.MODELS[args.model][1]) if args.pattern else None
    rows = rows_of(args.model, told and told.name, args.peers, args.stages)
    bench = Bench(args.model, device, rows)
    values: dict[str, Any] = {
        "model": args.model, "kind": args.kind, "device": record.describe_device(device), "versions": record.versions(),
        "date": time.strftime("%Y-%m-%d"), "turns": args.turns, "plans": bench.plans, "ways": {},
    }  # fmt: skip
    suffix = ("_pattern" if args.pattern else "") + ("_peers" if args.peers else "")
    file = args.out / f"bench_stages_{args.model}{suffix}_{args.kind or 'cpu'}.json"
    args.out.mkdir(parents=True, exist_ok=True)
    same = ("model", "kind", "device", "versions", "plans")  # a run of other ways adds its own
    values["ways"] = earlier(file, values, same).get("ways", {})
    write_json(file, values)
    print(json.dumps({text: round(plan["speedup"], 3) for text, plan in bench.plans.items()}), flush=True)
    for way in (way for way in WAYS if way in args.ways and (way != "captured" or device.type == "cuda")):
        bench.last = WAYS[way]
        if way == "compiled":
            torch._dynamo.config.cache_size_limit = 64
            bench.pipe.transformer.compile_repeated_blocks(dynamic=False)
        for measured in bench.measure(args.turns):
            values["ways"][way] = measured
            write_json(file, values)
        if told:
            run = values["ways"][way]["rows"][told.name]
            check_pattern(stage_patterns.described(told), bench.plans[told.name]["stages"], run["caches"])
        print(shown({"ways": {way: values["ways"][way]}}), flush=True)


if __name__ == "__main__":
    main()
