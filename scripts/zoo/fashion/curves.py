"""Distance against pictures seen: ``sim`` alone, and ``sim`` that begins with a student of trajectories (``tscd``).

    python -m scripts.zoo.fashion.curves --work WORK --out OUT --data data/fashion [--pictures 1000000] [--seeds 0,1]

``WORK`` is a folder of ``scripts.zoo.fashion.job`` with its classifier and its finished teacher. Both ways draw the
same number of pictures from the same seed; of the two stages the first has a quarter. Every N pictures the averaged
network draws in one call, and the distance of what it draws to the training set is kept. The same command goes on where
it was stopped; processes with a seed or a way each may share WORK, and a last call with all of them joins them. OUT
gets ``fashion-curves_KIND.json`` and ``.png``.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import torch

from diffaccel.errors import DiffAccelError, unknown
from diffaccel.files import write_json
from diffaccel.record import describe_device, now, versions
from diffaccel.training.loop import Deadline
from scripts.zoo import turns
from scripts.zoo.fashion import classifier, data, score, students, unet
from scripts.zoo.fashion import recipe as recipes
from scripts.zoo.fashion.students import FIRST, Student

WAYS = ("sim", "tscd-sim")
LABELS = {"sim": "sim alone", "tscd-sim": "tscd, then sim"}
TARGETS = (4.0, 2.0, 1.5, 1.2, 1.0)  # times the least distance that sim alone reaches


class Curves:
    """Both ways of every seed, and what they reached so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.recipe = options, recipes.get(options.recipe)
        self.device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        torch.backends.cudnn.benchmark = self.device.type == "cuda"
        self.deadline = Deadline(60 * options.minutes)
        self.folder = options.work / f"curves-{options.pictures}"
        self.seeds = [int(text) for text in options.seeds.split(",")]
        judge = classifier.load(options.work, self.recipe, self.device)
        teacher = unet.load(options.work, self.recipe, self.device)
        if judge is None or teacher is None or not (options.work / "teacher.finished").exists():
            raise DiffAccelError(
                f"'{options.work}' has no finished teacher with its classifier. Make them: python -m "
                "scripts.zoo.fashion.job --stages classifier,teacher --last, with the same --work."
            )
        self.teacher = teacher
        train, test = (data.load(options.data, part, self.device) for part in ("train", "t10k"))
        drawn = min(options.looked, self.recipe.pictures)
        self.scorer = score.Scorer(judge, train, test, drawn, self.recipe.drawn_at_once, self.dtype)

    def _turns(self, one: Student) -> tuple[int, int]:
        """Return turns of a way's first stage, and of its last."""
        total = max(2, round(self.options.pictures / self.recipe.student_batch))
        first = 0 if one.first is None else max(1, round(FIRST * total))
        return first, total - first

    def train(self) -> bool:
        """Train all ways, or go on with them; return whether they are finished."""
        for one in [Student.parse(f"{way}:{seed}") for seed in self.seeds for way in self.options.ways.split(",")]:
            first, count = self._turns(one)
            for folder, number in ((one.first_folder(self.folder), first), (one.folder(self.folder), count)):
                if number:
                    turns.planned(folder / "turns.json", 1.0, partial(_unmeasured, one), number)
            scheduler = unet.student_scheduler(one.config(self.recipe, count))
            whole = students.distil(
                one, self.teacher, self.recipe, self.folder, count=count, deadline=self.deadline, dtype=self.dtype,
                look=partial(self.scorer.score, scheduler=scheduler, steps=1), every=self.options.every,
                tell=partial(print, flush=True),
            )  # fmt: skip
            print(f"{one.name} {'is finished' if whole else 'goes on in the next call'}", flush=True)
            if not whole:
                return False
        return True

    def record(self) -> dict[str, Any]:
        """Return all curves, and at how many pictures they reach a distance."""
        one = Student.parse("sim")
        begin = self.scorer.score(self.teacher, unet.student_scheduler(one.config(self.recipe, 1)), 1)["fd"]
        curves = {
            str(seed): {way: [[0, begin], *self.curve(Student.parse(f"{way}:{seed}"))] for way in WAYS}
            for seed in self.seeds
        }
        return {
            "command": f"python -m scripts.zoo.fashion.curves --recipe {self.recipe.name} --pictures "
                       f"{self.options.pictures} --every {self.options.every} --seeds {self.options.seeds}",
            "device": describe_device(self.device), "date": now(), "versions": versions(),
            "drawn_of_each": self.scorer.count, "floor": round(self.scorer.floor, 4),
            "classifier_accuracy": round(self.scorer.accuracy, 4), "curves": curves, "reached": reached(curves),
        }  # fmt: skip

    def curve(self, one: Student) -> list[list[float]]:
        """Return pictures seen, of all stages, and the distance then; what a resumed run said twice, once."""
        before, points = 0, {}
        folders = (
            [one.folder(self.folder)] if one.first is None else [one.first_folder(self.folder), one.folder(self.folder)]
        )
        for folder in folders:
            log = folder / "log.jsonl"
            entries = (
                [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()] if log.is_file() else []
            )
            points |= {before + entry["pictures"]: entry["fd"] for entry in entries if "fd" in entry}
            before += self._turns(one)[0] * self.recipe.student_batch
        return [[pictures, fd] for pictures, fd in sorted(points.items())]


def _unmeasured(one: Student, folder: Path) -> Any:
    raise DiffAccelError(f"The turns of {one.name} are given, not measured.")


def reached(curves: dict[str, dict[str, list[list[float]]]]) -> list[dict[str, Any]]:
    """Return, a seed and a target each, the pictures after which each way first was at most there; None for never."""
    rows = []
    for seed, ways in curves.items():
        least = min(fd for _, fd in ways[WAYS[0]])
        for times in TARGETS:
            goal = times * least
            seen = {way: next((n for n, fd in curve if fd <= goal), None) for way, curve in ways.items()}
            rows.append({"seed": int(seed), "fd": round(goal, 4), **seen})
    return rows


def shown(made: dict[str, Any]) -> str:
    """Return the table of targets, and the last point of every curve."""
    lines = [f"{made['device']['name']}, {made['drawn_of_each']} pictures a point, floor {made['floor']}",
             "| seed | distance | pictures, sim alone | tscd, then sim | share |", "|---" * 5 + "|"]  # fmt: skip
    for row in made["reached"]:
        alone, both = (row[way] for way in WAYS)
        share = f"{both / alone:.2f}" if alone and both else ""
        cells = [
            str(row["seed"]),
            f"{row['fd']:.3f}",
            *("never" if n is None else f"{n:.0f}" for n in (alone, both)),
            share,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    for seed, ways in made["curves"].items():
        last = ", ".join(f"{way} {curve[-1][1]:.3f} after {curve[-1][0]:.0f}" for way, curve in ways.items())
        lines.append(f"seed {seed}: {last}")
    return "\n".join(lines)


def plot(file: Path, made: dict[str, Any]) -> None:
    """Draw all curves."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, ways in enumerate(made["curves"].values()):
        for way, colour in zip(WAYS, ("tab:blue", "tab:orange"), strict=True):
            x, y = zip(*ways[way][1:], strict=True) if len(ways[way]) > 1 else ((), ())
            label = LABELS[way] if not number else None
            axes.plot(x, y, color=colour, alpha=1 - 0.4 * (number % 2), marker=".", label=label)
    axes.axhline(made["floor"], color="grey", linestyle=":", label="test set")
    axes.set(yscale="log", xlabel="pictures seen", ylabel="Fréchet distance to the training set, one call")
    axes.legend()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--recipe", default="full", help="full (a GPU) or tiny (to try the code)")
    add("--work", type=Path, required=True, help="folder of the job, with classifier and teacher")
    add("--out", type=Path, required=True)
    add("--data", type=Path, default=Path("data/fashion"), help="folder of scripts.zoo.fashion.fetch")
    add("--pictures", type=int, default=1_000_000, help="that each way draws in training, of all its stages")
    add("--every", type=int, default=50_000, help="pictures between evaluations")
    add("--looked", type=int, default=5000, help="pictures drawn for an evaluation")
    add("--seeds", default="0")
    add("--ways", default=",".join(WAYS), help="to train in this call; the record has both")
    add("--minutes", type=float, default=9.0, help="of this call")
    add("--kind", default="cpu", help="name of the machine, for the record's name")
    add("--device", help="default: cuda if there is one")
    options = parser.parse_args()
    try:
        for way in options.ways.split(","):
            if way not in WAYS:
                raise unknown("way", way, WAYS)
        curves = Curves(options)
        curves.train()
        made = curves.record()
    except DiffAccelError as error:
        raise SystemExit(f"error: {error}") from error
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(options.out / f"fashion-curves_{options.kind}.json", made)
    plot(options.out / f"fashion-curves_{options.kind}.png", made)
    print(shown(made))


if __name__ == "__main__":
    main()
