"""Compare accelerations with fewer steps at equal measured seconds: likeness to 50 steps and a judge, with intervals.

    python -m scripts.bench_equal_seconds --variants "bottleneck:preset=speed,tolerance=0.05" --out docs/results

Every variant draws the same prompts and seeds. Seconds are of the denoising loop, the median over turns in which all
variants take their turn on one batch, of ``--timing-batch`` pictures where that is given: a small model follows its
FLOPs only in large batches. The prompts of this batch are encoded once and its latents are not decoded: both are alike
for all. A variant is compared, picture by picture, with the plain sampler at the least number of steps that takes at
least as long. Scores of every picture go to a file of their own as soon as they are measured, from which the command
goes on after a stop; ``--table FILE`` makes record and table of it again.

``--sets presets caches mixes peers`` takes the options of ``scripts.equal_seconds_grid``: with few prompts to choose,
then ``--variants-from`` that file of scores, with ``--skip``, to report what was not beaten within its family on other
prompts. A variant that cannot run here is named and left out. Where each stands: ``python -m scripts.pareto_front``.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import diffaccel
from diffaccel import record
from diffaccel.errors import first_line
from diffaccel.eval.comparison import zoo_reference
from diffaccel.eval.metrics import frechet_intervals, paired
from diffaccel.eval.metrics.clip_score import clip_score
from diffaccel.eval.networks import lpips
from diffaccel.eval.networks.extractors import as_clip, extractor
from diffaccel.eval.sets import prompts
from diffaccel.eval.uncertainty import intervals
from diffaccel.files import write_json
from diffaccel.runs import loading
from diffaccel.runs.call_arguments import call_arguments
from diffaccel.runs.request import Request
from diffaccel.runs.variant import parse
from scripts import pareto_front
from scripts.earlier import earlier
from scripts.equal_seconds_grid import SETS

JUDGE = "emoji-clip-judge"
SCORES = ("ssim", "psnr", "judge", "lpips")  # the last where its weights are given
LEAST_DISTANCE = 200  # pictures, below which a distance of sets has no interval that holds
PLAIN = "euler:steps={}"
CHOICES = (
    "out",
    "table",
    "variants",
    "sets",
    "variants_from",
    "choose_by",
    "plain",
    "turns",
    "kind",
    "timing_batch",
)  # options that change no picture


class Bench:
    """One open pipeline and the judge; what each variant drew is measured at once."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, loading.pick_device(args.device)
        request = Request(model=args.model, size=(args.size, args.size), prompts=("x",)).with_model_defaults()
        self.request, dtype = request, loading.pick_dtype(args.dtype, self.device)
        self.pipe = loading.open_pipeline(request, loading.locate(args.model)[0], self.device, dtype)
        self.pipe.set_progress_bar_config(disable=True)
        if args.compile:
            torch._dynamo.config.cache_size_limit = 64
            self.pipe.transformer.compile_repeated_blocks(dynamic=False)  # whole blocks: caches skip them
        self.judge = as_clip(extractor(JUDGE, device=self.device))
        self.lpips = None if args.lpips is None else lpips.load(args.lpips, device=self.device)
        self.texts = list(prompts.read(args.prompts).texts)[args.skip : args.skip + args.count]
        self.base: Tensor | None = None
        self.reference = zoo_reference.shipped(args.model, args.size, device=self.device)
        self.features: dict[str, Tensor] = {}  # of what every variant drew, for the distance to the reference

    def call(self, text: str, begin: int) -> Tensor:
        """Draw one batch of pictures by a variant that is on."""
        arguments = call_arguments(self.pipe, parse(text).of(self.request))
        batch = self.texts[begin : begin + self.args.batch]
        arguments["negative_prompt"] = [arguments.get("negative_prompt") or ""] * len(batch)
        seeds = range(self.args.seed + begin, self.args.seed + begin + len(batch))
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return self.pipe(batch, generator=generators, output_type="pt", **arguments).images

    def seconds(self, text: str, encoded: dict[str, Tensor]) -> tuple[float, float]:
        """Return the seconds of the loop and of the call, encoders and decoder apart, of a variant that is on."""
        arguments = call_arguments(self.pipe, parse(text).of(self.request))
        arguments.pop("negative_prompt", None)
        self._wait()
        start = time.perf_counter()
        generator = torch.Generator(self.device).manual_seed(self.args.seed)
        self.pipe(**encoded, generator=generator, output_type="latent", **arguments)
        self._wait()
        return diffaccel.summary(self.pipe).last_run["seconds"], time.perf_counter() - start

    def encode(self) -> dict[str, Tensor]:
        """Encode the prompts of the batch on which time is measured, and as many empty ones."""
        rows = self.args.timing_batch or min(self.args.batch, len(self.texts))
        texts = [self.texts[number % len(self.texts)] for number in range(rows)]
        length = call_arguments(self.pipe, self.request)["max_sequence_length"]
        with torch.no_grad():
            embeds, pooled, _ = self.pipe.encode_prompt(texts, None, max_sequence_length=length)
            negative, negative_pooled, _ = self.pipe.encode_prompt([""] * rows, None, max_sequence_length=length)
        return {
            "prompt_embeds": embeds, "pooled_prompt_embeds": pooled,
            "negative_prompt_embeds": negative, "negative_pooled_prompt_embeds": negative_pooled,
        }  # fmt: skip

    def draw(self, text: str) -> tuple[Tensor, dict[str, Any]]:
        """Draw all prompts by a variant, uint8 (n, 3, H, W), with the cost of the last batch."""
        self._put_on(text)
        try:
            parts = [self.call(text, begin) for begin in range(0, len(self.texts), self.args.batch)]
            cost = diffaccel.summary(self.pipe).last_run
        finally:
            diffaccel.remove(self.pipe)
        return torch.cat([(part.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu() for part in parts]), cost

    def measure(self, text: str) -> dict[str, Any]:
        """Return a variant's row: its scores, picture by picture, and its cost."""
        images, cost = self.draw(text)
        self.base = images if self.base is None else self.base
        parts = [
            (a.to(self.device), b.to(self.device)) for a, b in zip(images.split(250), self.base.split(250), strict=True)
        ]
        features = torch.cat([self.judge(drawn).cpu() for drawn, _ in parts])
        scores = {
            "ssim": torch.cat([paired.ssim(drawn, base).cpu() for drawn, base in parts]),
            "psnr": torch.cat([paired.psnr(drawn, base).clamp(max=60).cpu() for drawn, base in parts]),
            "judge": clip_score(features, self.judge.texts(self.texts)),
        }
        if self.lpips is not None:
            scores["lpips"] = torch.cat([self.lpips(drawn, base).cpu() for drawn, base in parts])
        distance = {}
        if self.reference is not None and len(images) >= LEAST_DISTANCE:
            own = torch.cat([self.reference.extractor(drawn).cpu() for drawn, _ in parts])
            self.features[text] = own
            distance = {"fd": pareto_front.ends(frechet_intervals.distance_interval(own, self.reference.moments))}
        row = {"variant": text, **distance, "pictures_in_a_call": min(self.args.batch, len(self.texts))}
        row |= {"nfe": cost["nfe_by_resolution"], "forwards": cost["forwards"], "caches": cost["caches"]}
        return row | {name: [round(v, 4) for v in values.double().tolist()] for name, values in scores.items()}

    def distance_lead(self, text: str, rival: str) -> list[float] | None:
        """Return by how much a variant is farther from the reference than its rival, where both were drawn just now."""
        if self.reference is None or not {text, rival} <= self.features.keys():
            return None
        own, other = self.features[text], self.features[rival]
        return pareto_front.ends(frechet_intervals.difference(own, other, self.reference.moments))

    def time(self, variants: list[str]) -> dict[str, dict[str, float]]:
        """Return median seconds a picture of every variant, in turns on one batch; each is warmed up by one call."""
        seconds: dict[str, list[tuple[float, float]]] = {text: [] for text in variants}
        encoded = self.encode()
        rows = len(encoded["prompt_embeds"])
        for turn in range(self.args.turns + 1):
            for text in [text for text in (variants if turn % 2 else variants[::-1]) if text in seconds]:
                try:
                    self._put_on(text)
                    loop, whole = self.seconds(text, encoded)
                except Exception as error:  # a method of another package, or one that is not installed
                    print(f"left out: {text}: {first_line(error)}", flush=True)
                    del seconds[text]
                    continue
                finally:
                    diffaccel.remove(self.pipe)
                if turn:
                    seconds[text].append((loop / rows, whole / rows))
        return {
            text: {"loop": median(loop for loop, _ in values), "whole": median(whole for _, whole in values)}
            for text, values in seconds.items()
        }

    def _put_on(self, text: str) -> None:
        diffaccel.accelerate(self.pipe, *parse(text).of(self.request).methods)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def scores_of(row: dict[str, Any]) -> list[str]:
    """Return the scores that a row has."""
    return [name for name in SCORES if name in row]


def plain_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of the plain sampler."""
    return [row for row in rows if row["variant"] == PLAIN.format(row["variant"].rpartition("=")[2])]


def rival_of(row: dict[str, Any], plain: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the plain sampler with the fewest steps that take at least as long; None where there is none."""
    if row["seconds"] is None or row in plain:
        return None
    slower = [other for other in plain if other["seconds"]["loop"] >= row["seconds"]["loop"]]
    return min(slower, key=lambda other: other["seconds"]["loop"], default=None)


def compare(row: dict[str, Any], plain: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return differences to the plain sampler with the fewest steps that take at least as long, with intervals."""
    rival = rival_of(row, plain)
    if rival is None:
        return None
    leads = {}
    for name in scores_of(row):
        lead = intervals.paired_difference(row[name], rival[name]).interval
        leads[name] = pareto_front.ends(lead)
    if row.get("fd_lead"):
        leads["fd"] = row["fd_lead"]
    return {"rival": rival["variant"], **leads}


def summarised(pictures: dict[str, Any]) -> dict[str, Any]:
    """Return the record: of every variant the means of its scores, its cost, and the comparison at equal seconds."""
    rows = pictures["rows"]
    plain = plain_rows(rows)
    summaries = []
    for row in rows:
        means = {name: round(sum(row[name]) / len(row[name]), 4) for name in scores_of(row)}
        kept = {key: value for key, value in row.items() if key not in SCORES}
        summaries.append({**kept, "pictures": len(row["ssim"]), "means": means, "equal_seconds": compare(row, plain)})
    return {**pictures, "rows": summaries}


def shown(row: dict[str, Any]) -> str:
    """Return a row of the record as a line of the table."""
    distance = "{:.1f} ({:.1f} to {:.1f})".format(*row["fd"]) if row.get("fd") else ""
    times = ["", ""] if row["seconds"] is None else [f"{1000 * row['seconds'][part]:.2f}" for part in ("loop", "whole")]
    means, against = row["means"], row["equal_seconds"]
    cells = [row["variant"], *times, f"{means['ssim']:.4f}", f"{means['psnr']:.2f}", f"{means['judge']:.2f}", distance]
    if against is None:
        return "| " + " | ".join([*cells, "", "", "", ""]) + " |"
    leads = ["{:+.4f} ({:+.4f} to {:+.4f})".format(*against[name]) for name in ("ssim", "judge")]
    leads.append("{:+.1f} ({:+.1f} to {:+.1f})".format(*against["fd"]) if "fd" in against else "")
    return "| " + " | ".join([*cells, against["rival"].partition(":")[2], *leads]) + " |"


HEAD = (
    "| variant | ms a picture, loop | call | SSIM | PSNR | judge | FD | at equal seconds | SSIM against it | judge "
    + "| FD |\n"
    + "|---" * 11
    + "|"
)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--model", default="emoji-flux")
    add("--prompts", default="emoji-1000", help="prompt set, or a file of prompts")
    add("--skip", type=int, default=0, help="prompts left out: options are chosen on others than are reported")
    add("--count", type=int, default=1000)
    add("--seed", type=int, default=0)
    add("--size", type=int, default=128)
    add("--batch", type=int, default=100)
    add("--timing-batch", type=int, default=None, help="pictures in a call whose time is measured; default: --batch")
    add("--turns", type=int, default=9, help="0 measures no time")
    add("--plain", type=int, nargs="+", default=[50, 28, 20, 14, 10, 8, 6], help="steps of the plain sampler; 50 first")
    add("--variants", nargs="*", default=[])
    add("--sets", nargs="+", default=[], choices=list(SETS), help="variants of scripts.equal_seconds_grid")
    add("--variants-from", type=Path, metavar="FILE", help="those of a *_pictures.json that none of their family beats")
    add("--choose-by", default="ssim", choices=SCORES, help="score by which --variants-from chooses")
    add("--lpips", metavar="FILE", help="weights of LPIPS, which is measured too")
    add("--compile", action="store_true")
    add("--device", default="auto")
    add("--dtype", default="auto")
    add("--kind", default=None, help="name of the machine, for the record")
    add("--out", type=Path, default=Path("docs/results"), help="folder of the record and of the pictures' scores")
    add("--table", type=Path, metavar="FILE", help="make the record of the pictures' scores in FILE, measure nothing")
    return parser


def main() -> None:
    """Time, draw, measure, print."""
    args = make_parser().parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.table:
        finish(json.loads(args.table.read_text(encoding="utf-8")), args.out)
        return
    bench = Bench(args)
    values = {
        "options": {k: v for k, v in vars(args).items() if k not in CHOICES}, "kind": args.kind,
        "device": record.describe_device(bench.device), "versions": record.versions(), "judge": JUDGE,
        "judge_weights_sha256": bench.judge.weights_sha256,
        "timing_batch": args.timing_batch or args.batch, "turns": args.turns, "rows": [],
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    file = args.out / f"{name_of(values)}_pictures.json"
    values["rows"] = earlier(file, values, ("options",)).get("rows", [])
    variants = list(dict.fromkeys([*map(PLAIN.format, args.plain), *args.variants, *asked(args)]))
    rows: dict[str, dict[str, Any]] = {row["variant"]: row for row in values["rows"]}
    seconds = kept_seconds(file, values, variants) or (bench.time(variants) if args.turns else {})
    values |= {"seconds": seconds, "left_out": [text for text in variants if args.turns and text not in seconds]}
    write_json(file, values)  # at once: after a stop the command goes on with them
    for text in variants:
        if text in values["left_out"]:
            continue  # it cannot run here
        if text not in rows or bench.base is None:
            rows[text] = bench.measure(text)
        rows[text]["seconds"] = seconds.get(text)
        values["rows"] = list(rows.values())
        write_json(file, values)
        print(shown(summarised({"rows": [rows[text]]})["rows"][0]), flush=True)
    plain = plain_rows(values["rows"])
    for row in values["rows"]:
        rival = rival_of(row, plain)
        if rival and (apart := bench.distance_lead(row["variant"], rival["variant"])):
            row["fd_lead"] = apart
    write_json(file, values)
    finish(values, args.out)


def kept_seconds(file: Path, values: dict[str, Any], variants: list[str]) -> dict[str, Any]:
    """Return the times of a run that was stopped, where it measured all of these variants alike; else none."""
    before = earlier(file, values, ("options", "kind", "device", "versions", "timing_batch", "turns"))
    known = {*before.get("seconds", {}), *before.get("left_out", [])}
    if not known.issuperset(variants):
        return {}
    return {text: times for text, times in before.get("seconds", {}).items() if text in variants}


def asked(args: argparse.Namespace) -> list[str]:
    """Return the variants of whole sets, and those that a file of scores leaves to report."""
    variants = [text for name in args.sets for text in SETS[name]]
    if args.variants_from:
        rows = json.loads(args.variants_from.read_text(encoding="utf-8"))["rows"]
        others = [row for row in rows if row["seconds"] and pareto_front.family(row["variant"]) != "euler"]
        variants += pareto_front.unbeaten(others, args.choose_by)
    return variants


def name_of(values: dict[str, Any]) -> str:
    """Return the name of a record."""
    return f"bench_equal_seconds_{values['options']['model']}_{values['kind'] or 'cpu'}"


def finish(pictures: dict[str, Any], out: Path) -> None:
    """Write the record and print its table."""
    values = summarised(pictures)
    write_json(out / f"{name_of(values)}.json", values)
    print(HEAD)
    for row in values["rows"]:
        print(shown(row))


if __name__ == "__main__":
    main()
