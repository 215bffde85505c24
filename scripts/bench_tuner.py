"""Measure by simulation how often the tuner's promise holds, and how fast its plans are.

    python -m scripts.bench_tuner --out docs/results

Each tuning runs on a population of its own, whose mean losses are known (``scripts/tuner_bed.py``), so that a promise
can be checked against the truth. Rows: the tuner; the tuner with caches alone; the fastest method as it comes that is
within the rule, by the truth; and simulated annealing on one prompt, as sets of real steps are searched for in
arXiv 2606.13496, over the same plans and with as many pictures drawn. ``speed`` is the speed-up over the baseline, and
``of best`` its share of that of the fastest plan within the rule, geometric means; a broken promise counts as no
speed-up. By how much the tuner is faster has Student's 95 % interval over tunings, of logarithms.
"""

from __future__ import annotations

import argparse
import itertools
import math
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from diffaccel import record
from diffaccel.eval.tuning.bed import Part
from diffaccel.eval.tuning.halving import Sizes
from diffaccel.eval.tuning.space import OFF, Params, TuningSpace
from diffaccel.eval.uncertainty.intervals import wilson
from diffaccel.runs.variant import Variant
from scripts.tuner_bed import METHODS, STEPS, ToyBed, search_on, tuning_on
from scripts.tuner_table import interval

LIMIT = 0.1  # of the mean loss: the rule is ssim<0.9
TUNINGS, LEAST = 40, 37
SIZES = Sizes((4, 8, 16), bracket=8, held_out=32, search=120.0, turns=6)
HOT, COLD = 0.05, 1e-5  # temperatures of the annealing
RUNNING = {name: cls for name, cls in METHODS.items() if name != "bent"}
CACHES = {name: cls for name, cls in RUNNING.items() if cls.touches == "blocks"}


def tuned_plan(bed: ToyBed, methods: dict[str, Any]) -> tuple[Variant, int]:
    """Return the plan that a tuning certifies, the baseline where it certifies none, and the pictures it drew."""
    with tempfile.TemporaryDirectory() as folder:
        search = search_on(bed, Path(folder), SIZES, methods=methods)
        chosen, certificates = tuning_on(search)
    passed = [name for name, certificate in certificates.items() if certificate["keeps"]]
    pictures = sum(entry.count for entry in search.measured()) + SIZES.held_out * len(certificates)
    return (chosen[passed[-1]].variant if passed else bed.baseline()), pictures


def annealed_plan(bed: ToyBed, pictures: int) -> Variant:
    """Return the fastest plan that annealing meets whose one prompt is within the rule."""
    rng, space = random.Random(f"annealing {bed.seed}"), TuningSpace.of(RUNNING, STEPS)
    part = Part("tuning", 0, 1)

    def energy(params: Params) -> float:
        result = bed.evaluate(space.variant(params), part)
        return 1 / result["ratio"] + 10 * max(0.0, 1 - LIMIT - result["values"]["ssim"][0])

    state = space.plain()
    now = energy(state)
    best, best_energy = state, now
    for i in range(pictures - 1):
        temperature = HOT * (COLD / HOT) ** (i / pictures)
        proposal = rng.choice([*space.neighbours(state), *space.exchanges(state)])
        value = energy(proposal)
        if value < now or rng.random() < math.exp((now - value) / temperature):
            state, now = proposal, value
            if value < best_energy:
                best, best_energy = proposal, value
    return space.variant(best)


def plans() -> Iterator[Variant]:
    """Yield every plan of the space."""
    space = TuningSpace.of(RUNNING, STEPS)
    slots = [(OFF, *names) for names in space.slots]
    for chosen in itertools.product(*slots):
        keys = [key for key in space.fields if key.partition(".")[0] in chosen]
        point = {**space.plain(), **{f"slot {i}": name for i, name in enumerate(chosen)}}
        for values in itertools.product(*(range(len(space.fields[key])) for key in keys)):
            for steps in range(len(space.steps)):
                yield space.variant({**point, **dict(zip(keys, values, strict=True)), "steps": steps})


def simulate(tunings: int) -> list[dict[str, Any]]:
    """Return a row for every way to find a plan."""
    everything = list(plans())
    cached = [plan for plan in everything if all(config.name in CACHES for config in plan.methods)]
    found: dict[str, list[tuple[ToyBed, Variant]]] = {
        name: [] for name in ("tuner", "caches alone", "methods as they come", "annealing")
    }
    best, best_cached = [], []
    for seed in range(tunings):
        bed = ToyBed(seed)
        best.append(fastest(bed, everything))
        best_cached.append(fastest(bed, cached))
        plan, pictures = tuned_plan(bed, METHODS)
        found["tuner"].append((bed, plan))
        found["caches alone"].append((bed, tuned_plan(bed, CACHES)[0]))
        defaults = [Variant((cls(),), {"steps": STEPS}) for cls in RUNNING.values()]
        kept = [default for default in defaults if bed.loss(default) <= LIMIT]
        found["methods as they come"].append((bed, min([bed.baseline(), *kept], key=bed.seconds)))
        found["annealing"].append((bed, annealed_plan(bed, pictures)))
    rows = [summarise(name, results, best) for name, results in found.items()]
    for row, results in zip(rows[1:], list(found.values())[1:], strict=True):
        row["tuner faster"] = faster(found["tuner"], results)
    rows[0]["fastest"], rows[1]["fastest"] = _geometric(best), _geometric(best_cached)
    return rows


def fastest(bed: ToyBed, among: Sequence[Variant]) -> float:
    """Return the speed of the fastest plan that keeps the rule, by the truth."""
    return speed(bed, min((plan for plan in among if bed.loss(plan) <= LIMIT), key=bed.seconds))


def faster(tuner: list[tuple[ToyBed, Variant]], other: list[tuple[ToyBed, Variant]]) -> list[float] | None:
    """Return how many times as fast as another way's plans the tuner's are, with the interval; None for one tuning."""
    pairs = zip(kept_speeds(tuner), kept_speeds(other), strict=True)
    ends = interval([math.log(own / rival) for own, rival in pairs])
    return None if ends is None else [math.exp(end) for end in ends]


def kept_speeds(results: list[tuple[ToyBed, Variant]]) -> list[float]:
    """Return the speeds of plans, 1 where the promise is broken."""
    return [speed(bed, plan) if bed.loss(plan) <= LIMIT else 1.0 for bed, plan in results]


def summarise(name: str, results: list[tuple[ToyBed, Variant]], best: list[float]) -> dict[str, Any]:
    """Count the promises that hold, and average the speeds."""
    holds = [bed.loss(plan) <= LIMIT for bed, plan in results]
    speeds = kept_speeds(results)
    share = wilson(sum(holds), len(holds))
    shares = [own / most for own, most in zip(speeds, best, strict=True)]
    return {
        "way": name, "tunings": len(results), "holds": sum(holds), "low": share.low, "high": share.high,
        "speed": _geometric(speeds), "of best": _geometric(shares),
        "baseline": sum(plan.name == bed.baseline().name for bed, plan in results),
    }  # fmt: skip


def speed(bed: ToyBed, plan: Variant) -> float:
    """Return a plan's true speed-up."""
    return bed.seconds(bed.baseline()) / bed.seconds(plan)


def _geometric(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def main(argv: list[str] | None = None) -> int:
    """Print the table; return 1 when fewer promises of the tuner hold than 37 of 40 do."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tunings", type=int, default=TUNINGS)
    parser.add_argument("--out", type=Path, help="folder for the JSON record")
    options = parser.parse_args(argv)
    rows = simulate(options.tunings)
    print(
        "| way | promise holds | 95 % | speed | of best | found nothing | tuner faster |\n|---|---|---|---|---|---|---|"
    )
    for row in rows:
        ends = "" if row.get("tuner faster") is None else "{:.2f}x ({:.2f} to {:.2f})".format(*row["tuner faster"])
        print(
            f"| {row['way']} | {row['holds']} of {row['tunings']} | {row['low']:.0%} to {row['high']:.0%} | "
            f"{row['speed']:.2f}x | {row['of best']:.0%} | {row['baseline']} | {ends} |"
        )
    print(
        "fastest plan that keeps the rule: {:.2f}x, of caches alone {:.2f}x".format(*(r["fastest"] for r in rows[:2]))
    )
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        command = ["python", "-m", "scripts.bench_tuner", *(sys.argv[1:] if argv is None else argv)]
        report = record.Record(kind="bench_tuner", settings={"sizes": asdict(SIZES), "limit": LIMIT}, command=command)
        report.device = record.describe_device(torch.device("cpu"))
        report.finish(rows=rows).save(options.out / "bench_tuner_cpu.json")
    return int(rows[0]["holds"] < math.floor(options.tunings * LEAST / TUNINGS))


if __name__ == "__main__":
    sys.exit(main())
