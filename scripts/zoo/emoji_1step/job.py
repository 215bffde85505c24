"""One call of a training machine for emoji-flux-1step: distil, measure, and pack what changed as matrices of low rank.

    python -m scripts.zoo.emoji_1step.job --recipe full --minutes 9 --work WORK --out OUT [--last] [--steps 2]

Teacher, prompts and judge are those of the installed package: no data and no network are used. The same command goes on
where it was killed or ran out of time. The run is planned once, for the seconds of its recipe or, with ``--last``, for
what is left of the call that begins it. ``--set FIELD=VALUE`` changes options of the method.
"""

from __future__ import annotations

import argparse
import json
import shutil
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffaccel import zoo
from diffaccel.distill import SIM, Distillation, PipelineTeacher, student
from diffaccel.distill.evaluation import PictureEvaluation
from diffaccel.distill.meter import converged
from diffaccel.errors import DiffAccelError
from diffaccel.eval.features import statistics_files
from diffaccel.eval.metrics import frechet
from diffaccel.eval.networks import extractors
from diffaccel.eval.sets import prompts as prompt_sets
from diffaccel.files import write_json, write_png
from diffaccel.runs.variant import parse_fields
from diffaccel.training.loop import Deadline
from scripts.zoo import stages, turns
from scripts.zoo.emoji import score as pictures
from scripts.zoo.emoji_1step import export, prompts
from scripts.zoo.emoji_1step import recipe as recipes
from scripts.zoo.emoji_1step.export import BASE

STAGES = ("student", "score")
JUDGE = "emoji-clip-judge"
_EXPORT_SECONDS = 30  # kept at the end of a call
_LOOKS = 10  # evaluations of a run
_LOOK_SECONDS = 4.0  # of one of them, the teacher's pictures included; they are no turns


def base_pipeline() -> Any:
    """Return the installed emoji-flux, in float32."""
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(zoo.path(BASE), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Job:
    """One call: recipe, folders, deadline, teacher."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.recipe = recipes.get(options.recipe)
        self.steps, self.last, self.seed, self.begins = options.steps, options.last, options.seed, options.begin
        changes = dict(text.partition("=")[::2] for text in options.set)
        self.changes = {"student_steps": options.steps, **self.recipe.options, **parse_fields(SIM, changes)}
        self._config(1_000_000)  # names an option that is unknown or of no effect
        self.work, self.out = options.work, options.out or options.work
        self.device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        reserved = _EXPORT_SECONDS + (options.score_seconds if "score" in options.stages else 0)
        self.deadline = Deadline(max(60 * options.minutes - reserved, 1.0))
        self.tell = partial(print, flush=True)
        for folder in (self.work, self.out):
            folder.mkdir(parents=True, exist_ok=True)

    def _config(self, count: int) -> SIM:
        changes = {**self.changes, "steps": count}
        if changes.get("ema_pictures"):
            changes["ema_pictures"] = min(changes["ema_pictures"], count * changes["batch"] // 10)
        return SIM.from_dict(changes)

    @cached_property
    def pipe(self) -> Any:
        """The teacher's pipeline."""
        return base_pipeline().to(self.device)

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """Arguments of the teacher's call."""
        own = {**zoo.call_defaults(BASE), "height": self.recipe.size, "width": self.recipe.size}
        return {**own, "num_inference_steps": self.recipe.teacher_steps[0]}

    @property
    def held_out(self) -> list[str]:
        """Prompts of evaluations, which training never has."""
        return list(prompt_sets.read("emoji-1000").texts)

    def _run(self, folder: Path, count: int, tell: Any = lambda text: None) -> Distillation:
        """Return the run of so many turns in a folder."""
        vocabulary = zoo.vocabulary_of(BASE)
        if vocabulary is None:
            raise DiffAccelError(f"The installed {BASE} has no vocabulary; reinstall diffaccel.")
        config = self._config(count)
        texts = prompts.build(vocabulary, self.recipe.prompts, self.held_out)
        teacher = PipelineTeacher(self.pipe, texts, config.batch, self.arguments)
        return Distillation(
            teacher, config, folder, seed=self.seed, device=self.device, dtype=self.dtype, tell=tell, begin=self.begin
        )

    @cached_property
    def begin(self) -> Any:
        """Network of the installed student that the run begins as; None for the teacher's."""
        if self.begins is None:
            return None
        from diffusers import FluxTransformer2DModel

        folder = zoo.path(self.begins) / "transformer"
        return FluxTransformer2DModel.from_pretrained(folder, torch_dtype=torch.float32).to(self.device)

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return self.work / f"student-{self.steps}step-{self.seed}"

    @property
    def packed(self) -> Path:
        """Folder of the run's packed model: jobs of several runs share a work folder, and do not meet in it."""
        return self.folder / "packed"

    def _spread(self, count: int) -> list[str]:
        texts = self.held_out
        return [texts[row * len(texts) // count] for row in range(count)]

    def student(self) -> None:
        """Distil, or go on with it, until the deadline."""
        left = self.deadline.left() - _LOOKS * _LOOK_SECONDS
        seconds = max(left, 1.0) if self.last else self.recipe.seconds
        trial = partial(self._run, count=1_000_000)
        count = turns.planned(self.folder / "turns.json", seconds, trial, self.recipe.turns)
        run = self._run(self.folder, count, self.tell)
        if run.step >= count:
            self.tell("student: is finished")
            return
        judge = extractors.extractor(JUDGE, device=self.device)
        looked = PictureEvaluation(self.pipe, self._spread(self.recipe.looked), self.arguments, judge, batch=64)
        run.run(self.deadline, max(1, count // _LOOKS), lambda run: {**converged(run), **looked(run)})
        self.tell(f"student: {run.step} of {count} turns")

    @cached_property
    def finished(self) -> Distillation | None:
        """The run as its checkpoint has it; None before it has begun."""
        if not (self.folder / "checkpoint.safetensors").is_file():
            return None
        count = json.loads((self.folder / "turns.json").read_text(encoding="utf-8"))["turns"]
        return self._run(self.folder, int(count))

    def score(self) -> None:
        """Measure teacher, student and packed student on prompts that no training had; write ``report.json``."""
        if self.finished is None:
            self.tell("score: waits for the student; run the job again")
            return
        judge = pictures.Judge(zoo.path(JUDGE), str(self.device))
        file = zoo.path(JUDGE) / f"fd_reference_{self.recipe.size}.npz"
        reference = frechet.gaussian(statistics_files.read(file).moments) if file.is_file() else None
        texts = self._spread(min(self.recipe.scored, 1000))
        report: dict[str, Any] = {"recipe": self.recipe.name, "pictures": len(texts), "turns": self.finished.step,
                                  "drawings": self.finished.pictures, "seconds": round(self.finished.seconds, 1),
                                  "student_steps": self.steps}  # fmt: skip
        rows = []
        for steps in self.recipe.teacher_steps:
            drawn = self._draw(self.pipe, texts, steps, self.arguments.get("true_cfg_scale", 1.0))
            rows.append(self._row(report, f"teacher, {steps} steps", drawn, texts, judge, reference))
        own = student(self.finished).to(self.device)
        own.set_progress_bar_config(disable=True)
        rows.append(self._row(report, "student", self._draw(own, texts, self.steps, 1.0), texts, judge, reference))
        packed = export.unpacked(export.pack(self.finished, self.packed, {}, self.begins)[0], self.folder / "unpacked")
        drawn = self._draw(packed.to(self.device), texts, self.steps, 1.0)
        rows.append(self._row(report, "student, packed", drawn, texts, judge, reference))
        self._sheet(rows)
        self.tell(json.dumps(report))

    def _draw(self, pipe: Any, texts: list[str], steps: int, guidance: float) -> Tensor:
        batch = self.recipe.batch
        return pictures.draw(pipe, texts, size=self.recipe.size, steps=steps, guidance=guidance, seed=1000, batch=batch)

    def _row(
        self, report: dict[str, Any], name: str, drawn: Tensor, texts: list[str], judge: pictures.Judge, reference: Any
    ) -> Tensor:
        """Add the judge's score and the distance to the training icons to the report, and return the pictures."""
        row = {"judge": round(pictures.cosine(judge, texts, drawn), 4)}
        if reference is not None:
            row["fd"] = round(frechet.between(frechet.gaussian(judge.images(drawn)), reference), 3)
        report[name] = row
        write_json(self.out / "report.json", report)
        self.tell(f"score: {name}: {row}")
        return drawn

    def _sheet(self, rows: list[Tensor], columns: int = 16) -> None:
        """Save the first pictures of every row of the table, one row of a sheet each."""
        from PIL import Image

        cells = [torch.cat([*((row[:columns] + 1) * 127.5).round().clamp(0, 255).byte()], dim=2) for row in rows]
        write_png(self.out / "grid.png", Image.fromarray(torch.cat(cells, dim=1).permute(1, 2, 0).numpy()))

    @property
    def name(self) -> str:
        return f"{BASE}-{self.steps}step"

    def export(self) -> None:
        """Write what must leave the machine: the packed model with its card, and the log."""
        if self.finished is None:
            self.tell("export: there is no student yet")
            return
        report = self.out / "report.json"
        quality = json.loads(report.read_text(encoding="utf-8")) if report.is_file() else {}
        packed, size = export.pack(self.finished, self.packed, quality, self.begins)
        fits = "fits" if size <= export.LARGEST else "is too large"
        self.tell(f"export: {packed.name} {size / 1e6:.2f} MB packed, which {fits}")
        for part in export.send(packed, self.out):
            self.tell(f"export: {part} {part.stat().st_size / 1e6:.1f} MB")
        shutil.copyfile(self.folder / "log.jsonl", self.out / "log.jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="full", help="full (a GPU) or tiny (to try the code)")
    stages.add_options(parser, STAGES)
    parser.add_argument("--minutes", type=float, default=9.0, help="time of this call, the score's included")
    parser.add_argument("--steps", type=int, default=1, help="network calls of the student")
    parser.add_argument("--begin", metavar="MODEL", help=f"installed student of {BASE} that it begins as")
    parser.add_argument("--last", action="store_true", help="plan a run that begins for what is left of this call")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="an option of the method")
    parser.add_argument("--score-seconds", type=float, default=120, help="kept for the score where it is a stage")
    stages.run(Job, parser.parse_args(), STAGES, last="export")


if __name__ == "__main__":
    main()
