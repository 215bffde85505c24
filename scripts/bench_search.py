"""Compare searches on a real model: by the reward that they maximise, by a judge that they never see, and in time.

    python -m scripts.bench_search --budgets 100 200 500 --prompts 48 --seeds 3 --kind nvidia-h100-x1 --out docs/results

Prompts are combinations that the model was never trained on. All searches of one budget are compared with best of N at
the same budget and, at equal wall time, with the plain sampler at more steps. The same command continues after a stop.
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
from diffaccel.eval.comparison import printed_distances
from diffaccel.eval.metrics.clip_score import clip_score
from diffaccel.eval.networks.extractors import as_clip, extractor
from diffaccel.eval.sets import prompts
from diffaccel.eval.uncertainty import intervals
from diffaccel.files import write_json
from diffaccel.runs import loading
from diffaccel.runs.call_arguments import call_arguments
from diffaccel.runs.request import Request
from diffaccel.runs.variant import parse

REWARD, JUDGE = "emoji-clip-reward", "emoji-clip-judge"
PROMPTS, STEPS = "emoji-1000", 8  # of the table; other values have a record of their own
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
FD_FEATURES = "tiny_features"  # features of the Fréchet distances
Rows = list[tuple[str, int]]  # prompt and seed of every picture


def plan(budgets: Sequence[int], only: Sequence[str]) -> list[tuple[str, str]]:
    """Return name and variant of every search; a method without a path is drawn once."""
    searches = []
    for budget, (name, text) in itertools.product(budgets, METHODS.items()):
        if only and name not in only:
            continue
        for path in PATHS if "{path}" in text else ("",):
            searches.append((f"{name}, {path}" if path else name, text.format(budget=budget, path=path)))
    return searches


def rows_of(source: str, skip: int, count: int, seeds: int, first_seed: int = 0) -> Rows:
    """Return prompt and seed of every picture, kinds of prompts in turn."""
    prompt_set = prompts.read(source)
    pairs = list(zip(prompt_set.texts, prompt_set.categories, strict=True))
    kinds = [[text for text, category in pairs if category == kind] for kind in UNSEEN]
    in_turn = [text for texts in itertools.zip_longest(*kinds) for text in texts if text is not None]
    return [(text, first_seed + seed) for text in in_turn[skip : skip + count] for seed in range(seeds)]


class Bench:
    """One open pipeline, the reward and the judge, and the pictures to be drawn."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = loading.pick_device(args.device)
        self.request = Request(model=args.model, steps=args.steps, size=(args.size, args.size), prompts=("x",))
        folder, _ = loading.locate(args.model)
        dtype = loading.pick_dtype(args.dtype, self.device)
        self.request = self.request.with_model_defaults()
        self.pipe = loading.open_pipeline(self.request, folder, self.device, dtype)
        self.pipe.set_progress_bar_config(disable=True)
        self.reward, self.judge = (as_clip(extractor(name, device=self.device)) for name in (REWARD, JUDGE))
        self.tiny = extractor("tiny", device=self.device)

    def rows(self, count: int, seeds: int, first_seed: int = 0) -> Rows:
        """Return prompt and seed of ``seeds`` pictures of each of ``count`` prompts."""
        return rows_of(self.args.set, self.args.skip, count, seeds, first_seed)

    def run(self, text: str, rows: Rows) -> dict[str, Any]:
        """Draw all rows by one variant, and measure."""
        request = parse(text).of(self.request)
        if request.methods:
            diffaccel.accelerate(self.pipe, *request.methods)
        call = call_arguments(self.pipe, request)
        pictures, nfe, seconds = [], 0, 0.0
        try:
            for begin in range(0, len(rows), self.args.batch):
                batch = rows[begin : begin + self.args.batch]
                generators = [torch.Generator().manual_seed(seed) for _, seed in batch]
                arguments = dict(call, negative_prompt=[call.get("negative_prompt") or ""] * len(batch))
                self._wait()
                start = time.perf_counter()
                images = self.pipe([p for p, _ in batch], generator=generators, output_type="pt", **arguments).images
                self._wait()
                seconds += time.perf_counter() - start
                pictures.append((images.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu())
                stats = diffaccel.summary(self.pipe).last_run
                nfe += stats["nfe"] if stats else len(batch) * (request.steps or 0)
        finally:
            diffaccel.remove(self.pipe)
        measured = self.measure(torch.cat(pictures), rows)
        return {"variant": text, "seconds": seconds / len(rows), "nfe": nfe / len(rows), **measured}

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def measure(self, images: Tensor, rows: Rows) -> dict[str, Any]:
        """Return the scores and features of pictures, uint8 (n, 3, H, W)."""
        texts = [text for text, _ in rows]
        unique = list(dict.fromkeys(texts))
        indices = [unique.index(text) for text in texts]
        measured: dict[str, Any] = {"images": images}
        for name, clip in (("reward", self.reward), ("judge", self.judge)):
            features = torch.cat([clip(part.to(self.device)).cpu() for part in images.split(256)])
            measured[name] = clip_score(features, clip.texts(unique)[indices])
            measured[f"{name}_features"] = features
        measured[FD_FEATURES] = torch.cat([self.tiny(part.to(self.device)).cpu() for part in images.split(256)])
        return measured


def diversity(features: Tensor, texts: Sequence[str]) -> float | None:
    """Return the mean ``1 - cos`` of features over pairs of pictures of one prompt; None where there are no pairs."""
    unit = torch.nn.functional.normalize(features.double(), dim=1)
    distances = [
        1 - float(unit[i] @ unit[j])
        for text in dict.fromkeys(texts)
        for i, j in itertools.combinations([k for k, t in enumerate(texts) if t == text], 2)
    ]
    return round(sum(distances) / len(distances), 4) if distances else None


def as_long_as(seconds: float, bench: Bench, rows: Rows) -> str:
    """Return the plain sampler with as many steps as take ``seconds``, by the time of a step between two numbers."""
    few, many = bench.args.steps, 10 * bench.args.steps
    short, long = (bench.run(f"plain:steps={steps}", rows)["seconds"] for steps in (few, many))
    return f"plain:steps={max(few, round(few + (seconds - short) * (many - few) / (long - short)))}"


def summarise(name: str, measured: dict[str, Any], base: dict[str, Any] | None, texts: list[str]) -> dict[str, Any]:
    """Return a search's row of the record: the table's numbers, and every picture's scores."""
    row: dict[str, Any] = {"name": name, "variant": measured["variant"], "pictures": len(texts)}
    row |= {"date": time.strftime("%Y-%m-%d"), "nfe": round(measured["nfe"], 1)}
    row["seconds"] = round(measured["seconds"], 4)
    row["scores"] = {key: [round(v, 4) for v in measured[key].tolist()] for key in ("reward", "judge")}
    row["reward"] = round(float(measured["reward"].mean()), 3)
    judge = intervals.bootstrap_mean(row["scores"]["judge"], clusters=texts)
    row |= {"judge": round(judge.value, 3), "judge_interval": [round(judge.low, 3), round(judge.high, 3)]}
    row["diversity"] = diversity(measured["judge_features"], texts)
    if base is not None:
        lead = intervals.paired_difference(row["scores"]["judge"], base["scores"]["judge"], clusters=texts)
        row["against"] = base["variant"]
        row["delta"] = [round(v, 3) for v in (lead.interval.value, lead.interval.low, lead.interval.high)]
        row["wins"] = round(lead.wins.value, 3)
    return row


def shown(row: dict[str, Any]) -> str:
    """Return a row as a line of the table."""
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
    table = Table(args, bench)
    compare_searches(args, bench, table)
    if args.fd:
        compare_distances(args, bench, table)


class Table:
    """The record and its printed table: a row is printed and written as soon as it is measured, and never again."""

    def __init__(self, args: argparse.Namespace, bench: Bench) -> None:
        self.bench = bench
        options = {k: v for k, v in vars(args).items() if k not in CHOICES}
        self.values: dict[str, Any] = {
            "options": options, "device": record.describe_device(bench.device), "kind": args.kind,
            "versions": record.versions(), "reward": REWARD, "judge": JUDGE,
            "judge_weights_sha256": bench.judge.weights_sha256, "rows": [],
        }  # fmt: skip
        parts = [Path(args.set).stem] if args.set != PROMPTS else []
        parts += [f"{args.steps}-steps"] if args.steps != STEPS else []
        name = "_".join(["bench_search", args.model, *parts, args.kind or bench.device.type])
        self.file = args.out and args.out / f"{name}.json"
        if self.file and self.file.is_file():
            before = json.loads(self.file.read_text(encoding="utf-8"))
            if before["options"] != json.loads(json.dumps(options)):
                raise SystemExit(f"{self.file} was made with other options. Remove it, or give another --out.")
            if before.get("judge_weights_sha256") != self.values["judge_weights_sha256"]:
                raise SystemExit(f"{self.file} was measured by another judge. Remove it, or give another --out.")
            self.values["rows"] = before["rows"]
        print(HEAD, flush=True)
        for row in self.values["rows"]:
            print(shown(row), flush=True)

    def find(self, **values: str) -> dict[str, Any] | None:
        """Return the first row with these values."""
        return next((r for r in self.values["rows"] if all(r[key] == value for key, value in values.items())), None)

    def row(
        self, name: str, text: str, rows: Rows, base: dict[str, Any] | None, target: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return a search's row, measured unless it is there.

        Args:
            name: of the search.
            text: its variant.
            rows: prompts and seeds of its pictures.
            base: row that it is compared with.
            target: measurements of the pictures that its Fréchet distance is to.
        """
        if (done := self.find(name=name, variant=text)) is not None:
            return done
        measured = self.bench.run(text, rows)
        row = summarise(name, measured, base, [prompt for prompt, _ in rows])
        if target is not None:
            features = measured[FD_FEATURES], target[FD_FEATURES]
            row["fd"] = round(printed_distances.fid(*features)[printed_distances.FD], 4)
            row["kid"] = next(iter(printed_distances.kid(*features).values()))
            row["fd_from"] = f"{self.bench.tiny.key}, to the plain sampler with other seeds, {len(rows)} pictures each"
        self.values["rows"].append(row)
        print(shown(row), flush=True)
        if self.file:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.file, self.values)
        return row


def compare_searches(args: argparse.Namespace, bench: Bench, table: Table) -> None:
    """Compare all searches of a budget with best of N, and the default one with the plain sampler in equal time."""
    rows = bench.rows(args.prompts, args.seeds)
    bench.run(f"bon:budget={2 * args.steps}", rows[: args.batch])  # warm up
    table.row(f"no search, {args.steps} steps", f"plain:steps={args.steps}", rows, None)
    base: dict[str, Any] | None = None
    for name, text in plan(args.budgets, args.only) + [(text, text) for text in args.variants]:
        row = table.row(name, text, rows, None if text.startswith("bon") else base)
        base = row if text.startswith("bon") else base
        if name == DEFAULT:
            done = table.find(name=f"as long as {text}")
            plain = done["variant"] if done else as_long_as(row["seconds"], bench, rows)
            table.row(f"as long as {text}", plain, rows, base)


def compare_distances(args: argparse.Namespace, bench: Bench, table: Table) -> None:
    """Compare Fréchet distances to the plain sampler with other seeds, on ``args.fd`` prompts."""
    rows, other_seeds = bench.rows(args.fd, args.seeds), bench.rows(args.fd, args.seeds, first_seed=1000)
    plain, best_of_n = f"plain:steps={args.steps}", f"bon:budget={args.fd_budget}"
    others = [f"rbf:budget={args.fd_budget}", *args.fd_variants]
    titles = {text: f"{text}, {args.fd} prompts" for text in (plain, best_of_n, *others)}
    if all(table.find(name=title) for title in titles.values()):
        return
    target = bench.run(plain, other_seeds)
    base = table.row(titles[best_of_n], best_of_n, rows, None, target)
    for text in (plain, *others):
        table.row(titles[text], text, rows, base, target)


if __name__ == "__main__":
    main()
