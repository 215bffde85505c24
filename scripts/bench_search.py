"""Searches on a real model: what each reaches by the reward that it climbs, by a judge that it never sees, and in time.

    python -m scripts.bench_search --budgets 100 200 500 --prompts 48 --seeds 3 --kind nvidia-h100-x1 --out docs/results

Prompts are combinations that the model was never trained on. All searches of one budget are compared with best of N at
the same budget and, at equal wall time, with the plain sampler at more steps. Repeat the command to go on after a stop.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import diffaccel
from diffaccel import record
from diffaccel.eval.comparison import printed_distances as distances
from diffaccel.eval.metrics import clip_score as alignment
from diffaccel.eval.networks.extractors import as_clip, extractor
from diffaccel.eval.sets import prompts
from diffaccel.eval.uncertainty import intervals
from diffaccel.files import write_json
from diffaccel.runs import loading as opening
from diffaccel.runs import variant as variants
from diffaccel.runs.call_arguments import call_arguments
from diffaccel.runs.request import Request

REWARD, JUDGE = "emoji-clip-reward", "emoji-clip-judge"
PROMPTS, STEPS = "emoji-1000", 8  # of the table; other ones have a record of their own
UNSEEN = ("pair", "colour", "count", "colour_pair")  # categories whose combinations are in no training caption
PATHS = ("native", "vp", "linear")
METHODS = {
    "bon": "bon:budget={budget}",
    "sop": "sop:budget={budget}",
    "smc": "smc:budget={budget},temperature=2,path={path}",
    "svdd": "svdd:budget={budget},path={path}",
    "code": "code:budget={budget},path={path}",
    "rbf, chunk 1": "rbf:budget={budget},particles=4,beam=1,chunk=1,path={path}",
    "rbf, chunk 8": "rbf:budget={budget},particles=4,beam=1,chunk=8,path={path}",
    "rbf": "rbf:budget={budget},path={path}",
    "rbf, begin 0.4": "rbf:budget={budget},begin=0.4,initial=0,path={path}",
}
DEFAULT = "rbf, native"
CHOICES = ("out", "budgets", "only", "variants", "fd", "fd_variants", "kind")  # options that change no row
TAP = "tiny_features"  # what Fréchet distances are of


def plan(budgets: Sequence[int], only: Sequence[str]) -> list[tuple[str, str]]:
    """Name and variant of every search; a method without a path is drawn once."""
    found = []
    for budget, (name, text) in itertools.product(budgets, METHODS.items()):
        if only and name not in only:
            continue
        for path in PATHS if "{path}" in text else ("",):
            found.append((f"{name}, {path}" if path else name, text.format(budget=budget, path=path)))
    return found


def rows_of(source: str, skip: int, count: int, seeds: int, first_seed: int = 0) -> list[tuple[str, int]]:
    """Prompt and seed of every picture, kinds of prompts in turn."""
    read = prompts.read(source)
    kinds = [[t for t, c in zip(read.texts, read.categories, strict=True) if c == kind] for kind in UNSEEN]
    every = [text for texts in itertools.zip_longest(*kinds) for text in texts if text is not None]
    return [(text, first_seed + seed) for text in every[skip : skip + count] for seed in range(seeds)]


class Bench:
    """One open pipeline, the two CLIPs and the pictures to be drawn."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = opening.pick_device(args.device)
        self.request = Request(model=args.model, steps=args.steps, size=(args.size, args.size), prompts=("x",))
        folder, _ = opening.locate(args.model)
        dtype = opening.pick_dtype(args.dtype, self.device)
        self.request = self.request.with_model_defaults()
        self.pipe = opening.open_pipeline(self.request, folder, self.device, dtype)
        self.pipe.set_progress_bar_config(disable=True)
        self.reward, self.judge = (as_clip(extractor(name, device=self.device)) for name in (REWARD, JUDGE))
        self.tiny = extractor("tiny", device=self.device)
        self.texts: dict[str, tuple[Tensor, Tensor]] = {}

    def rows(self, count: int, seeds: int, first_seed: int = 0) -> list[tuple[str, int]]:
        return rows_of(self.args.set, self.args.skip, count, seeds, first_seed)

    def run(self, text: str, rows: list[tuple[str, int]]) -> dict[str, Any]:
        """Draw all rows by one variant, and measure."""
        variant = variants.parse(text)
        request = variant.of(self.request)
        if request.methods:
            diffaccel.accelerate(self.pipe, *request.methods)
        call = call_arguments(self.pipe, request)
        pictures, nfe, seconds = [], 0, 0.0
        try:
            for begin in range(0, len(rows), self.args.batch):
                some = rows[begin : begin + self.args.batch]
                generators = [torch.Generator().manual_seed(seed) for _, seed in some]
                arguments = dict(call, negative_prompt=[call.get("negative_prompt") or ""] * len(some))
                self._wait()
                start = time.perf_counter()
                made = self.pipe([p for p, _ in some], generator=generators, output_type="pt", **arguments).images
                self._wait()
                seconds += time.perf_counter() - start
                pictures.append((made.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu())
                last = diffaccel.summary(self.pipe).last_run
                nfe += last["nfe"] if last else len(some) * (request.steps or 0)
        finally:
            diffaccel.remove(self.pipe)
        images = torch.cat(pictures)
        return {"variant": text, "seconds": seconds / len(rows), "nfe": nfe / len(rows), **self.measure(images, rows)}

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def measure(self, images: Tensor, rows: list[tuple[str, int]]) -> dict[str, Any]:
        texts = [text for text, _ in rows]
        once = list(dict.fromkeys(texts))
        at = [once.index(text) for text in texts]
        found: dict[str, Any] = {"images": images}
        for name, clip in (("reward", self.reward), ("judge", self.judge)):
            features = torch.cat([clip(part.to(self.device)).cpu() for part in images.split(256)])
            found[name] = alignment.clip_score(features, clip.texts(once)[at])
            found[f"{name}_features"] = features
        found["tiny_features"] = torch.cat([self.tiny(part.to(self.device)).cpu() for part in images.split(256)])
        return found


def diversity(features: Tensor, texts: Sequence[str]) -> float | None:
    """Mean ``1 - cos`` of the judge's features over pairs of pictures of one prompt; None where there are none."""
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    apart = [
        1 - float(unit[i] @ unit[j])
        for text in dict.fromkeys(texts)
        for i, j in itertools.combinations([k for k, t in enumerate(texts) if t == text], 2)
    ]
    return round(sum(apart) / len(apart), 4) if apart else None


def as_long_as(seconds: float, bench: Bench, rows: list[tuple[str, int]]) -> str:
    """The plain sampler with as many steps as take so long, by what a step costs between two numbers of them."""
    few, many = bench.args.steps, 10 * bench.args.steps
    short, long = (bench.run(f"plain:steps={steps}", rows)["seconds"] for steps in (few, many))
    return f"plain:steps={max(few, round(few + (seconds - short) * (many - few) / (long - short)))}"


def summarise(name: str, found: dict[str, Any], base: dict[str, Any] | None, texts: list[str]) -> dict[str, Any]:
    """What is kept of one search: the table's numbers, and every picture's scores."""
    row: dict[str, Any] = {"name": name, "variant": found["variant"], "pictures": len(texts)}
    row |= {"date": time.strftime("%Y-%m-%d"), "nfe": round(found["nfe"], 1), "seconds": round(found["seconds"], 4)}
    row["scores"] = {key: [round(v, 4) for v in found[key].tolist()] for key in ("reward", "judge")}
    row["reward"] = round(float(found["reward"].mean()), 3)
    judge = intervals.bootstrap_mean(row["scores"]["judge"], clusters=texts)
    row |= {"judge": round(judge.value, 3), "judge_interval": [round(judge.low, 3), round(judge.high, 3)]}
    row["diversity"] = diversity(found["judge_features"], texts)
    if base is not None:
        apart = intervals.paired_difference(row["scores"]["judge"], base["scores"]["judge"], clusters=texts)
        row["against"] = base["variant"]
        row["delta"] = [round(v, 3) for v in (apart.interval.value, apart.interval.low, apart.interval.high)]
        row["wins"] = round(apart.wins.value, 3)
    return row


def shown(row: dict[str, Any]) -> str:
    delta = ""
    if "delta" in row:
        value, low, high = row["delta"]
        delta = f"{value:+.2f} ({low:+.2f} to {high:+.2f})"
    fd = "" if row.get("fd") is None else f"{row['fd']:.3g}"
    spread = "" if row["diversity"] is None else f"{row['diversity']:.4f}"
    cells = [row["name"], f"{row['nfe']:.0f}", f"{row['seconds']:.3f}", f"{row['reward']:.2f}", f"{row['judge']:.2f}"]
    return "| " + " | ".join([*cells, delta, spread, fd]) + " |"


HEAD = "| search | NFE | s a picture | reward | judge | judge against best of N | diversity | FD |\n" + "|---" * 8 + "|"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="emoji-flux")
    add("--set", default=PROMPTS, help="prompt set, or a file of prompts with categories")
    add("--prompts", type=int, default=48)
    add("--skip", type=int, default=0, help="prompts left out: options are chosen on others than are reported")
    add("--seeds", type=int, default=3)
    add("--budgets", type=int, nargs="+", default=[100, 200, 500])
    add("--only", nargs="*", default=[], help="names of methods")
    add("--variants", nargs="*", default=[], help="further variants, such as rbf:budget=200,initial=4")
    add("--steps", type=int, default=STEPS, help="of the call")
    add("--size", type=int, default=128)
    add("--batch", type=int, default=144, help="pictures that are searched for in one call")
    add("--fd", type=int, default=0, metavar="N", help="prompts of the Fréchet distances; 0 leaves them out")
    add("--fd-budget", type=int, default=500)
    add("--fd-variants", nargs="*", default=[], help="further variants that have a distance too")
    add("--device", default="auto")
    add("--dtype", default="auto")
    add("--kind", default=None, help="name of the machine, for the record")
    add("--out", type=Path, default=None, help="folder of the record")
    args = parser.parse_args()
    bench = Bench(args)
    record_of(args, bench)


def record_of(args: argparse.Namespace, bench: Bench) -> None:
    """Every row of the table, kept as soon as it is there; those of an earlier call are not made again."""
    options = {k: v for k, v in vars(args).items() if k not in CHOICES}
    values: dict[str, Any] = {
        "options": options, "device": record.describe_device(bench.device), "kind": args.kind,
        "versions": record.versions(), "reward": REWARD, "judge": JUDGE, "rows": [],
    }  # fmt: skip
    apart = [Path(args.set).stem] if args.set != PROMPTS else []
    apart += [f"{args.steps}-steps"] if args.steps != STEPS else []
    name = "_".join(["bench_search", args.model, *apart, args.kind or bench.device.type])
    file = args.out and args.out / f"{name}.json"
    if file and file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        if before["options"] != json.loads(json.dumps(options)):
            raise SystemExit(f"{file} was made with other options. Remove it, or give another --out.")
        values["rows"] = before["rows"]
    print(HEAD, flush=True)
    for row in values["rows"]:
        print(shown(row), flush=True)

    def row(
        name: str, text: str, rows: list[tuple[str, int]], base: dict[str, Any] | None, target: Any = None
    ) -> dict[str, Any]:
        done = next((r for r in values["rows"] if (r["name"], r["variant"]) == (name, text)), None)
        if done is not None:
            return done
        found = bench.run(text, rows)
        made = summarise(name, found, base, [prompt for prompt, _ in rows])
        if target is not None:
            made["fd"] = round(distances.fid(found[TAP], target[TAP])[distances.FD], 4)
            made["kid"] = next(iter(distances.kid(found[TAP], target[TAP]).values()))
            made["fd_from"] = f"{bench.tiny.key}, to the plain sampler with other seeds, {len(rows)} pictures each"
        values["rows"].append(made)
        print(shown(made), flush=True)
        if file:
            args.out.mkdir(parents=True, exist_ok=True)
            write_json(file, values)
        return made

    rows = bench.rows(args.prompts, args.seeds)
    bench.run(f"bon:budget={2 * args.steps}", rows[: args.batch])  # warm
    row(f"no search, {args.steps} steps", f"plain:steps={args.steps}", rows, None)
    base: dict[str, Any] | None = None
    for name, text in plan(args.budgets, args.only) + [(text, text) for text in args.variants]:
        made = row(name, text, rows, None if text.startswith("bon") else base)
        base = made if text.startswith("bon") else base
        if name == DEFAULT:
            known = next((r["variant"] for r in values["rows"] if r["name"] == f"as long as {text}"), None)
            row(f"as long as {text}", known or as_long_as(made["seconds"], bench, rows), rows, base)
    if args.fd:
        wide, others = bench.rows(args.fd, args.seeds), bench.rows(args.fd, args.seeds, first_seed=1000)
        names = [f"plain:steps={args.steps}", f"bon:budget={args.fd_budget}", f"rbf:budget={args.fd_budget}"]
        names += args.fd_variants
        titles = [f"{text}, {args.fd} prompts" for text in names]
        if all(any(r["name"] == title for r in values["rows"]) for title in titles):
            return
        target = bench.run(f"plain:steps={args.steps}", others)
        best = row(titles[1], names[1], wide, None, target)
        row(titles[0], names[0], wide, best, target)
        for title, text in zip(titles[2:], names[2:], strict=True):
            row(title, text, wide, best, target)


if __name__ == "__main__":
    main()
