"""The rivals of fashion-unet's students, each within the same seconds, beside them in one table.

    python -m scripts.rivals.fashion --rivals meanflow:0,drifting:0,lcm:0,dmd2:0 --minutes 9 --work WORK --out OUT

``WORK`` is a folder of ``scripts.zoo.fashion.job`` with its classifier and teacher, ``--report`` the ``report.json`` of
its students. A rival is NAME[:SEED]. It tries its learning rates for a share of its seconds each, looks at 5,000
pictures of each, and learns with the best for what is left; ``--lr`` leaves the tries out. The same command goes on
where it was stopped, and skips what is finished. ``rivals.json`` has a row each: distance, ratio, seconds with those of
the tries, turns.
"""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

import torch

from diffaccel.errors import DiffAccelError, unknown
from diffaccel.files import write_json
from diffaccel.training.loop import Deadline
from scripts.rivals import methods
from scripts.rivals import recipe as recipes
from scripts.rivals.bed import Bed, Rival, Try
from scripts.rivals.dmd2 import DMD2
from scripts.rivals.drifting import Drifting
from scripts.rivals.lcm import LCM
from scripts.rivals.meanflow import MeanFlow
from scripts.zoo import stages
from scripts.zoo.emoji.export import training_state
from scripts.zoo.fashion import classifier, data, score, unet
from scripts.zoo.fashion import recipe as fashion_recipes

RIVALS: dict[str, Rival] = {rival.name: rival for rival in (MeanFlow(), Drifting(), LCM(), DMD2())}
STAGES = ("train", "score")
_SCORE_SECONDS = 20  # kept at the end of a call


@dataclass(frozen=True)
class Entry:
    """A rival and its seed."""

    name: str
    seed: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``NAME[:SEED]``, such as "meanflow" or "dmd2:1"."""
        found = re.fullmatch(r"([a-z0-9]+)(?::(\d+))?", text)
        if found is None:
            raise DiffAccelError(f"'{text}' is no rival. Write NAME[:SEED], such as meanflow:1.")
        if found[1] not in RIVALS:
            raise unknown("rival", found[1], RIVALS)
        return cls(found[1], int(found[2] or 0))

    @property
    def label(self) -> str:
        return f"{self.name}-{self.seed}"


class Job:
    """One call: rivals, folders, deadline."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.entries = [Entry.parse(text) for text in options.rivals.split(",")]
        self.work, self.out = options.work, options.out or options.work
        fashion, recipe = fashion_recipes.get(options.recipe), recipes.get(options.recipe)
        device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.backends.cudnn.benchmark = device.type == "cuda"
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.bed = Bed(
            fashion, recipe, data.load(options.data, "train", device), self.work, dtype, partial(print, flush=True)
        )
        self.data, self.report = options.data, options.report or self.work / "report.json"
        self.seconds, self.lr = options.seconds or fashion.student_seconds, options.lr
        self.at_a_time = options.at_a_time
        self.deadline = Deadline(max(60 * options.minutes - _SCORE_SECONDS, 1.0))
        self.out.mkdir(parents=True, exist_ok=True)

    @cached_property
    def scorer(self) -> score.Scorer:
        """What measures drawings, the judge of the work folder."""
        bed = self.bed
        network = classifier.load(self.work, bed.fashion, bed.device)
        if network is None:
            raise DiffAccelError(
                f"'{self.work}' has no classifier. Make it: python -m scripts.zoo.fashion.job --stages classifier."
            )
        test = data.load(self.data, "t10k", bed.device)
        return score.Scorer(network, bed.data, test, bed.fashion.pictures, bed.fashion.drawn_at_once, bed.dtype)

    def _root(self, entry: Entry) -> Path:
        return self.work / "rivals" / entry.label

    def _share(self) -> float:
        """Return the seconds of a try of a learning rate."""
        return self.bed.recipe.trial * self.seconds

    def train(self) -> None:
        """Train every rival, its tries first."""
        for entry in self.entries:
            rival, root = RIVALS[entry.name], self._root(entry)
            if self.deadline.over() or not rival.prepare(self.bed, root, entry.seed, self.deadline):
                self.bed.tell(f"train: no time is left for {entry.label}; run it again")
                return
            one = self._chosen(entry, rival)
            whole = one is not None and rival.train(self.bed, one, self.deadline)
            self.bed.tell(f"train: {entry.label} {'is finished' if whole else 'goes on in the next call'}")
            if not whole:
                return
            (root / "finished").touch()

    def _chosen(self, entry: Entry, rival: Rival) -> Try | None:
        """Return the run of the learning rate that was best, or was asked for; None where no time is left to try."""
        root, file = self._root(entry), self._root(entry) / "chosen.json"
        if not file.is_file():
            root.mkdir(parents=True, exist_ok=True)
            tried = {} if self.lr else self._tried(entry, rival)
            if tried is None:
                return None
            best = self.lr or min(tried, key=lambda rate: tried[rate]["fd"])
            spent = rival.prepared(root) + sum(entry["seconds"] for entry in tried.values())
            write_json(file, {"lr": best, "tuning_seconds": spent, "tried": {str(k): v for k, v in tried.items()}})
        known = json.loads(file.read_text(encoding="utf-8"))
        left = max(self.seconds - known["tuning_seconds"], 1.0)
        return Try(root / "run", entry.seed, known["lr"], left, self.bed.recipe.turns)

    def _tried(self, entry: Entry, rival: Rival) -> dict[float, dict[str, float]] | None:
        """Return distance and seconds of every learning rate; None where the deadline came first."""
        tried = {}
        for rate in self.bed.recipe.rates[entry.name]:
            one = Try(self._root(entry) / f"try-{rate:g}", entry.seed, rate, self._share(), self.bed.recipe.turns)
            if not rival.train(self.bed, one, self.deadline):
                return None
            found = self._score(rival, one, self.bed.recipe.looked)
            tried[rate] = {**found, **rival.spent(one)}
            self.bed.tell(f"{entry.label} lr={rate:g}: {tried[rate]}")
        return tried

    def _score(self, rival: Rival, one: Try, count: int) -> dict[str, float]:
        network = rival.load(self.bed, one)
        if network is None:
            raise DiffAccelError(f"'{one.folder}' has no run; train it first.")
        return self.scorer.score(network, rival.scheduler(self.bed), 1, count)

    def score(self) -> None:
        """Measure what is finished; write ``rivals.json`` and ``rivals.png``, and print the table."""
        of_teacher, report = self._teacher()
        rows: dict[str, Any] = {}
        sheets = []
        for entry in self.entries:
            rival, one = RIVALS[entry.name], None
            if (self._root(entry) / "finished").exists():
                one = self._chosen(entry, rival)
            if one is None:
                continue
            network = rival.load(self.bed, one)
            found: dict[str, Any] = self._score(rival, one, self.bed.fashion.pictures)
            tuning = json.loads((self._root(entry) / "chosen.json").read_text(encoding="utf-8"))
            spent = rival.spent(one)
            rows[entry.label] = {
                **found, "ratio": score.ratio(found["fd"], of_teacher, self.scorer.floor), "lr": one.lr,
                "seconds": round(spent["seconds"] + tuning["tuning_seconds"], 1), "turns": spent["turns"],
                "tuning_seconds": round(tuning["tuning_seconds"], 1), "teacher": rival.needs_teacher,
            }  # fmt: skip
            sheets.append(self.scorer.images(network, rival.scheduler(self.bed), 1, 20)[0])
        if sheets:
            score.sheet(self.out / "rivals.png", sheets)
        made = {
            "device": self._device_name, "at_a_time": self.at_a_time, "pictures": self.bed.fashion.pictures,
            "floor": round(self.scorer.floor, 4),
            "teacher_fd": of_teacher, "teacher_seconds": self._teacher_seconds(), "rivals": rows,
            "students": report.get("students", {}), "teacher": report.get("teacher", {}),
        }  # fmt: skip
        made["methods"] = methods.means(made)
        write_json(self.out / "rivals.json", made)
        self.bed.tell(table(made))
        self.bed.tell(methods.shown(made["methods"], self.at_a_time))

    @property
    def _device_name(self) -> str:
        device = self.bed.device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"

    def _teacher_seconds(self) -> float:
        return round(float(training_state(self.work / f"{unet.NAME}.safetensors")["seconds"]), 1)

    def _teacher(self) -> tuple[float, dict[str, Any]]:
        """Return the teacher's distance, measured once where no report has it, and the report of its students."""
        steps = self.bed.fashion.steps[0]
        report = json.loads(self.report.read_text(encoding="utf-8")) if self.report.is_file() else {}
        if str(steps) in report.get("teacher", {}):
            return float(report["teacher"][str(steps)]["fd"]), report
        file = self.work / "rivals" / "teacher.json"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, self.scorer.score(self.bed.teacher, unet.own_scheduler(), steps))
        return float(json.loads(file.read_text(encoding="utf-8"))["fd"]), report


def table(made: dict[str, Any]) -> str:
    """Return rivals and students in one table, the nearest to the data first."""
    rows = [(name, row, row["teacher"]) for name, row in made["rivals"].items()]
    rows += [(name, {"tuning_seconds": "", **row}, True) for name, row in made["students"].items()]
    rows.sort(key=lambda row: row[1]["fd"])
    header = ("model", "fd", "ratio", "obeyed", "seconds", "of them tuning", "teacher's seconds", "turns")
    lines = [header, *(
        (name, f"{row['fd']:.3f}", f"{row['ratio']}", f"{row['obeyed']:.3f}", f"{row['seconds']}",
         f"{row['tuning_seconds']}", f"{made['teacher_seconds']}" if has_teacher else "none", f"{row['turns']}")
        for name, row, has_teacher in rows
    )]  # fmt: skip
    for steps, row in made["teacher"].items():
        lines.append((f"teacher, {steps} steps", f"{row['fd']:.3f}", "", f"{row['obeyed']:.3f}", "", "",
                      f"{made['teacher_seconds']}", ""))  # fmt: skip
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([f"{made['device']}, {made['pictures']} pictures each, floor {made['floor']}", *text])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    stages.add_options(parser, STAGES)
    parser.add_argument("--recipe", default="full", help="full (a GPU) or tiny (to try the code)")
    parser.add_argument("--rivals", default="meanflow:0,drifting:0,lcm:0,dmd2:0", help="NAME[:SEED], with commas")
    parser.add_argument("--minutes", type=float, required=True, help="of this call")
    parser.add_argument("--data", type=Path, default=Path("data/fashion"), help="folder of scripts.zoo.fashion.fetch")
    parser.add_argument("--report", type=Path, help="report.json of the job's students (default: WORK/report.json)")
    parser.add_argument("--seconds", type=float, help="of each rival, tries included (default: those of a student)")
    parser.add_argument(
        "--at-a-time", type=int, default=1, help="runs that shared the device in training, for the record"
    )
    parser.add_argument("--lr", type=float, help="learning rate, without tries")
    stages.run(Job, parser.parse_args(), STAGES)


if __name__ == "__main__":
    main()
