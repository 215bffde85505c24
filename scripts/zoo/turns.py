"""How many turns a run of distillation gets: as many as fit into its seconds on this machine, counted once."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from diffaccel.distill.learning import LearningRun
from diffaccel.files import write_json
from diffaccel.training.loop import Deadline

WARM_SECONDS, MEASURED_SECONDS = 8.0, 8.0  # of the trial
_SAFETY = 0.97


def planned(file: Path, seconds: float, trial: Callable[[Path], LearningRun], turns: int = 0) -> int:
    """Return the number of turns that ``file`` names; else measure it, and write it there for calls that resume.

    Args:
        seconds: of the run, the trial's included.
        trial: a run of very many turns in the folder that it is given; it is thrown away.
        turns: not to be measured, where it is known.
    """
    if file.is_file():
        return int(json.loads(file.read_text(encoding="utf-8"))["turns"])
    rate = 0.0
    if not turns:
        with tempfile.TemporaryDirectory() as scratch:
            run = trial(Path(scratch))
            run.run(Deadline(WARM_SECONDS))
            step, before = run.step, run.seconds
            run.run(Deadline(MEASURED_SECONDS))
            rate = (run.step - step) / max(run.seconds - before, 1e-6)
        turns = max(1, int(rate * max(seconds - WARM_SECONDS - MEASURED_SECONDS, 1.0) * _SAFETY))
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {"turns": turns, "turns_a_second": round(rate, 3)})
    return turns
