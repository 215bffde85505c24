"""Measure tunings on ``emoji-flux``: beside an annealed set of real steps and a search of caches alone; their promise.

    python -m scripts.bench_tuner_emoji --aim near --tunings 0 10 --stop-after 540 --parts out/tuner
    python -m scripts.bench_tuner_emoji --aim keep --tunings 0 40 --stop-after 540 --parts out/tuner
    python -m scripts.bench_tuner_emoji --join --kind nvidia-h200 --parts out/tuner --out docs/results

``near``: a set of ``--real`` real steps is searched by annealing and climbing on one prompt, as arXiv 2606.13496 does
(``scripts.pattern_annealing``); its speed, in turns with the plain pipeline, is the limit at which the tuner, and the
tuner with caches alone, look for the plan nearest to the plain pipeline. All draw as many pictures: ``--evaluations``.
``keep``: the tuner promises ``--fail-if``. Either way plans are drawn on ``--truth`` prompts that no search saw, and
timed in turns with each other.
Each tuning has prompts, pictures and a search of its own. Every way of every tuning is kept in a file a tuning as soon
as it is measured, so that a command goes on where it was stopped; ``--join`` makes the record and the table of them.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import diffaccel
from diffaccel import record
from diffaccel.eval.comparison.gate import parse as parse_gate
from diffaccel.eval.sets import prompts
from diffaccel.eval.sets.candidates import weights_digest
from diffaccel.eval.tuning import measuring, result
from diffaccel.eval.tuning.bed import Part
from diffaccel.eval.tuning.certificate import certify
from diffaccel.eval.tuning.choice import choose
from diffaccel.eval.tuning.halving import Sizes, TuningSearch
from diffaccel.eval.tuning.journal import Journal
from diffaccel.eval.tuning.pipeline_bed import PipelineBed
from diffaccel.eval.tuning.rule import Promise
from diffaccel.eval.tuning.sizes import split
from diffaccel.eval.tuning.space import TuningSpace, registered
from diffaccel.files import write_json
from diffaccel.runs import loading
from diffaccel.runs.call_arguments import call_arguments
from diffaccel.runs.request import Request
from diffaccel.runs.variant import Variant, parse
from scripts import tuner_table
from scripts.pattern_annealing import PatternSearch, Steps

TUNER, CACHES, ANNEALED = "tuner", "caches alone", "annealed real steps"
WAYS = {"near": (ANNEALED, TUNER, CACHES), "keep": (TUNER, CACHES)}
METRICS = ("ssim", "latent_error", "clip_score[emoji-clip-judge]")  # on prompts that no search saw
POOL = 600  # prompts that tunings draw from; the truth is of later ones
OVERSHOOT = 3  # brackets, certificates and tries beyond the search, in brackets' pictures


class CountedBed(PipelineBed):
    """A bed whose budget is of pictures drawn of plans, not of seconds: timings are free, as for every way."""

    def evaluate(self, plan: Variant, part: Part) -> dict[str, Any]:
        return {**super().evaluate(plan, part), "spent": part.stop - part.start}

    def take_turns(self, plans: list[Variant], turns: int, part: Part) -> dict[str, Any]:
        return {**super().take_turns(plans, turns, part), "spent": 0}


class Bench:
    """The open pipeline, and what all tunings share."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, loading.pick_device(args.device)
        request = Request(model=args.model, size=(args.size, args.size), prompts=("x",), batch=args.batch)
        self.request = replace(request, steps=args.steps).with_model_defaults()
        dtype = loading.pick_dtype(args.dtype, self.device)
        self.pipe = loading.open_pipeline(self.request, loading.locate(args.model)[0], self.device, dtype)
        self.pipe.set_progress_bar_config(disable=True)
        self.digest = weights_digest(self.pipe)
        self.texts = list(prompts.read(args.prompts).texts)
        spare = args.evaluations - args.held_out * 3 - args.rungs[-1] * 8 - sum(args.rungs) * OVERSHOOT
        if spare <= 0:
            sys.exit(
                f"--evaluations {args.evaluations} leaves nothing to search with; raise it by {1 - spare} or more."
            )
        self.sizes = Sizes(tuple(args.rungs), args.bracket, args.held_out, float(spare), turns=6)
        self.truth = self.bed(args.parts / "truth", METRICS, keeps_latents=True)
        self.truth.subjects = {"held-out": self.texts[POOL : POOL + args.truth]}

    def bed(self, folder: Path, metrics: tuple[str, ...], keeps_latents: bool = False) -> CountedBed:
        """Return a bed on the pipeline, without prompts."""
        measures = measuring.measures_of(metrics, lpips=None, device=self.device)
        request = replace(self.request, latents=keeps_latents)
        first = self.sizes.rungs[0]
        return CountedBed(self.pipe, self.digest, request, {}, folder, metrics, measures, first)

    def search(self, seed: int, way: str, least_speed: float | None) -> TuningSearch:
        """Return the search of a tuning: at least so fast, or one that keeps the rule."""
        folder = self.args.parts / "work" / f"{self.args.aim}-{seed}-{way.replace(' ', '-')}"
        folder.mkdir(parents=True, exist_ok=True)
        rule = self.args.fail_if if least_speed is None else f"speedup<{least_speed:g}"
        nearness = rule if least_speed is None else "ssim<0"
        metrics = dict.fromkeys((*parse_gate(rule).metrics, *parse_gate(nearness).metrics))
        bed = self.bed(folder / "pictures", tuple(metrics))
        bed.subjects = split(self.texts[:POOL], self.sizes, seed)
        own = bed.baseline_values()
        methods = registered(self.args.methods)
        if way == CACHES:
            methods = {name: cls for name, cls in methods.items() if cls.touches == "blocks"}
        space = TuningSpace.of(methods, self.args.steps)
        journal = Journal(folder, {"seed": seed, "rule": rule, "sizes": str(self.sizes), "choice": sorted(methods)})
        promise, quality = Promise(parse_gate(rule), own), Promise(parse_gate(nearness), own)
        return TuningSearch(space, bed, promise, quality, journal, self.sizes, seed)

    def tuned(self, seed: int, way: str, least_speed: float | None) -> dict[str, Any]:
        """Run a tuning; return its plan, whether it is certified, the pictures it drew, and what lies beside it."""
        search = self.search(seed, way, least_speed)
        search.run()
        chosen = choose(search, best_within_time=least_speed is not None)
        certificates = certify(search, chosen)
        evaluations = int(search.journal.spent())
        passed = [name for name, certificate in certificates.items() if certificate["keeps"]]
        plan = chosen[passed[-1]].variant if passed else search.bed.baseline()
        told = result.neighbour_rows(search, chosen[passed[-1]]) if passed and least_speed is None else []
        return {
            "plan": plan.name, "certified": bool(passed), "evaluations": evaluations, "plans": len(search.entries),
            "certificate": certificates[passed[-1]] if passed else None,
            "neighbours": told, "cliffs": result.cliff_sentences(told) if told else [],
        }  # fmt: skip

    def annealed(self, seed: int) -> dict[str, Any]:
        """Search a set of real steps on one prompt; return its plan."""
        text = split(self.texts[:POOL], self.sizes, seed)["tuning"][0]
        plain = self._latents(Variant((), {"steps": self.args.steps}), text, seed)

        def loss(real: Steps) -> float:
            return float((self._latents(pattern(real, self.args.steps), text, seed) - plain).square().mean())

        search = PatternSearch(loss, self.args.steps, self.args.real, self.args.evaluations, seed=seed)
        real = search.run()
        return {
            "plan": pattern(real, self.args.steps).name, "certified": False, "evaluations": len(search.measured),
            "known": search.hits, "loss": search.measured.get(real), "first_loss": next(iter(search.measured.values())),
        }  # fmt: skip

    def _latents(self, plan: Variant, text: str | None, seed: int) -> torch.Tensor:
        arguments = call_arguments(self.pipe, plan.of(self.request))
        generator = torch.Generator().manual_seed(seed)
        if plan.methods:
            diffaccel.accelerate(self.pipe, *plan.methods)
        try:
            return self.pipe(text, generator=generator, output_type="latent", **arguments).images.float()
        finally:
            diffaccel.remove(self.pipe)

    def seconds(self, plans: list[str], turns: int = 6) -> dict[str, Any]:
        """Return seconds a picture of plans and of the plain pipeline, and their ratio, in turns, as a tuning does."""
        part = Part("held-out", 0, self.sizes.rungs[0])
        own = self.truth.baseline().name
        others = [parse(plan) for plan in plans if plan != own]
        if not others:
            return {}
        timed = self.truth.take_turns(others, turns, part)
        return {**timed["plans"], "plain": {"seconds": timed["baseline"]}}

    def true_values(self, plan: str) -> dict[str, list[float]]:
        """Return by metric a plan's number of every prompt that no search saw."""
        values = self.truth.evaluate(parse(plan), Part("held-out", 0, self.args.truth))["values"]
        return {metric: [round(number, 6) for number in numbers] for metric, numbers in values.items()}


def pattern(real: Steps, steps: int) -> Variant:
    """Return the plan of a set of real steps: at the others the last residual of all blocks is added again."""
    return parse(f"taylorseer:steps={steps},real_steps={sorted(real)},payload=last".replace(" ", ""))


def measure(bench: Bench, seed: int, ways: list[str], file: Path, is_over: Callable[[], bool]) -> bool:
    """Measure one tuning, way by way, into its file; return whether it is whole."""
    aim = bench.args.aim
    options = {key: value for key, value in vars(bench.args).items() if key not in ("tunings", "stop_after", "parts",
               "ways", "join", "out", "kind")}  # fmt: skip
    part = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if part and part["options"] != options:
        sys.exit(f"'{file}' is of other options. Repeat its command to go on, or name another folder with --parts.")
    part = part or {"aim": aim, "seed": seed, "options": options, "device": record.describe_device(bench.device),
                    "versions": record.versions(), "date": time.strftime("%Y-%m-%d"), "ways": {}}  # fmt: skip
    for way in ways:
        if way in part["ways"]:
            continue
        if is_over():
            return False
        start = time.perf_counter()
        entry = bench.annealed(seed) if way == ANNEALED else bench.tuned(seed, way, part.get("limit"))
        if way == ANNEALED:
            part["limit"] = bench.seconds([entry["plan"]])[entry["plan"]]["ratio"]["value"]
        part["ways"][way] = {**entry, "truth": bench.true_values(entry["plan"])}
        part["ways"][way]["took"] = round(time.perf_counter() - start, 1)
        part.pop("turns", None)
        write_json(file, part)
        print(f"{aim} {seed}, {way}: {entry['plan']} ({part['ways'][way]['took']} s)", flush=True)
    if "turns" not in part:
        part["turns"] = bench.seconds(list(dict.fromkeys(entry["plan"] for entry in part["ways"].values())))
        write_json(file, part)
    return True


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--aim", choices=list(WAYS), default="near")
    add("--tunings", type=int, nargs=2, default=[0, 10], metavar=("FROM", "TO"), help="seeds of the tunings")
    add("--ways", nargs="+", default=None, help="of the aim: " + "; ".join(", ".join(ways) for ways in WAYS.values()))
    add("--stop-after", type=float, default=math.inf, metavar="SECONDS", help="begin no other way after these")
    add("--evaluations", type=int, default=600, help="pictures that every way may draw to find its plan")
    add("--real", type=int, default=6, help="real steps of the annealed set")
    add("--steps", type=int, default=14, help="of the plain pipeline")
    add("--fail-if", default="ssim<0.9")
    add("--methods", nargs="+", default=None, help="that the tuner may choose from; all by default")
    add("--rungs", type=int, nargs="+", default=[4, 8, 16], help="tuning prompts")
    add("--bracket", type=int, default=8)
    add("--held-out", type=int, default=32, help="prompts of the certificate")
    add("--truth", type=int, default=200, help="prompts that no search saw")
    add("--model", default="emoji-flux")
    add("--prompts", default="emoji-1000")
    add("--size", type=int, default=128)
    add("--batch", type=int, default=8, help="pictures in a call")
    add("--device", default="auto")
    add("--dtype", default="auto")
    add("--parts", type=Path, default=Path("out") / "tuner", help="folder of the tunings' files")
    add("--join", action="store_true", help="make the record of the tunings that there are")
    add("--kind", default=None, help="name of the machine, for the record")
    add("--out", type=Path, default=Path("docs/results"), help="folder of the record")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Measure tunings, or join them; return 1 where fewer promises hold than 37 of 40 do."""
    args = make_parser().parse_args(argv)
    if args.join:
        return tuner_table.join(args.parts, args.out, args.kind)
    start = time.perf_counter()
    args.parts.mkdir(parents=True, exist_ok=True)
    bench = Bench(args)
    ways = [way for way in WAYS[args.aim] if args.ways is None or way in args.ways]
    for seed in range(*args.tunings):
        file = args.parts / f"{args.aim}-{seed:03d}.json"
        if not measure(bench, seed, ways, file, lambda: time.perf_counter() - start > args.stop_after):
            print(f"Stopped before tuning {seed}. Repeat the command to go on.", flush=True)
            return 0
    return tuner_table.join(args.parts, args.out, args.kind)


if __name__ == "__main__":
    sys.exit(main())
