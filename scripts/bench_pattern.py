"""Choose patterns of real steps by a held-out judge: which steps of which stage may be skipped on a model that draws.

    python -m scripts.bench_pattern --kind nvidia-h200 --out docs/results

Candidates for a large model are listed beforehand, the fastest first. Their pictures on ``emoji-flux`` are judged
against those of as many plain steps, prompt by prompt; the first one that surely loses no more than ``--most`` per cent
of the judge's score, by the end of its 95 % interval, is chosen. Its loss is then measured again on prompts that had no
part in the choice. Models are searched one by one: a record of the same options keeps the others. Then
``scripts.bench_stages --pattern FILE`` replays the pattern on the large model: with the same steps, at the same scales,
with the same real steps.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import diffaccel
from diffaccel import record
from diffaccel.eval.uncertainty.intervals import paired_difference
from diffaccel.files import write_json
from diffaccel.runs.variant import parse
from scripts import bench_equal_seconds, stage_patterns
from scripts.earlier import earlier

MOST = 2.5  # per cent of the judge's score
PLAIN = bench_equal_seconds.PLAIN
_STAGES = "bottleneck.preset=speed,bottleneck.scales={},bottleneck.switches={}"
_FORECAST = "bottleneck+spectrum:steps=50," + _STAGES + ",spectrum.warmup={},spectrum.growth={}"
_FEW = "bottleneck+taylorseer:steps=8,{},taylorseer.real_steps={}"
TWO, THREE = "[0.5,1.0]", "[0.5,0.75,1.0]"
_LIFTED = "bottleneck.preset=selflift-zero,bottleneck.switches=[0.75]"
# by large model, the fastest first: stages end where SPEED's rule ends them on that model, or sooner
CANDIDATES = {
    "flux": (
        _FORECAST.format(TWO, "[0.56]", 2, 1.5), _FORECAST.format(TWO, "[0.56]", 2, 0.75),
        _FORECAST.format(THREE, "[0.56,0.68]", 2, 0.75), _FORECAST.format(TWO, "[0.3]", 2, 0.75),
        "euler+spectrum:steps=50",
    ),
    "wan": (
        _FORECAST.format(THREE, "[0.66,0.78]", 2, 0.75), _FORECAST.format(THREE, "[0.46,0.6]", 2, 0.75),
        _FORECAST.format(THREE, "[0.46,0.6]", 3, 0.5), "euler+spectrum:steps=50,spectrum.growth=1.5",
        "euler+spectrum:steps=50",
    ),
    "flux-8-steps": (
        _FEW.format(_STAGES.format(TWO, "[0.75]"), "[0,1,3,5,0,1]"), _FEW.format(_LIFTED, "[0,1,3,5,0,1]"),
        _FEW.format(_STAGES.format(TWO, "[0.5]"), "[0,1,3,0,1,3]"),
        "bottleneck:steps=8,preset=speed,switches=[0.75]", "bottleneck:steps=8,preset=selflift-zero,switches=[0.75]",
    ),
    "small": (
        "bottleneck+spectrum:steps=12,bottleneck.preset=speed,bottleneck.switches=[0.5],spectrum.warmup=2",
        "euler+spectrum:steps=12,spectrum.warmup=2",
    ),
}  # fmt: skip


class Judged:
    """Rows of variants on one set of prompts; the plain steps are drawn once for each number."""

    def __init__(self, bench: bench_equal_seconds.Bench, texts: list[str]) -> None:
        self.bench, self.texts, self.rows = bench, texts, dict[str, dict[str, Any]]()

    def row(self, text: str) -> dict[str, Any]:
        """Return the scores of a variant, picture by picture."""
        if text not in self.rows:
            self.bench.texts, self.bench.base = self.texts, None
            self.rows[text] = self.bench.measure(text)
        return self.rows[text]

    def loss(self, text: str, steps: int) -> dict[str, Any]:
        """Return what a variant loses of the judge's score of plain steps, in per cent, with its interval."""
        return loss_of(self.row(text)["judge"], self.row(PLAIN.format(steps))["judge"])


def loss_of(own: list[float], plain: list[float]) -> dict[str, Any]:
    """Return ``100 mean(plain - own) / mean(plain)`` with its 95 % interval over prompts."""
    lead = paired_difference(plain, own).interval
    scale = 100 * len(plain) / sum(plain)
    return {"loss": scale * lead.value, "low": scale * lead.low, "high": scale * lead.high, "pictures": len(own)}


def chosen_of(candidates: list[dict[str, Any]], most: float) -> dict[str, Any] | None:
    """Return the first candidate whose loss surely is at most ``most`` per cent; None where there is none."""
    return next((entry for entry in candidates if entry["high"] <= most), None)


def pattern_of(bench: bench_equal_seconds.Bench, text: str) -> str:
    """Return the word of a candidate with the real steps that its cache has on the model's first pictures."""
    variant = parse(text)
    diffaccel.accelerate(bench.pipe, *variant.of(bench.request).methods)
    try:
        bench.call(text, 0)
        caches = diffaccel.summary(bench.pipe).last_run["caches"]
    finally:
        diffaccel.remove(bench.pipe)
    return stage_patterns.told(variant, caches).name


def search(target: str, judged: Judged, others: Judged, most: float) -> dict[str, Any]:
    """Judge the candidates of a large model from the fastest on, up to the first that passes, and measure it again."""
    tried: list[dict[str, Any]] = []
    for text in CANDIDATES[target]:
        judged.bench.texts = judged.texts
        pattern = parse(pattern_of(judged.bench, text))
        steps = pattern.call["steps"]
        stages = stage_patterns.described(pattern)
        tried.append({"candidate": text, "variant": pattern.name, "stages": stages, **judged.loss(pattern.name, steps)})
        print(shown(target, tried[-1]), flush=True)
        if chosen_of(tried, most):
            break
    chosen = chosen_of(tried, most)
    if chosen:
        steps = parse(chosen["variant"]).call["steps"]
        held_out = others.loss(chosen["variant"], steps)
        if steps != 50:  # a few-step model is compared with its own steps; what 50 would add is told beside it
            held_out["of_50_steps"] = others.loss(chosen["variant"], 50)
        chosen = {**chosen, "held_out": held_out, "holds": held_out["high"] <= most}
        print(shown(f"{target}, other prompts", {**chosen, **held_out}), flush=True)
    return {"tried": tried, "chosen": chosen}


def shown(head: str, entry: dict[str, Any]) -> str:
    """Return a line of a judged pattern."""
    stages = ", ".join(f"{len(stage['real'])} of {stage['steps']} at {stage['scale']:g}" for stage in entry["stages"])
    ends = f"{entry['loss']:+.2f} % ({entry['low']:+.2f} to {entry['high']:+.2f})"
    return f"| {head} | {entry['candidate']} | {stages} | {ends} | {entry['pictures']} |"


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the options; further ones are those of ``scripts.bench_equal_seconds``."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--targets", nargs="+", choices=sorted(CANDIDATES), default=["flux", "wan", "flux-8-steps"])
    add("--most", type=float, default=MOST, help="per cent of the judge's score that may be lost")
    add("--choose", type=int, default=500, help="prompts to choose by; the others of --count measure the choice again")
    add("--kind", default=None, help="name of the machine, for the record")
    add("--out", type=Path, default=Path("docs/results"))
    return parser


def main(argv: list[str] | None = None) -> int:
    """Choose, measure again, write the record; return 1 where a target has no pattern that holds."""
    args, rest = make_parser().parse_known_args(argv)
    bench = bench_equal_seconds.Bench(bench_equal_seconds.make_parser().parse_args(rest))
    texts = bench.texts
    judged, others = Judged(bench, texts[: args.choose]), Judged(bench, texts[args.choose :])
    if min(len(judged.texts), len(others.texts)) < 2:
        sys.exit(f"--choose {args.choose} of {len(texts)} prompts leaves too few on one side; each needs 2 or more.")
    values: dict[str, Any] = {
        "options": {k: v for k, v in vars(bench.args).items() if k not in bench_equal_seconds.CHOICES},
        "most": args.most, "choose": args.choose, "kind": args.kind, "device": record.describe_device(bench.device),
        "versions": record.versions(), "judge": bench_equal_seconds.JUDGE,
        "judge_weights_sha256": bench.judge.weights_sha256, "date": time.strftime("%Y-%m-%d"), "targets": {},
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"bench_pattern_{bench.args.model}_{args.kind or 'cpu'}.json"
    same = ("options", "most", "choose", "versions", "judge_weights_sha256")
    values["targets"] = earlier(file, values, same).get("targets", {})
    print("| model | candidate | real steps | loss of the judge | pictures |\n|---|---|---|---|---|", flush=True)
    for target in args.targets:
        values["targets"][target] = search(target, judged, others, args.most)
        write_json(file, values)
    found = [values["targets"][target]["chosen"] for target in args.targets]
    return int(not all(chosen and chosen["holds"] for chosen in found))


if __name__ == "__main__":
    sys.exit(main())
