"""An earlier stage's student as the network that a stage begins with."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffaccel.distill.stage import StageOptions
from diffaccel.distill.student import PROVENANCE, scheduler_of
from diffaccel.distill.teacher import PipelineTeacher
from diffaccel.errors import DiffAccelError, first_line
from diffaccel.modules.weights_hash import weights_hash

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
        if not isinstance(known["options"], dict):
            raise TypeError("its options are no table")
        theirs = [tuple(map(float, level[:2])) for level in drawn.get("levels") or [(drawn["a"], drawn["s"])]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DiffAccelError(
            f"'{folder}' is no student to begin with ({first_line(error, 90)}). Give the folder 'student' of a run of "
            "diffaccel distill."
        ) from error
    if made_of != weights_hash(teacher.network):
        raise DiffAccelError(
            f"The student in '{folder}' is of another teacher, or of one with other weights ({known.get('teacher')}). "
            "Begin with a student of this teacher."
        )
    _check_levels(folder, theirs, drawn.get("start"), known.get("options"), teacher, config)
    return EarlierStudent(_network(folder, teacher), {key: known[key] for key in _KEPT if key in known})


def _network(folder: Path, teacher: PipelineTeacher) -> nn.Module:
    """Return the denoiser of a student's folder, whole and finite, on the teacher's device; no pickle is opened."""
    part = folder / next(name for name, part in teacher.pipe.components.items() if part is teacher.network)
    kind: Any = type(teacher.network)
    try:
        if not part.is_dir():
            raise FileNotFoundError("there is no such folder")
        network, told = kind.from_pretrained(
            part, dtype=torch.float32, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, NotImplementedError, KeyError) as error:
        raise _unreadable(part, first_line(error, 120)) from error
    if missing := told["missing_keys"]:
        raise _unreadable(part, f"it lacks the weight '{missing[0]}'")
    if quantized := [name for name, p in network.named_parameters() if not p.is_floating_point()]:
        raise _unreadable(part, f"the weight '{quantized[0]}' is quantized; begin with the student before that")
    if bad := [name for name, p in network.named_parameters() if not bool(torch.isfinite(p).all())]:
        raise _unreadable(part, f"the weight '{bad[0]}' holds NaN or infinite values")
    network.to(next(teacher.network.parameters()).device)
    return network


def _unreadable(part: Path, reason: str) -> DiffAccelError:
    return DiffAccelError(
        f"'{part}' has no network to begin with: {reason.rstrip('.')}. Repeat the command that wrote the student, or "
        "give another."
    )


def _check_levels(
    folder: Path, theirs: list[tuple[float, ...]], start: Any, options: Any, teacher: PipelineTeacher,
    config: StageOptions,
) -> None:  # fmt: skip
    """Raise where a student draws from another input than the stage's: all levels, or the first on a trajectory."""
    own = [level[:2] for level in scheduler_of(teacher, config).levels]
    if not config.fresh_noise:
        own, theirs = own[:1], theirs[:1]
    same = len(own) == len(theirs) and start == config.start
    same = same and torch.allclose(torch.tensor(own).double(), torch.tensor(theirs).double(), rtol=1e-4, atol=1e-6)
    if not same:
        ratio = options.get("noise_ratio", "unknown") if isinstance(options, dict) else "unknown"
        raise DiffAccelError(
            f"The student in '{folder}' draws in {len(theirs)} calls from noise_ratio {ratio} with start "
            f"'{start}', this stage in {len(own)} from {config.noise_ratio:g} with '{config.start}'. "
            f"Take --{config.name}.noise-ratio {ratio}, and as many calls."
        )
