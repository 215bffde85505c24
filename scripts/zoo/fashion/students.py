"""Students of fashion-unet: which there are, how long each learns, and their runs, which resume."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file

from diffaccel.distill import SIM, TSCD
from diffaccel.distill.learning import LearningRun
from diffaccel.distill.options import Match
from diffaccel.distill.sim import PRESETS
from diffaccel.distill.train import run_of
from diffaccel.errors import DiffAccelError, unknown
from diffaccel.training.loop import Deadline
from scripts.zoo import turns
from scripts.zoo.fashion.recipe import FashionRecipe
from scripts.zoo.fashion.unet import teacher_of

_LOOKS = 12  # evaluations of a run
_TWO_STAGES = "tscd-sim"  # sim that begins with a student of trajectories, both within the seconds of one student
_KNOWN = (*PRESETS, TSCD.name, _TWO_STAGES)
_CHECKPOINT = "checkpoint.safetensors"
FIRST = 0.25  # share of the seconds that the first of two stages gets


@dataclass(frozen=True)
class Student:
    """A student: a preset or a method, its network calls, which of their drawings are matched, a seed."""

    preset: str
    steps: int
    match: Match
    seed: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``PRESET[xSTEPS[-last]][:SEED]``, such as "sim", "simx2:1", "simx2-last" or "dmd:0"."""
        found = re.fullmatch(r"([a-z-]+?)(?:x(\d+)(-last)?)?(?::(\d+))?", text)
        if found is None or found[2] == "0":
            raise DiffAccelError(f"'{text}' is no student. Write PRESET[xSTEPS[-last]][:SEED], such as simx2:1.")
        preset, steps, last, seed = found.groups()
        if preset not in _KNOWN:
            raise unknown("preset", preset, _KNOWN)
        if last and TSCD.name in preset:
            raise DiffAccelError(f"'{text}' matches the last call alone, which {TSCD.name} always does. Leave it out.")
        return cls(preset, int(steps or 1), "last" if last else "mixture", int(seed or 0))

    @property
    def name(self) -> str:
        return f"{self.preset}-{self.steps}step-{'last-' if self.match == 'last' else ''}{self.seed}"

    def folder(self, work: Path) -> Path:
        """Folder of its run."""
        return work / f"student-{self.name}"

    @property
    def first(self) -> Student | None:
        """The student that it begins with; None for the teacher."""
        return Student(TSCD.name, self.steps, "mixture", self.seed) if self.preset == _TWO_STAGES else None

    def first_folder(self, work: Path) -> Path:
        """Folder of the run of that student."""
        return self.folder(work) / "first"

    def config(self, recipe: FashionRecipe, count: int) -> SIM | TSCD:
        """Return the options of a run of so many turns."""
        options = {"batch": recipe.student_batch, "steps": count, **recipe.options}
        options["ema_pictures"] = min(options["ema_pictures"], count * recipe.student_batch // 10)
        if TSCD.name in self.preset:  # trajectories begin at noise, and so does what goes on from them
            options["noise_ratio"] = 1000.0
        if self.preset == TSCD.name:
            segments = tuple(number for number in (8, 4, 2, 1) if number >= self.steps)
            return TSCD(**options, segments=segments[-count:], grid=recipe.grid)
        options |= {"student_steps": self.steps, "student_match": self.match}
        preset = "sim" if self.preset == _TWO_STAGES else self.preset
        if PRESETS[preset].get("distance") == "l2":
            options.pop("c", None)
        return SIM.preset(preset, **options)


def turns_of(
    student: Student, network: UNet2DModel, recipe: FashionRecipe, work: Path, seconds: float, dtype: torch.dtype
) -> int:
    """Return the number of turns of a run, measured once for so many seconds and kept for calls that resume it."""
    later = seconds
    if student.first is not None:
        later = (1 - FIRST) * seconds
        _planned(student.first, student.first_folder(work), network, recipe, FIRST * seconds, dtype)
    return _planned(student, student.folder(work), network, recipe, later, dtype)


def _planned(
    student: Student, folder: Path, network: UNet2DModel, recipe: FashionRecipe, seconds: float, dtype: torch.dtype
) -> int:
    def trial(folder: Path) -> LearningRun:
        config = student.config(recipe, 1_000_000)
        return run_of(teacher_of(network, config.batch), config, folder, dtype=dtype)

    return turns.planned(folder / "turns.json", seconds, trial, recipe.student_turns)


def distil(
    student: Student,
    network: UNet2DModel,
    recipe: FashionRecipe,
    work: Path,
    *,
    count: int,
    deadline: Deadline,
    dtype: torch.dtype,
    look: Callable[[UNet2DModel], dict[str, float]],
    tell: Callable[[str], None],
    every: int = 0,
) -> bool:
    """Distil a student, or go on with it; return whether all its turns are made.

    Args:
        look: at a network that draws, from time to time; its numbers stand in the log beside the run's meter.
        every: drawings between looks; 0 for a number of looks a run.
    """

    def steps_between(turns: int) -> int:
        return max(1, round(every / recipe.student_batch) if every else turns // _LOOKS)

    begin = None
    if student.first is not None:
        folder = student.first_folder(work)
        first = student.first.config(recipe, int(json.loads((folder / "turns.json").read_text())["turns"]))
        run = run_of(teacher_of(network, first.batch), first, folder, seed=student.seed, dtype=dtype, tell=tell)
        if not run.run(deadline, steps_between(first.steps), lambda run: {**run.meter(), **look(run.generator)}):
            return False
        begin = _averaged(folder, recipe, network.device)
    config = student.config(recipe, count)
    run = run_of(
        teacher_of(network, config.batch), config, student.folder(work), seed=student.seed, dtype=dtype, tell=tell,
        begin=begin,
    )  # fmt: skip
    if run.step >= count:
        return True
    if config.risk:
        tell(f"note: {config.risk}")
    return run.run(deadline, steps_between(count), lambda run: {**run.meter(), **look(run.generator)})


def load(student: Student, recipe: FashionRecipe, work: Path, device: torch.device) -> UNet2DModel | None:
    """Return the averaged generator of a student's run; None where it has not begun."""
    folder = student.folder(work)
    return _averaged(folder, recipe, device) if (folder / _CHECKPOINT).is_file() else None


def _averaged(folder: Path, recipe: FashionRecipe, device: torch.device) -> UNet2DModel:
    network, weights = UNet2DModel(**recipe.unet), load_file(folder / _CHECKPOINT)
    network.load_state_dict({name: weights[f"average.{name}"] for name, _ in network.named_parameters()})
    return network.to(device).eval()


def progress_of(student: Student, work: Path) -> dict[str, Any]:
    """Return turns, pictures and seconds of a run's checkpoint, and those of the student that it began with."""
    own = _progress(student.folder(work))
    if student.first is None:
        return own
    first = _progress(student.first_folder(work))
    return {
        **own, "pictures": own["pictures"] + first["pictures"], "seconds": round(own["seconds"] + first["seconds"], 1),
        "first": first,
    }  # fmt: skip


def _progress(folder: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(folder / _CHECKPOINT, framework="pt") as opened:
        state = json.loads(opened.metadata()["state"])
    options = state["options"]
    return {"turns": state["step"], "pictures": state["step"] * options["batch"], "seconds": state["seconds"],
            "of_turns": options["steps"]}  # fmt: skip
