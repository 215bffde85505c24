"""The command of a job that trains a model of the zoo: its common options, and its stages in order."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from diffaccel.errors import DiffAccelError, unknown


def add_options(parser: argparse.ArgumentParser, stages: Sequence[str]) -> None:
    """Add the options that mean the same in every job."""
    parser.add_argument("--stages", default=",".join(stages), help="which of them; they run in this order")
    parser.add_argument("--work", type=Path, required=True, help="checkpoints; kept from call to call")
    parser.add_argument("--out", type=Path, help="where results are written; default: the work folder")
    parser.add_argument("--device", help="default: cuda if there is one")
    parser.add_argument("--seed", type=int, default=0)


def labelled(log: Path, **label: str) -> list[str]:
    """Return the lines of a JSON log, each with a label before its own values."""
    return [json.dumps({**label, **json.loads(line)}) for line in log.read_text(encoding="utf-8").splitlines()]


def run(
    job: Callable[[argparse.Namespace], Any], options: argparse.Namespace, stages: Sequence[str], last: str = ""
) -> None:
    """Make a job and run the stages asked for, in order, and then the ``last`` of every call; print their seconds."""
    chosen = options.stages = options.stages.split(",")
    for stage in chosen:
        if stage not in stages:
            raise SystemExit(f"error: {unknown('stage', stage, stages)}")
    try:
        made = job(options)
        for stage in [*(name for name in stages if name in chosen), *([last] if last else [])]:
            started = time.monotonic()
            getattr(made, stage)()
            print(f"{stage}: {time.monotonic() - started:.1f} s", flush=True)
    except DiffAccelError as error:
        raise SystemExit(f"error: {error}") from error
