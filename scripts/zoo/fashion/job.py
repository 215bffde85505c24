"""One call of a training machine for fashion-unet: its classifier, its teacher, its students, their numbers.

    python -m scripts.zoo.fashion.job --recipe full --minutes 9 --data data/fashion --work WORK --out OUT [--last]

``data/fashion`` (31 MB) is what ``scripts.zoo.fashion.fetch`` makes; no network is used. The same command goes on where
it was killed or ran out of time, and skips what is finished. ``--students sim:0,sim:1,sid:0,dmd:0,simx2:0`` names
students as PRESET[xSTEPS[-last]][:SEED]; ``tscd:0`` is one of trajectories, and ``tscd-sim:0`` goes on from such a one,
which gets a quarter of its seconds. ``--last`` ends the teacher's schedule with this call, or plans the students
that have not begun for the time that is left. ``--resume OUT`` starts an empty work folder from what another machine
wrote: its classifier, and the teacher's averaged weights.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file, save_file

from diffaccel.files import write_json
from diffaccel.training.checkpoint import averages, save_weights
from diffaccel.training.loop import Deadline, TrainingPlan
from scripts.zoo import stages
from scripts.zoo.emoji.export import training_state
from scripts.zoo.fashion import classifier, data, export, score, students, unet
from scripts.zoo.fashion import recipe as recipes
from scripts.zoo.fashion.students import Student

STAGES = ("classifier", "teacher", "student", "score")
_EXPORT_SECONDS = 20  # kept at the end of a call
_PREFIX = {"classifier": "network.", "teacher": "unet."}
_LOOKED_AT = 5000  # pictures of an evaluation in a student's run


class Job:
    """One call: recipe, folders, deadline, students."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.recipe = recipes.get(options.recipe)
        self.students = [Student.parse(text) for text in options.students.split(",")]
        self.data, self.work, self.out = options.data, options.work, options.out or options.work
        self.device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        torch.backends.cudnn.benchmark = self.device.type == "cuda"
        self.seed, self.last, self.stages = options.seed, options.last, options.stages
        reserved = _EXPORT_SECONDS + (options.score_seconds if "score" in options.stages else 0)
        self.deadline = Deadline(max(60 * options.minutes - reserved, 1.0))
        self.tell = partial(print, flush=True)
        self.seconds, self.every = options.seconds or self.recipe.student_seconds, options.evaluate
        self._scratch = tempfile.TemporaryDirectory()  # jobs that share a work folder do not meet in it
        self.packed = Path(self._scratch.name) / "packed"
        for folder in (self.work, self.out, self.packed):
            folder.mkdir(parents=True, exist_ok=True)
        if options.resume and not (self.work / f"{unet.NAME}.safetensors").exists():
            self._restore(options.resume)

    @cached_property
    def training(self) -> data.Pictures:
        """The training set."""
        return data.load(self.data, "train", self.device)

    @cached_property
    def scorer(self) -> score.Scorer | None:
        """What measures drawings; None until there is a classifier."""
        network = classifier.load(self.work, self.recipe, self.device)
        if network is None:
            return None
        test = data.load(self.data, "t10k", self.device)
        recipe = self.recipe
        return score.Scorer(network, self.training, test, recipe.pictures, recipe.drawn_at_once, self.dtype)

    def classifier(self) -> None:
        """Train the network whose features judge."""
        classifier.train(self.training, self.recipe, self.work, deadline=self.deadline, seed=self.seed)
        if self.scorer is not None:
            self.tell(f"classifier: accuracy {self.scorer.accuracy:.4f}, floor {self.scorer.floor:.4f}")

    def teacher(self) -> None:
        """Train the teacher by flow matching."""
        if self._finished.exists():
            self.tell("teacher: is finished")
            return
        run = unet.train(
            self.training, self.recipe, self._plan(), self.work, deadline=self.deadline, seed=self.seed + 1
        )
        if run.finished or self.last:  # the deadline may come a moment before the plan's last second
            self._finished.touch()

    @property
    def _finished(self) -> Path:
        return self.work / "teacher.finished"

    def _plan(self) -> TrainingPlan:
        """Return the teacher's plan; with ``--last`` it ends with this call, before the students' share of it."""
        if not self.last:
            return self.recipe.teacher
        before = training_state(self.work / f"{unet.NAME}.safetensors")["seconds"]
        later = self.seconds * len(self.students) if "student" in self.stages else 0.0
        later = min(later, self.deadline.left() / 2)
        return replace(self.recipe.teacher, seconds=before + max(self.deadline.left() - later, 1.0), samples=math.inf)

    def student(self) -> None:
        """Distil the students, one after another, once the teacher is trained."""
        teacher = unet.load(self.work, self.recipe, self.device)
        if teacher is None or not self._finished.exists():
            self.tell("student: waits for the teacher; run the job again")
            return
        for number, one in enumerate(self.students):
            if self.deadline.over():
                self.tell(f"student: no time is left for {one.name}; run the job again")
                return
            left = max(self.deadline.left(), 1.0) / (len(self.students) - number)
            seconds = left if self.last else self.seconds
            count = students.turns_of(one, teacher, self.recipe, self.work, seconds, self.dtype)
            whole = students.distil(
                one, teacher, self.recipe, self.work, count=count, deadline=self.deadline, dtype=self.dtype,
                look=partial(self._look, one, count), every=self.every, tell=self.tell,
            )  # fmt: skip
            self.tell(f"student: {one.name} {'is finished' if whole else 'goes on in the next call'}")

    def _look(self, one: Student, count: int, network: UNet2DModel) -> dict[str, float]:
        """Return the numbers of a network in training, of fewer pictures than the score has."""
        if self.scorer is None:
            return {}
        scheduler = unet.student_scheduler(one.config(self.recipe, count))
        return self.scorer.score(network, scheduler, one.steps, min(_LOOKED_AT, self.recipe.pictures))

    def score(self) -> None:
        """Measure teacher, students and what is packed of them; write ``report.json`` and ``grid.png`` as it goes."""
        teacher = unet.load(self.work, self.recipe, self.device)
        if self.scorer is None or teacher is None or not self._finished.exists():
            self.tell("score: waits for classifier and teacher; run the job again")
            return
        scorer, recipe = self.scorer, self.recipe
        report: dict[str, Any] = {
            "recipe": recipe.name, "pictures": recipe.pictures, "floor": round(scorer.floor, 4),
            "classifier_accuracy": round(scorer.accuracy, 4), "device": self._device_name, "teacher": {},
            "students": {},
        }  # fmt: skip
        rows = [data.one_of_each(data.load(self.data, "t10k", self.device), 20)]
        for steps in recipe.steps:
            report["teacher"][str(steps)] = scorer.score(teacher, unet.own_scheduler(), steps)
            self._write(report)
        of_teacher = report["teacher"][str(recipe.steps[0])]["fd"]
        rows.append(scorer.images(teacher, unet.own_scheduler(), recipe.steps[0], 20)[0])
        for one, network, scheduler in self._made():
            found: dict[str, Any] = scorer.score(network, scheduler, one.steps)
            found["ratio"] = score.ratio(found["fd"], of_teacher, scorer.floor)
            report["students"][one.name] = {**found, **students.progress_of(one, self.work)}
            rows.append(scorer.images(network, scheduler, one.steps, 20)[0])
            self._write(report)
        score.sheet(self.out / "grid.png", rows)
        self.pack(report)
        for model in sorted(self.packed.glob(f"{export.MODEL}*/")):
            self._score_packed(scorer, model, report)
        self.tell(json.dumps(report))

    def _score_packed(self, scorer: score.Scorer, model: Path, report: dict[str, Any]) -> None:
        """Measure a packed model as it is shipped."""
        with tempfile.TemporaryDirectory() as scratch:
            network = export.unpacked(model, Path(scratch)).to(self.device)
        one = next((one for one in self.students if model.name == f"{export.MODEL}-{one.name}"), None)
        scheduler = unet.own_scheduler() if one is None else unet.student_scheduler(self._config_of(one))
        steps = self.recipe.steps[0] if one is None else one.steps
        report.setdefault("packed", {})[model.name] = scorer.score(network, scheduler, steps)
        self._write(report)

    @property
    def _device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"

    def _write(self, report: dict[str, Any]) -> None:
        write_json(self.out / "report.json", report)

    def _config_of(self, one: Student) -> Any:
        return one.config(self.recipe, students.progress_of(one, self.work)["of_turns"])

    def _made(self) -> list[tuple[Student, UNet2DModel, Any]]:
        """Return the students that have begun, with their networks and schedulers."""
        found = [(one, students.load(one, self.recipe, self.work, self.device)) for one in self.students]
        return [
            (one, network, unet.student_scheduler(self._config_of(one)))
            for one, network in found
            if network is not None
        ]

    def pack(self, report: dict[str, Any]) -> None:
        """Pack what there is, with its numbers."""
        teacher = unet.load(self.work, self.recipe, self.device)
        if teacher is None:
            return
        folder = self.packed
        judge = classifier.load(self.work, self.recipe, torch.device("cpu"))
        common = {key: report[key] for key in ("pictures", "floor", "classifier_accuracy") if key in report}
        quality = {**common, "teacher": report.get("teacher", {})}
        training = training_state(self.work / f"{unet.NAME}.safetensors")
        if judge is not None:
            export.pack_classifier(folder, judge, report.get("classifier_accuracy"))
        facts = {"training": training, "quality": quality}
        made = export.pack(folder, export.MODEL, teacher, unet.own_scheduler(), facts)
        self.tell(f"export: {made.name} {json.loads((made / 'card.json').read_text())['bytes']['packed'] / 1e6:.2f} MB")
        for one, network, scheduler in self._made():
            quality = {**common, "student": report.get("students", {}).get(one.name, {})}
            progress = {"preset": one.preset, **students.progress_of(one, self.work)}
            export.pack(folder, f"{export.MODEL}-{one.name}", network, scheduler,
                        {"training": progress, "quality": quality})  # fmt: skip

    def export(self) -> None:
        """Write all that must leave the machine: models, curves, progress."""
        file = self.out / "report.json"
        self.pack(json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {})
        folder = self.packed.with_name("averages")
        folder.mkdir(exist_ok=True)
        for stage, prefix in _PREFIX.items():
            checkpoint = self.work / f"{stage}.safetensors"
            if checkpoint.is_file():
                save_file(averages(checkpoint, prefix), folder / f"{stage}.safetensors")
        for part in export.send(folder, self.packed, self.out):
            self.tell(f"export: {part} {part.stat().st_size / 1e6:.1f} MB")
        self._write_curves()

    def _write_curves(self) -> None:
        """Write the logs of all stages as one file, and how far each of them is."""
        logs = {stage: self.work / f"{stage}.jsonl" for stage in _PREFIX}
        for one in self.students:
            if one.first is not None:
                logs[f"{one.name}-first"] = one.first_folder(self.work) / "log.jsonl"
            logs[one.name] = one.folder(self.work) / "log.jsonl"
        lines = [line for name, file in logs.items() if file.is_file() for line in stages.labelled(file, stage=name)]
        (self.out / "curves.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        begun = {stage: training_state(self.work / f"{stage}.safetensors") for stage in _PREFIX}
        progress = {**begun, "teacher_finished": self._finished.exists()}
        write_json(self.out / "progress.json", progress)

    def _restore(self, folder: Path) -> None:
        """Begin an empty work folder with the classifier and the teacher that another machine sent."""
        progress = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
        with tempfile.TemporaryDirectory() as scratch:
            received = export.receive(folder, Path(scratch))
            for stage, prefix in _PREFIX.items():
                file = received / "averages" / f"{stage}.safetensors"
                if file.is_file():
                    weights = {f"{prefix}{name}": value for name, value in load_file(file).items()}
                    save_weights(weights, self.work / f"{stage}.safetensors", **progress[stage])
        if progress["teacher_finished"]:
            self._finished.touch()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", required=True, help="full (a GPU) or tiny (to try the code)")
    stages.add_options(parser, STAGES)
    parser.add_argument("--minutes", type=float, required=True, help="time of this call, the score's included")
    parser.add_argument("--data", type=Path, default=Path("data/fashion"), help="folder of scripts.zoo.fashion.fetch")
    parser.add_argument("--students", default="sim:0", help="PRESET[xSTEPS[-last]][:SEED], several with commas")
    parser.add_argument("--seconds", type=float, help="of each student (default: those of the recipe)")
    parser.add_argument(
        "--evaluate", type=int, default=0, metavar="N", help="drawings between evaluations of a student"
    )
    parser.add_argument("--last", action="store_true", help="end the stages with this call")
    parser.add_argument("--resume", type=Path, help="results of another machine, for a work folder without a teacher")
    parser.add_argument("--score-seconds", type=float, default=150, help="kept for the score where it is a stage")
    stages.run(Job, parser.parse_args(), STAGES, last="export")


if __name__ == "__main__":
    main()
