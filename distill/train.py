"""From a pipeline and prompts to a student in a folder: the whole way, as the command line goes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from diffaccel.distill.meter import converged
from diffaccel.distill.options import Matching
from diffaccel.distill.run import Distillation
from diffaccel.distill.student import save, scheduler_of
from diffaccel.distill.teacher import PipelineTeacher
from diffaccel.errors import DiffAccelError
from diffaccel.processes import Processes
from diffaccel.training.loop import Deadline

STUDENT = "student"


def distil(
    pipe: Any,
    prompts: Sequence[str],
    config: Matching,
    folder: str | Path,
    *,
    name: str = "",
    arguments: dict[str, Any] | None = None,
    seconds: float | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    processes: Processes | None = None,
    evaluate_every: int = 0,
    evaluate: Callable[[Distillation], dict[str, float]] | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> Distillation:
    """Distil a pipeline, and write the student to ``folder / "student"``; a run that is there goes on.

    Args:
        prompts: to draw in training.
        name: of the teacher, for the student's card.
        arguments: of the pipeline's call: size, guidance, negative prompt.
        seconds: after which it stops; None for when all steps are made.
        device, dtype: of the networks' arithmetic; the teacher's by default.
        evaluate_every: drawings between evaluations, which the log keeps; 0 for none. Each has the convergence meter.
        evaluate: called at them too, such as a ``PictureEvaluation``.
    """
    launch = processes or Processes()
    if config.batch % launch.size:
        raise DiffAccelError(f"batch is {config.batch}, for {launch.size} processes. Take a multiple of them.")
    if seconds is not None and seconds <= 0:
        raise DiffAccelError(f"seconds is {seconds:g}; it must be above 0. Leave it out to make all steps.")
    if evaluate_every < 0:
        raise DiffAccelError(f"evaluate_every is {evaluate_every}; it must be at least 0, for none.")
    if config.risk:
        tell(f"note: {config.risk}")
    teacher = PipelineTeacher(pipe, prompts, config.batch // launch.size, arguments or {})
    scheduler_of(teacher, config)  # an error before training, not at its end
    run = Distillation(teacher, config, folder, seed=seed, device=device, dtype=dtype, processes=launch, tell=tell)
    every = max(1, round(evaluate_every / config.batch)) if evaluate_every else 0
    looked = (lambda run: {**converged(run), **evaluate(run)}) if evaluate is not None else converged
    run.run(None if seconds is None else Deadline(seconds), every, looked)
    if launch.rank == 0:
        save(run, Path(folder) / STUDENT, name or type(pipe).__name__)
    launch.wait()
    return run
