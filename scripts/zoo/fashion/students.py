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

from diffaccel.distill import SIM, Distillation
from diffaccel.distill.meter import converged
from diffaccel.distill.options import Match
from diffaccel.distill.sim import PRESETS
from diffaccel.errors import DiffAccelError, unknown
from diffaccel.training.loop import Deadline
from scripts.zoo import turns
from scripts.zoo.fashion.recipe import FashionRecipe
from scripts.zoo.fashion.unet import teacher_of

_LOOKS = 12  # evaluations of a run


@dataclass(frozen=True)
class Student:
    """A student: a preset of the method, its network calls, which of their drawings are matched, a seed."""

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
        if preset not in PRESETS:
            raise unknown("preset", preset, PRESETS)
        return cls(preset, int(steps or 1), "last" if last else "mixture", int(seed or 0))

    @property
    def name(self) -> str:
        return f"{self.preset}-{self.steps}step-{'last-' if self.match == 'last' else ''}{self.seed}"

    def folder(self, work: Path) -> Path:
        """Folder of its run."""
        return work / f"student-{self.name}"

    def config(self, recipe: FashionRecipe, count: int) -> SIM:
        """Return the options of a run of so many turns."""
        options = {"student_steps": self.steps, "student_match": self.match, "batch": recipe.student_batch,
                   "steps": count, **recipe.options}  # fmt: skip
        options["ema_pictures"] = min(options["ema_pictures"], count * recipe.student_batch // 10)
        if PRESETS[self.preset].get("distance") == "l2":
            options.pop("c", None)
        return SIM.preset(self.preset, **options)


def turns_of(
    student: Student, network: UNet2DModel, recipe: FashionRecipe, work: Path, seconds: float, dtype: torch.dtype
) -> int:
    """Return the number of turns of a run, measured once for so many seconds and kept for calls that resume it."""

    def trial(folder: Path) -> Distillation:
        config = student.config(recipe, 1_000_000)
        return Distillation(teacher_of(network, config.batch), config, folder, dtype=dtype)

    return turns.planned(student.folder(work) / "turns.json", seconds, trial, recipe.student_turns)


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
) -> bool:
    """Distil a student, or go on with it; return whether all its turns are made.

    Args:
        look: at a network that draws, from time to time; its numbers stand in the log beside the convergence meter.
    """
    config = student.config(recipe, count)
    run = Distillation(
        teacher_of(network, config.batch), config, student.folder(work), seed=student.seed, dtype=dtype, tell=tell
    )
    if run.step >= count:
        return True
    if config.risk:
        tell(f"note: {config.risk}")
    every = max(1, count // _LOOKS)
    return run.run(deadline, every, lambda run: {**converged(run), **look(run.generator)})


def load(student: Student, recipe: FashionRecipe, work: Path, device: torch.device) -> UNet2DModel | None:
    """Return the averaged generator of a student's run; None where it has not begun."""
    file = student.folder(work) / "checkpoint.safetensors"
    if not file.is_file():
        return None
    network, weights = UNet2DModel(**recipe.unet), load_file(file)
    network.load_state_dict({name: weights[f"average.{name}"] for name, _ in network.named_parameters()})
    return network.to(device).eval()


def progress_of(student: Student, work: Path) -> dict[str, Any]:
    """Return turns, pictures and seconds of a run's checkpoint."""
    from safetensors import safe_open

    with safe_open(student.folder(work) / "checkpoint.safetensors", framework="pt") as opened:
        state = json.loads(opened.metadata()["state"])
    options = state["options"]
    return {"turns": state["step"], "pictures": state["step"] * options["batch"], "seconds": state["seconds"],
            "of_turns": options["steps"]}  # fmt: skip
