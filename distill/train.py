"""From a pipeline and prompts to a student in a folder: the whole way, as the command line goes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from diffaccel.distill.earlier import open_student
from diffaccel.distill.learning import LearningRun
from diffaccel.distill.options import Matching
from diffaccel.distill.run import Distillation
from diffaccel.distill.segments import Segments
from diffaccel.distill.student import save, scheduler_of
from diffaccel.distill.teacher import PipelineTeacher, Teacher
from diffaccel.distill.trajectory import TrajectoryRun
from diffaccel.errors import DiffAccelError
from diffaccel.processes import Processes
from diffaccel.training.loop import Deadline

STUDENT = "student"


def distil(
    pipe: Any,
    prompts: Sequence[str],
    config: Matching | Segments,
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
    evaluate: Callable[[Any], dict[str, float]] | None = None,
    begin: str | Path | None = None,
    sharded: bool = False,
    tell: Callable[[str], None] = lambda text: None,
) -> Distillation | TrajectoryRun:
    """Distil a pipeline, and write the student to ``folder / "student"``; a run that is there goes on.

    Args:
        prompts: to draw in training.
        name: of the teacher, for the student's card.
        arguments: of the pipeline's call: size, guidance, negative prompt.
        seconds: after which it stops; None for when all steps are made.
        device, dtype: of the networks' arithmetic; the teacher's by default.
        evaluate_every: drawings between evaluations, which the log keeps; 0 for none. Each has the run's meter.
        evaluate: called at them too, such as a ``PictureEvaluation``.
        begin: folder of a student of the same teacher that the generator begins as, such as one of "tscd" for "sim".
        sharded: share out the weights of all networks among the processes, which hold parts instead of copies.
    """
    launch = processes or Processes()
    if config.batch % launch.size:
        raise DiffAccelError(f"batch is {config.batch}, for {launch.size} processes. Take a multiple of them.")
    if seconds is not None and not seconds > 0:
        raise DiffAccelError(f"seconds is {seconds:g}; it must be above 0. Leave it out to make all steps.")
    if evaluate_every < 0:
        raise DiffAccelError(f"evaluate_every is {evaluate_every}; it must be at least 0, for none.")
    if sharded and isinstance(config, Segments):
        raise DiffAccelError("sharded is True, which trajectories do not know. Leave it out, or take another method.")
    if sharded and evaluate is not None:
        raise DiffAccelError(
            "sharded is True, but pictures are drawn by one process. Leave the judge out: --judge none."
        )
    if config.risk:
        tell(f"note: {config.risk}")
    teacher = PipelineTeacher(pipe, prompts, config.batch // launch.size, arguments or {})
    scheduler_of(teacher, config)  # an error before training, not at its end
    begun = None if begin is None else open_student(begin, teacher, config)
    run = run_of(
        teacher, config, folder, seed=seed, device=device, dtype=dtype, processes=launch, tell=tell,
        begin=None if begun is None else begun.network, **({"sharded": True} if sharded else {}),
    )  # fmt: skip
    every = evaluation_steps(evaluate_every, config.batch)

    def looked(run: LearningRun) -> dict[str, float]:
        return {**run.meter(), **(evaluate(run) if evaluate is not None else {})}

    run.run(None if seconds is None else Deadline(seconds), every, looked)
    provenance = None if begun is None else begun.provenance
    if launch.rank == 0 or sharded:
        save(run, Path(folder) / STUDENT, name or type(pipe).__name__, provenance)
    launch.wait()
    return run


def evaluation_steps(drawings: int, batch: int) -> int:
    """Return after how many steps a run is looked at that is to be looked at every so many drawings; 0 for never."""
    return max(1, round(drawings / batch)) if drawings else 0


def run_of(
    teacher: Teacher, config: Matching | Segments, folder: str | Path, **options: Any
) -> Distillation | TrajectoryRun:
    """Return the run of a method's options; the other options are those of its class."""
    if isinstance(config, Segments):
        return TrajectoryRun(teacher, config, folder, **options)
    return Distillation(teacher, config, folder, **options)
