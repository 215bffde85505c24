"""Compare OR of two models, each trained on half of the classes, with a coin flip between them.

    python -m scripts.bench_superdiff_halves --minutes 8.5 --kind nvidia-h200 --work out/halves --out docs/results

Two unconditional networks of fashion-unet's size learn by flow matching, one from Fashion-MNIST's classes 0 to 4, one
from 5 to 9, for the same seconds. "Coin flip" draws each picture by one of them; ``SuperDiff(op="or")`` draws it by
both. All begin at the same noise and make the same steps with the same kernel. Distances are Fréchet's to the whole
training set, in the features of the classifier of ``scripts.zoo.fashion``. The claim is that OR's distance is at most
5 % above the coin flip's (arXiv 2412.17762, table 1); the 95 % interval of their ratio, over pictures, decides. A
picture is "between" where each half of the classes has a quarter of the classifier's probability or more, and "of no
class" where no class has half of it. The same command trains on, draws on, and measures what is drawn so far.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMPipeline
from safetensors.torch import load_file, save
from torch import Tensor

import diffaccel
from diffaccel import record
from diffaccel.errors import DiffAccelError
from diffaccel.eval.metrics import frechet, frechet_intervals
from diffaccel.eval.uncertainty.intervals import wilson
from diffaccel.files import atomic, write_json
from diffaccel.samplers import SuperDiff
from diffaccel.training.loop import Deadline
from scripts.ends import ends, ends_text
from scripts.zoo.fashion import classifier, data, score, unet
from scripts.zoo.fashion import recipe as recipes

HALVES = {"first": tuple(range(5)), "second": tuple(range(5, 10))}
WAYS = (*HALVES, "or")
MARGIN = 1.05
BETWEEN, NO_CLASS = 0.25, 0.5
SHOWN = 20  # pictures of each way in the sheet
_SEED = 1_000_003  # of noise; the chunks of a way follow it


class Bench:
    """The classifier, two networks, and what they drew so far.

    Attributes:
        config: of OR; the same of a single network is that network's own sampler.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.recipe = args, recipes.get(args.recipe)
        self.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.backends.cudnn.benchmark = self.device.type == "cuda"
        self.deadline = Deadline(60 * args.minutes)
        self.training = data.load(args.data, "train", self.device)
        pixels = data.padded(self.training.images)
        self.config = SuperDiff(op="or", data_std=float(pixels.var(0, correction=0).mean().sqrt()))
        args.work.mkdir(parents=True, exist_ok=True)

    def train(self) -> bool:
        """Train classifier and networks, or go on with them; return whether all are finished."""
        plan = self.recipe.teacher
        plan = replace(plan, seconds=self.args.seconds, samples=math.inf) if self.args.seconds else plan
        recipe = replace(self.recipe, empty=1.0)  # no picture keeps its label
        finished = classifier.train(self.training, recipe, self.args.work, deadline=self.deadline).finished
        for number, (name, classes) in enumerate(HALVES.items()):
            mark = self.args.work / name / "finished"
            if mark.exists():
                continue
            part = data.of_classes(self.training, classes)
            run = unet.train(part, recipe, plan, mark.parent, deadline=self.deadline, seed=number + 1)
            finished &= run.finished
            if run.finished:
                mark.touch()
        return finished

    @cached_property
    def judge(self) -> classifier.Classifier:
        """The classifier."""
        network = classifier.load(self.args.work, self.recipe, self.device)
        if network is None:
            raise DiffAccelError(f"'{self.args.work}' has no classifier yet. Run the same command again.")
        return network

    @cached_property
    def pipes(self) -> dict[str, DDPMPipeline]:
        """A pipeline of each network."""
        made = {}
        for name in HALVES:
            network = unet.load(self.args.work / name, self.recipe, self.device)
            if network is None:
                raise DiffAccelError(f"'{self.args.work / name}' has no network yet. Run the same command again.")
            made[name] = DDPMPipeline(unet.without_labels(network), unet.own_scheduler()).to(self.device)
            made[name].set_progress_bar_config(disable=True)
        return made

    def draw(self) -> bool:
        """Draw what is missing, all ways in turn; return whether all is there."""
        at_once = self.recipe.drawn_at_once
        for number in range(-(-self.args.pictures // at_once)):
            for way in WAYS:
                if self.file(way, number).is_file():
                    continue
                if self.deadline.over():
                    return False
                self._draw(way, number, at_once)
        return True

    def file(self, way: str, number: int) -> Path:
        """Return where a chunk of a way is kept."""
        return self.args.work / f"drawn_{self.args.steps}" / f"{way}_{number:03}.safetensors"

    def _draw(self, way: str, number: int, count: int) -> None:
        images, kappa = drawn([self.pipes[name] for name in HALVES if way in (name, "or")], self.config, count,
                              self.args.steps, _SEED + number)  # fmt: skip
        features, shares = look(self.judge, images)
        kept = {"features": features, "shares": shares, "images": images[:SHOWN].cpu(), "kappa": kappa[-1]}
        if way == "or":
            kept["decided"] = (kappa.max(2).values > 0.99).double().mean(0).float()  # share of steps, a picture
        self.file(way, number).parent.mkdir(exist_ok=True)
        with atomic(self.file(way, number)) as target:
            target.write(save({name: value.contiguous() for name, value in kept.items()}))

    def found(self) -> dict[str, dict[str, Tensor]]:
        """Return what all ways drew of the same numbers."""
        parts: dict[str, list[dict[str, Tensor]]] = {way: [] for way in WAYS}
        number = 0
        while all(self.file(way, number).is_file() for way in WAYS):
            for way in WAYS:
                parts[way].append(load_file(self.file(way, number)))
            number += 1
        return {
            way: {key: torch.cat([part[key] for part in chunks]) for key in chunks[0]}
            for way, chunks in parts.items()
            if chunks
        }


def drawn(pipes: list[DDPMPipeline], config: SuperDiff, count: int, steps: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw pictures of one network, or of both by OR.

    Returns:
        Images ``(N, 28, 28)`` of 8 bits, and the weight of each network at every step, ``(steps, N, M)``.
    """
    pipe = pipes[0]
    diffaccel.accelerate(pipes if len(pipes) > 1 else pipe, config)
    try:
        generator = torch.Generator(pipe.device).manual_seed(seed)
        images = pipe(batch_size=count, generator=generator, num_inference_steps=steps, output_type="pt").images
        run = diffaccel.summary(pipe).last_run or {}
    finally:
        diffaccel.remove(pipe)
    kappa = torch.tensor(run["report"]["superdiff"]["kappa"], dtype=torch.float32, device="cpu")
    return data.to_images(2 * images - 1), kappa[:, 0]


@torch.no_grad()
def look(network: classifier.Classifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return features ``(N, d)`` and probabilities of the classes ``(N, 10)`` of images of 8 bits, on the CPU."""
    features = torch.cat([network.features(data.to_unit(part)) for part in images.split(2000)])
    return features.cpu(), network.head(features).softmax(1).cpu()


def flipped(ways: dict[str, dict[str, Tensor]]) -> tuple[dict[str, Tensor], Tensor]:
    """Return the rows of a coin flip between both networks, and which of them drew each (True for the second)."""
    first, second = (ways[name] for name in HALVES)
    count = len(first["shares"])
    coin = torch.rand(count, generator=torch.Generator("cpu").manual_seed(0), device="cpu") < 0.5
    return {key: torch.where(coin[:, None], second[key], first[key]) for key in ("features", "shares")}, coin


def row(rows: dict[str, Tensor], reference: frechet.Moments, asked: Tensor | None = None) -> dict[str, Any]:
    """Return the numbers of a set of pictures, with 95 % intervals.

    Args:
        asked: which network was to draw each, True for the second.
    """
    halves = rows["shares"][:, :5].sum(1)
    count = len(halves)

    def share(flags: Tensor) -> list[float]:
        return ends(wilson(float(flags.sum()), count))

    made: dict[str, Any] = {
        "pictures": count,
        "fd": ends(frechet_intervals.distance_interval(rows["features"], reference)),
        "first half": share(halves > 0.5),
        "between": share(torch.minimum(halves, 1 - halves) >= BETWEEN),
        "no class": share(rows["shares"].max(1).values < NO_CLASS),
    }
    if asked is not None:
        made["as asked"] = share((halves < 0.5) == asked)
    return made


def measured(bench: Bench) -> dict[str, Any]:
    """Return the record of what is drawn so far: a row a way, and the ratio that decides."""
    reference_features, _ = look(bench.judge, bench.training.images)
    reference = frechet.Moments.of(reference_features)
    test = data.load(bench.args.data, "t10k", bench.device)
    of_test = dict(zip(("features", "shares"), look(bench.judge, test.images), strict=True))
    ways = bench.found()
    rows = {"test set": row(of_test, reference)}
    made: dict[str, Any] = {
        "accuracy": float((of_test["shares"].argmax(1) == test.labels.cpu()).double().mean()),
        "data_std": bench.config.data_std, "rows": rows,
    }  # fmt: skip
    if not ways:
        return made
    coin, asked = flipped(ways)
    for number, name in enumerate(HALVES):
        rows[f"{name} half's model"] = row(ways[name], reference, torch.full_like(asked, bool(number)))
    rows["coin flip"] = row(coin, reference, asked)
    either = ways["or"]
    rows["or"] = row(either, reference, either["kappa"].argmax(1) == 1)
    made["decided"] = float(either["decided"].mean())
    made["ratio"] = ends(frechet_intervals.ratio(either["features"], coin["features"], reference))
    made["verdict"] = verdict(made["ratio"])
    return made


def verdict(ratio: list[float]) -> str:
    """Return what the interval of the ratio says of the claim."""
    _, low, high = ratio
    return "held" if high <= MARGIN else "missed" if low > MARGIN else "open"


HEAD = (
    "| pictures of | number | distance to all classes | of the first half | between halves | of no class | as asked |\n"
    + "|---" * 7
    + "|"
)


def shown(name: str, entry: dict[str, Any]) -> str:
    """Return a row of the table as text."""

    def percent(values: list[float] | None) -> str:
        return "" if values is None else f"{ends_text(values, 100)} %"

    fd = "{:.4f} ({:.4f} to {:.4f})".format(*entry["fd"])
    shares = [percent(entry.get(key)) for key in ("first half", "between", "no class", "as asked")]
    return "| " + " | ".join([name, str(entry["pictures"]), fd, *shares]) + " |"


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--recipe", default="full", help="full (a GPU) or tiny (to try the code)")
    add("--data", type=Path, default=Path("data/fashion"), help="folder of scripts.zoo.fashion.fetch")
    add("--work", type=Path, default=Path("out/halves"), help="checkpoints and drawings; kept from call to call")
    add("--minutes", type=float, default=8.5, help="of training and drawing in this call")
    add("--seconds", type=float, default=None, help="of training of each network (default: the recipe's teacher's)")
    add("--steps", type=int, default=100)
    add("--pictures", type=int, default=50_000, help="of each way, up to a whole number of batches")
    add("--device", default=None)
    add("--kind", default=None, help="name of the machine, for the record")
    add("--out", type=Path, default=None, help="folder for the record (default: the work folder)")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Train, draw, measure, or go on with it; print the table."""
    args = make_parser().parse_args(arguments)
    try:
        bench = Bench(args)
        if not bench.train():
            print("training goes on in the next call", flush=True)
            return
        whole = bench.draw()
        made = measured(bench)
    except DiffAccelError as error:
        raise SystemExit(f"error: {error}") from error
    out = args.out or args.work
    out.mkdir(parents=True, exist_ok=True)
    options = {key: getattr(args, key) for key in ("recipe", "seconds", "steps", "pictures")}
    write_json(out / f"bench_superdiff_halves_{args.kind or bench.device.type}.json", {
        "options": options, "finished": whole, "device": record.describe_device(bench.device),
        "versions": record.versions(), "kind": args.kind, "date": time.strftime("%Y-%m-%d"), **made,
    })  # fmt: skip
    print(HEAD)
    for name, entry in made["rows"].items():
        print(shown(name, entry))
    if "ratio" in made:
        score.sheet(args.work / "sheet.png", [part["images"] for part in bench.found().values()], SHOWN)
        decided = 100 * made["decided"]
        ratio = "{:.4f} ({:.4f} to {:.4f})".format(*made["ratio"])
        print(f"or / coin flip: {ratio}, at most {MARGIN}: {made['verdict']}")
        print(f"one network has 99 % of or's weight in {decided:.0f} % of the steps")
    print(json.dumps({"finished": whole, "classifier accuracy": made["accuracy"]}))


if __name__ == "__main__":
    main()
