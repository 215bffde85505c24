"""An earlier stage's student as the network that a stage begins with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffaccel.distill.identity import fingerprint
from diffaccel.distill.stage import StageOptions
from diffaccel.distill.student import PROVENANCE, scheduler_of
from diffaccel.distill.teacher import PipelineTeacher
from diffaccel.errors import DiffAccelError, first_line

_KEPT = ("options", "seed", "generator_steps", "pictures", "seconds", "begins_with")


@dataclass(frozen=True)
class EarlierStudent:
    """A student that was saved.

    Attributes:
        network: its denoiser, in float32 on the teacher's device.
        provenance: how it was made, as the next student's provenance repeats it.
    """

    network: nn.Module
    provenance: dict[str, Any]


def open_student(folder: str | Path, teacher: PipelineTeacher, config: StageOptions) -> EarlierStudent:
    """Return the student of a folder that ``save`` wrote, for a stage of these options.

    Raises:
        DiffAccelError: for a folder without a student, a student of another teacher, and one that draws at other noise
            levels than the stage's, which is given inputs that it does not know.
    """
    folder = Path(folder)
    try:
        known = json.loads((folder / PROVENANCE).read_text(encoding="utf-8"))
        drawn = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
        made_of = known["teacher_weights"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DiffAccelError(
            f"'{folder}' is no student to begin with ({first_line(error, 90)}). Give the folder 'student' of a run of "
            "diffaccel distill."
        ) from error
    if made_of != fingerprint(teacher.network):
        raise DiffAccelError(
            f"The student in '{folder}' is of another teacher, or of one with other weights ({known.get('teacher')}). "
            "Begin with a student of this teacher."
        )
    _check_levels(folder, drawn, known.get("options", {}), teacher, config)
    name = next(name for name, part in teacher.pipe.components.items() if part is teacher.network)
    device = next(teacher.network.parameters()).device
    kind: Any = type(teacher.network)
    network = kind.from_pretrained(folder / name, torch_dtype=torch.float32).to(device)
    return EarlierStudent(network, {key: known[key] for key in _KEPT if key in known})


def _check_levels(
    folder: Path, drawn: dict[str, Any], options: dict[str, Any], teacher: PipelineTeacher, config: StageOptions
) -> None:
    """Raise where a student draws from another input than the stage's: all levels, or the first on a trajectory."""
    own = [level[:2] for level in scheduler_of(teacher, config).levels]
    theirs = [level[:2] for level in drawn.get("levels") or [(drawn.get("a", 0.0), drawn.get("s", 0.0))]]
    if not config.fresh_noise:
        own, theirs = own[:1], theirs[:1]
    same = len(own) == len(theirs) and drawn.get("start") == config.start
    same = same and torch.allclose(torch.tensor(own).double(), torch.tensor(theirs).double(), rtol=1e-4, atol=1e-6)
    if not same:
        ratio = options.get("noise_ratio", "unknown")
        raise DiffAccelError(
            f"The student in '{folder}' draws in {len(theirs)} calls from noise_ratio {ratio} with start "
            f"'{drawn.get('start')}', this stage in {len(own)} from {config.noise_ratio:g} with '{config.start}'. "
            f"Take --{config.name}.noise-ratio {ratio}, and as many calls."
        )
