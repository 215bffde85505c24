"""One call of a training machine: run the unfinished stages until the time is over.

    python -m scripts.zoo.coinrun.job --recipe full --minutes 9 --data data/coinrun --work /tmp/coinrun --out OUT

Frames are made from seeds first (seconds on 16 cores). The same command continues where it was killed or ran out of
time, with the same frames and noise (on a CPU to the bit), and skips finished stages. ``--resume OUT`` starts an empty
work folder from what another machine wrote, with fresh optimiser moments. It also runs under ``accelerate launch``:
processes share every step.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import subprocess
import sys
import time
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffaccel import processes
from diffaccel.distill.next_frame import train
from diffaccel.errors import DiffAccelError
from diffaccel.files import Clip, write_json, write_mp4, write_png
from diffaccel.models.next_frame.pipeline import NextFramePipeline, to_uint8
from diffaccel.models.next_frame.transformer import NextFrameTransformer
from diffaccel.training.checkpoint import averages
from diffaccel.training.loop import Deadline, TrainingPlan
from scripts.zoo import stages
from scripts.zoo.coinrun import dynamics, export, forks, pool, score
from scripts.zoo.coinrun import recipe as recipes

STAGES = ("dynamics", "teacher", "student", "score")
_EXPORT_SECONDS = 15  # reserved at the end of a job, so that the result is written
_PROBE_SECONDS = 150


class Job:
    """One call: recipe, folders, deadline, and frames that are made when a stage needs them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.recipe = recipes.get(options.recipe)
        self.data, self.work, self.out = options.data, options.work, options.out or options.work
        named = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.launch, self.device = processes.join(named)
        self.seed, self.last, self.compiled = options.seed, options.last, options.compile
        self.stages = options.stages
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        reserved = _EXPORT_SECONDS + (options.score_seconds if "score" in options.stages else 0)
        self.train_until = Deadline(60 * options.minutes - reserved)
        self.tell = partial(print, flush=True)
        for folder in (self.work, self.out):
            folder.mkdir(parents=True, exist_ok=True)
        if options.resume and not (self.work / "teacher.safetensors").exists():
            export.restore(options.resume, self.work)

    @cached_property
    def clips(self) -> pool.Pool:
        """Frames to learn from, on the device."""
        start = time.monotonic()
        size, length = self.recipe.pool, self.recipe.forcing.frames
        made = pool.Pool(self.data, size, pool.TRAINING_LEVELS, self.seed + 1, length, self.device)
        seconds = time.monotonic() - start
        self.tell(f"frames: {size.frames} in {seconds:.1f} s, {size.frames / seconds:.0f} a second")
        return made

    def _network(self) -> NextFrameTransformer:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return NextFrameTransformer(**self.recipe.model).to(self.device)

    def _averaged(self, stage: str) -> NextFrameTransformer | None:
        """Return the network with the averaged weights of a stage."""
        file = self.work / f"{stage}.safetensors"
        if not file.is_file():
            return None
        network = self._network()
        network.load_state_dict(averages(file, "transformer."))
        return network.eval()

    def _plan(self, stage: str, plan: TrainingPlan) -> TrainingPlan:
        """Return a stage's plan; with ``--last`` it ends with this call, however long the earlier ones took."""
        if not self.last:
            return plan
        before = export.progress_of(self.work).get(stage, {"seconds": 0.0})["seconds"]
        later = self.recipe.consistency.plan.seconds if stage == "teacher" and "student" in self.stages else 0.0
        left = max(self.train_until.left() - later, 1.0)
        return replace(plan, seconds=before + left, samples=math.inf)

    def dynamics(self) -> None:
        """Train the network that reads actions."""
        if self.launch.rank == 0:
            dynamics.train(
                self.clips, self.recipe, self.work, deadline=self.train_until, device=str(self.device), seed=self.seed
            )
        self.launch.wait()

    def teacher(self) -> None:
        """Train the world model by flow matching."""
        _ = self.clips  # before the plan counts the seconds that are left
        compiled = self.compiled and self.device.type == "cuda" and compiles(self.recipe.name, self.work)
        options = replace(self.recipe.forcing, plan=self._plan("teacher", self.recipe.forcing.plan))
        train.train_forcing(
            self._network(), self.clips, options, self.work, seed=self.seed + 2, deadline=self.train_until,
            dtype=self.dtype, compiled=compiled, processes=self.launch, tell=self.tell,
        )  # fmt: skip

    def student(self) -> None:
        """Distil it to few steps, once it is trained."""
        teacher = self._averaged("teacher")
        if teacher is None:
            self.tell("student: waits for the teacher; run the job again")
            return
        _ = self.clips
        options = replace(self.recipe.consistency, plan=self._plan("student", self.recipe.consistency.plan))
        train.train_consistency(
            copy.deepcopy(teacher), teacher, self.clips, options, self.work, seed=self.seed + 3,
            deadline=self.train_until, dtype=self.dtype, processes=self.launch, tell=self.tell,
        )  # fmt: skip

    def score(self) -> None:
        """Measure what there is on levels that were never in training, and write ``report.json`` and a video."""
        if self.launch.rank:
            return
        recipe = self.recipe
        made = forks.make_forks(self.data, recipe.forks, recipe.given, recipe.horizon)
        judge = dynamics.load(self.work, recipe, str(self.device))
        report: dict[str, Any] = {"recipe": recipe.name, "progress": export.progress_of(self.work)}
        report["references"] = score.references(made)
        for stage in ("teacher", "student"):
            network = self._averaged(stage)
            if network is None:
                continue
            pipe = self._pipeline(network, stage == "student")
            report[stage] = score.score(pipe, judge, made, recipe.steps)
            drifted, videos = score.drift(pipe, judge, made, 4, recipe.videos, recipe.video_frames)
            report[f"{stage}, long videos"] = drifted
            self._show(stage, videos)
            write_json(self.out / "report.json", report)
        self.tell(json.dumps(report))

    def _show(self, stage: str, videos: Tensor) -> None:
        """Write the first videos side by side, as a film where a writer is installed, and every 25th frame."""
        rows = to_uint8(videos[:8]).numpy()  # (V, T, H, W, 3)
        sheet = Image.fromarray(np.concatenate([np.concatenate(list(row[::25]), 1) for row in rows], 0))
        write_png(self.out / f"{stage}.png", sheet)
        try:
            write_mp4(
                self.out / f"{stage}.mp4",
                Clip([Image.fromarray(np.concatenate(list(f), 1)) for f in rows.swapaxes(0, 1)], 15.0),
            )
        except (DiffAccelError, ImportError) as error:
            self.tell(f"note: no film of the {stage}: {error}")

    def _pipeline(self, network: NextFrameTransformer, consistency: bool) -> NextFramePipeline:
        weights = {name: value.cpu() for name, value in network.state_dict().items()}
        return export.pipeline(self.recipe, weights, consistency).to(self.device)

    def export(self) -> None:
        """Write weights and curves: all that must leave the machine."""
        if self.launch.rank:
            return
        logs = [file for file in sorted(self.work.glob("*.jsonl")) if file.stem in STAGES]
        curves = [line for file in logs for line in stages.labelled(file, stage=file.stem)]
        (self.out / "curves.jsonl").write_text("\n".join(curves) + "\n")
        write_json(self.out / "progress.json", export.progress_of(self.work))
        for part in export.send(self.work, self.out):
            self.tell(f"export: {part} {part.stat().st_size / 1e6:.1f} MB")


def compiles(recipe: str, work: Path) -> bool:
    """Return whether a child process can train the compiled network: a fault there would end this one's context."""
    marker = work / "compiled_training_works"
    if not marker.exists():
        command = [sys.executable, "-m", "scripts.zoo.coinrun.probe", recipe]
        try:
            child = subprocess.run(command, timeout=_PROBE_SECONDS, capture_output=True, text=True, check=False)
            works, reason = child.returncode == 0, child.stderr[-500:]
        except subprocess.TimeoutExpired:
            works, reason = False, f"no answer in {_PROBE_SECONDS} s"
        if not works:
            print("teacher: compiled training failed in a child process; training eagerly:", reason, flush=True)
            return False
        marker.touch()
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", required=True, help="full (a GPU) or cpu (two cores)")
    stages.add_options(parser, STAGES)
    parser.add_argument("--minutes", type=float, required=True, help="time of this call, the score's included")
    parser.add_argument("--data", type=Path, default=Path("data/coinrun"), help="folder of scripts.zoo.coinrun.fetch")
    parser.add_argument("--last", action="store_true", help="end the schedules of the stages with this call")
    parser.add_argument("--resume", type=Path, help="results of another machine, for a work folder without a teacher")
    parser.add_argument("--score-seconds", type=float, default=110, help="kept for the score where it is a stage")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="train without torch.compile")
    stages.run(Job, parser.parse_args(), STAGES, last="export")


if __name__ == "__main__":
    main()
