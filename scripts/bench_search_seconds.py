"""Compare searches at equal seconds: best of N, the default search, drafts, and drafts as published.

    python -m scripts.bench_search_seconds --set PROMPTS.jsonl --prompts 3000 --kind nvidia-h200 --out out/main

Seconds are of whole calls, decoding, scoring and judging included. On prompts of their own (``--choose`` of them, which
come after the others in the set) every budget is fitted until a call takes ``--seconds`` a picture, and of the variants
given by ``--drafts`` and ``--searches`` the one is taken that the judge likes best; no search ever sees the judge. Then
the prompts are drawn in parts of one call. Inside a part the methods take turns, in another order in every part. A part
is written as soon as it is measured, and the same command goes on after a stop; several machines may make parts of
their own (``--parts 0:10``) in one folder, and ``--table`` joins what is there.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

import diffaccel
from diffaccel import record
from diffaccel.errors import DiffAccelError
from diffaccel.eval.comparison import printed_distances
from diffaccel.eval.uncertainty import intervals
from diffaccel.files import atomic, write_json
from diffaccel.runs.call_arguments import call_arguments
from diffaccel.runs.variant import parse
from scripts.bench_search import FD_FEATURES, JUDGE, REWARD, Bench, Rows, diversity, rows_of

BEST_OF_N, SEARCH, DRAFTS, PAPER = "best of N", "default search", "drafts", "drafts as published"
TARGET = "plain, other seeds"  # whose pictures Fréchet distances are to
FIXED = {BEST_OF_N: ["bon:budget={budget:.0f}"], PAPER: ["drafts:preset=paper,seconds={budget:.4f}"]}
DRAFT_VARIANTS = [
    "drafts:seconds={budget:.4f}",
    "drafts:seconds={budget:.4f},draft=steps:3",
    "drafts:seconds={budget:.4f},draft=(taylorseer:interval=2,warmup=2)",
    "drafts:seconds={budget:.4f},draft=(bottleneck:preset=speed,tolerance=0.05)",
    "drafts:seconds={budget:.4f},draft=steps:4,preview=linear",
]
SEARCH_VARIANTS = ["rbf:budget={budget:.0f}", "rbf:budget={budget:.0f},score_from=0.4,initial=0"]
SEED = 50_000  # of the pictures of other seeds


class Timed(Bench):
    """The bench with configs that are kept, so that a call pays for no network that an earlier one loaded."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__(args)
        self.requests: dict[str, Any] = {}

    def draw(self, text: str, rows: Rows) -> tuple[Tensor, float, dict[str, Any]]:
        """Draw one call by a variant; return its pictures, the seconds of each, and what the run cost."""
        if text not in self.requests:
            self.requests[text] = parse(text).of(self.request)
        request = self.requests[text]
        arguments = call_arguments(self.pipe, request)
        arguments["negative_prompt"] = [arguments.get("negative_prompt") or ""] * len(rows)
        generators = [torch.Generator().manual_seed(seed) for _, seed in rows]
        if request.methods:
            diffaccel.accelerate(self.pipe, *request.methods)
        try:
            self._wait()
            start = time.perf_counter()
            images = self.pipe([p for p, _ in rows], generator=generators, output_type="pt", **arguments).images
            self._wait()
            seconds = (time.perf_counter() - start) / len(rows)
            cost = diffaccel.summary(self.pipe).last_run or {}
        finally:
            diffaccel.remove(self.pipe)
        return (images.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu(), seconds, cost

    def fitted(self, template: str, rows: Rows) -> tuple[str, float]:
        """Return a variant whose calls take ``--seconds`` a picture, and what they took last.

        The budget changes in proportion to the seconds that are missing. The longest call within them is taken, at 2 %
        of tolerance; where none is, the shortest.
        """
        wanted = self.args.seconds
        is_seconds = "seconds={budget" in template
        budget = wanted if is_seconds else 5.0 * self.args.steps
        tried: list[tuple[str, float]] = []
        self.draw(template.format(budget=budget), rows)  # loads what it needs
        for _ in range(self.args.tries):
            text = template.format(budget=budget)
            if is_seconds:
                self.draw(text, rows)  # drafts measure their rounds in the first call of a config
            seconds = self.draw(text, rows)[1]
            tried.append((text, seconds))
            if abs(seconds / wanted - 1) < 0.02:
                break
            budget *= wanted / seconds
        within = [row for row in tried if row[1] <= wanted * 1.02]
        return max(within, key=lambda row: row[1]) if within else min(tried, key=lambda row: row[1])

    def tried(self, template: str, rows: Rows) -> dict[str, Any]:
        """Return what a variant fitted to the seconds takes and what the judge says of its pictures."""
        parts = [rows[i : i + self.args.batch] for i in range(0, len(rows), self.args.batch)]
        try:
            text, seconds = self.fitted(template, parts[0])
        except DiffAccelError as error:  # such as a budget below one round
            return {"left out": str(error)}
        scores = self.measure(torch.cat([self.draw(text, part)[0] for part in parts]), rows)
        means = {key: round(float(scores[key].mean()), 3) for key in ("judge", "reward")}
        return {"variant": text, "seconds": round(seconds, 4), **means}

    def choose(self, rows: Rows, variants: dict[str, list[str]], file: Path) -> dict[str, dict[str, Any]]:
        """Return for every method the variant whose pictures the judge likes best, all fitted to the seconds.

        What is tried is written as it is known, and not tried again.
        """
        known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        chosen = {}
        for name, templates in variants.items():
            for template in templates:
                if template not in known:
                    known[template] = self.tried(template, rows)
                    write_json(file, known)
                print(f"on {len(rows)} other prompts: {name}: {template}: {known[template]}", flush=True)
            found = [known[template] for template in templates if "judge" in known[template]]
            if not found:
                raise SystemExit(f"No variant of '{name}' runs in {self.args.seconds:g} s a picture. Raise --seconds.")
            chosen[name] = {**max(found, key=lambda row: row["judge"]), "tried": found}
        return chosen

    def part(self, number: int, rows: Rows, variants: dict[str, str]) -> dict[str, Any]:
        """Draw one part by every method in turn, the first of them another one in every part."""
        names = list(variants)
        turn = number % len(names)
        values: dict[str, Any] = {"part": number, "texts": [text for text, _ in rows], "rows": {}}
        tensors: dict[str, Tensor] = {}
        for name in names[turn:] + names[:turn]:
            images, seconds, cost = self.draw(variants[name], rows)
            measured = self.measure(images, rows)
            report = cost.get("report", {})
            pictures = report.get("search", {}).get("pictures", [])  # whose NFE leave out what a cache stood in for
            values["rows"][name] = {
                "seconds": seconds, "nfe": sum(p["nfe"] for p in pictures) / len(rows),
                "parts": report.get("search_seconds"),
                **{key: [round(v, 4) for v in measured[key].tolist()] for key in ("reward", "judge")},
            }  # fmt: skip
            tensors |= {
                name: measured[FD_FEATURES].contiguous(),
                f"{name}/judge": measured["judge_features"].contiguous(),
            }
        other = [(text, SEED + seed) for text, seed in rows]
        images = self.draw(f"plain:steps={self.args.steps}", other)[0]
        tensors[TARGET] = self.measure(images, other)[FD_FEATURES].contiguous()
        return values | {"tensors": tensors}


def write_part(folder: Path, values: dict[str, Any]) -> None:
    """Write a part: features first, then the scores that say it is there."""
    folder.mkdir(parents=True, exist_ok=True)
    number, tensors = values["part"], values.pop("tensors")
    with atomic(folder / f"part-{number:04d}.safetensors") as file:
        file.write(save(tensors))
    write_json(folder / f"part-{number:04d}.json", values)


def joined(folder: Path) -> dict[str, Any]:
    """Return the record of all parts in a folder: every method's means, its leads with intervals, and its distances."""
    values = json.loads((folder / "options.json").read_text(encoding="utf-8"))
    files = sorted(folder.glob("part-*.json"))
    if not files:
        raise SystemExit(f"'{folder}' has no part yet. Run the command without --table.")
    parts = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    features = [load_file(file.with_suffix(".safetensors")) for file in files]
    texts = [text for part in parts for text in part["texts"]]
    target = torch.cat([tensors[TARGET] for tensors in features])
    scores = {
        name: [score for part in parts for score in part["rows"][name]["judge"]] for name in parts[0]["rows"]
    }  # fmt: skip
    rows = []
    for name in parts[0]["rows"]:
        own = [part["rows"][name] for part in parts]
        weights = [len(part["texts"]) / len(texts) for part in parts]
        row: dict[str, Any] = {"name": name, "variant": values["chosen"][name]["variant"], "pictures": len(texts)}
        for key in ("seconds", "nfe"):
            row[key] = round(sum(w * r[key] for w, r in zip(weights, own, strict=True)), 4)
        row["reward"] = round(sum(v for r in own for v in r["reward"]) / len(texts), 3)
        judge = intervals.bootstrap_mean(scores[name], clusters=texts)
        row["judge"] = [round(v, 3) for v in (judge.value, judge.low, judge.high)]
        for rival in (BEST_OF_N, PAPER):
            lead = intervals.paired_difference(scores[name], scores[rival], clusters=texts).interval
            row[f"against {rival}"] = (
                [round(v, 3) for v in (lead.value, lead.low, lead.high)] if name != rival else None
            )
        told = [r["parts"] for r in own if r["parts"]]
        if told:
            whole = sum(t["whole"] for t in told)
            row["share"] = {part: round(sum(t[part] for t in told) / whole, 3) for part in told[0] if part != "whole"}
        row["diversity"] = diversity(torch.cat([tensors[f"{name}/judge"] for tensors in features]), texts)
        if len(texts) > target.shape[1]:  # a covariance needs more pictures than features
            drawn = torch.cat([tensors[name] for tensors in features])
            row["fd"] = round(printed_distances.fid(drawn, target)[printed_distances.FD], 4)
        rows.append(row)
    return {**values, "parts": len(parts), "rows": rows}


HEAD = "| method | s a picture | NFE | reward | judge | against best of N | against the published | scoring | FD |\n"
HEAD += "|---" * 9 + "|"


def shown(row: dict[str, Any]) -> str:
    """Return a row of the record as a line of the table."""
    leads = [row[f"against {rival}"] for rival in (BEST_OF_N, PAPER)]
    cells = [
        row["name"],
        f"{row['seconds']:.3f}",
        f"{row['nfe']:.0f}",
        f"{row['reward']:.2f}",
        f"{row['judge'][0]:.2f}",
    ]
    cells += ["" if lead is None else "{:+.2f} ({:+.2f} to {:+.2f})".format(*lead) for lead in leads]
    share = row.get("share")
    cells += [
        "" if share is None else f"{share['decode'] + share['reward']:.0%}",
        f"{row['fd']:.3g}" if "fd" in row else "",
    ]
    return "| " + " | ".join(cells) + " |"


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="emoji-flux")
    add("--set", default="emoji-1000", help="prompt set, or a file of prompts with categories")
    add("--prompts", type=int, default=300, help="prompts of the table, from the beginning of the set")
    add("--choose", type=int, default=48, help="prompts after them on which budgets are fitted and variants chosen")
    add("--choose-set", default=None, help="another set, from whose beginning these are taken instead")
    add("--tries", type=int, default=3, help="of fitting a budget to the seconds")
    add("--seeds", type=int, default=1)
    add("--seconds", type=float, default=0.15, help="of a picture")
    add("--steps", type=int, default=8)
    add("--size", type=int, default=128)
    add("--batch", type=int, default=144, help="pictures of a call, which is a part")
    add("--drafts", nargs="+", default=DRAFT_VARIANTS, help="variants of drafts, with {budget:.4f}")
    add("--searches", nargs="+", default=SEARCH_VARIANTS, help="variants of searches, with {budget:.0f}")
    add("--parts", default="", metavar="FROM:TO", help="which parts this process makes; all without it")
    add("--table", action="store_true", help="join the parts that are there, and measure nothing")
    add("--device", default="auto")
    add("--dtype", default="auto")
    add("--kind", default=None, help="name of the machine, for the record")
    add("--out", type=Path, required=True, help="folder of the parts and the record")
    return parser


def main() -> None:
    """Choose, draw part by part, join, print."""
    args = make_parser().parse_args()
    if not args.table:
        measure(args)
    values = joined(args.out)
    write_json(args.out / f"bench_search_seconds_{args.model}_{args.kind or 'cpu'}.json", values)
    print(HEAD)
    for row in values["rows"]:
        print(shown(row))


def other_rows(args: argparse.Namespace) -> Rows:
    """Return the prompts on which budgets are fitted and variants chosen, none of which the table has."""
    if args.choose_set is None:
        return rows_of(args.set, args.prompts, args.choose, 1)
    table = {text for text, _ in rows_of(args.set, 0, args.prompts, 1)}
    rows = rows_of(args.choose_set, 0, args.choose, 1)
    shared = [text for text, _ in rows if text in table]
    if shared:
        raise SystemExit(
            f"'{shared[0]}' is in --choose-set and among the {args.prompts} prompts of --set. Give others."
        )
    return rows


def measure(args: argparse.Namespace) -> None:
    """Make the parts that are missing."""
    bench = Timed(args)
    bench.args.skip = 0
    options = {k: v for k, v in vars(args).items() if k not in ("out", "parts", "table", "kind", "skip")}
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / "options.json"
    if file.is_file():
        values = json.loads(file.read_text(encoding="utf-8"))
        if values["options"] != json.loads(json.dumps(options)):
            raise SystemExit(f"'{args.out}' was made with other options. Give another --out.")
    else:
        variants = {**FIXED, SEARCH: args.searches, DRAFTS: args.drafts}
        values = {
            "options": options, "kind": args.kind, "device": record.describe_device(bench.device), "judge": JUDGE,
            "judge_weights_sha256": bench.judge.weights_sha256,
            "versions": record.versions(), "reward": REWARD, "date": time.strftime("%Y-%m-%d"),
            "chosen": bench.choose(other_rows(args), variants, args.out / "tried.json"),
        }  # fmt: skip
        write_json(file, values)
    chosen = {name: row["variant"] for name, row in values["chosen"].items()}
    rows = rows_of(args.set, 0, args.prompts, args.seeds)
    parts = [rows[begin : begin + args.batch] for begin in range(0, len(rows), args.batch)]
    first, _, last = args.parts.partition(":")
    numbers = range(int(first or 0), min(int(last or len(parts)), len(parts)))
    missing = [number for number in numbers if not (args.out / f"part-{number:04d}.json").is_file()]
    if missing:
        for text in chosen.values():  # what is loaded or measured once
            bench.draw(text, parts[missing[0]])
    for number in missing:
        write_part(args.out, bench.part(number, parts[number], chosen))
        print(f"part {number + 1} of {len(parts)}", flush=True)


if __name__ == "__main__":
    main()
