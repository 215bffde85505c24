"""Workspace of a report: draws runs into its folder, times calls on one pipeline, and keeps whatever is finished."""

from __future__ import annotations

import errno
import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from diffaccel import record, zoo
from diffaccel.errors import DiffAccelError, first_line
from diffaccel.eval.networks.extractors import as_clip, extractor
from diffaccel.eval.networks.extractors.clip import ClipExtractor
from diffaccel.eval.report.heartbeat import heartbeat
from diffaccel.eval.report.plan import ReportPlan
from diffaccel.eval.sets.run import Run, open_run
from diffaccel.eval.timing.pace import ANNOUNCED, duration
from diffaccel.eval.timing.turns import one_call
from diffaccel.files import write_json
from diffaccel.processes import join
from diffaccel.runs import loading
from diffaccel.runs.folder import RunFailed
from diffaccel.runs.generate import generate_run
from diffaccel.runs.loading import quiet_libraries
from diffaccel.runs.request import Request
from diffaccel.runs.variant import Variant

RUNS = "runs"
OTHER_SEEDS = "other-seeds"
_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


class Workspace:
    """Folder, processes and pipeline of a report being made.

    Several processes share the drawing of runs; the first one of them measures, while the others wait.

    Args:
        plan: of the report.
        out: the report's folder.
        progress: called with a line of text at every step of the first process.
    """

    def __init__(self, plan: ReportPlan, out: Path, progress: Callable[[str], None]) -> None:
        self.plan, self.out = plan, out
        self.processes, device = join(loading.pick_device(plan.request.device))
        self._prediction_seconds: float | None = None
        self.progress = progress if self.is_first else lambda text: None
        self.request = replace(plan.request, device=str(device) if self.processes.size > 1 else plan.request.device)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that measures and writes the report."""
        return self.processes.rank == 0

    @cached_property
    def pipe(self) -> Any:
        """The model as an open pipeline without methods, opened when it is first needed."""
        quiet_libraries(self.request.model in zoo.names())
        pipe = loading.open_plain(self.request)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def close_pipeline(self) -> None:
        """Free the pipeline's memory for the networks that measure."""
        if self.__dict__.pop("pipe", None) is not None:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def load_clip(self, name: str) -> ClipExtractor | None:
        """Load a CLIP by its name; None for an empty name."""
        if not name:
            return None
        return as_clip(extractor(name, device=loading.pick_device(self.plan.request.device)))

    # -- runs ---------------------------------------------------------------------------------------------------------

    def draw(self, variant: Variant, request: Request | None = None, folder: str | None = None) -> Run:
        """Draw a request by a variant; finished pictures are used again.

        Args:
            variant: methods and call settings.
            request: None for the report's own.
            folder: of the run; None names it after the variant.
        """
        request = variant.of(request or self.request)
        path = self.out / RUNS / (folder or variant.folder)
        if not _is_finished(path):
            things = "videos" if request.frames else "pictures"
            expected = self._expected_seconds(request)
            about = f", about {duration(expected)}" if expected >= ANNOUNCED else ""
            self.progress(f"{path.name}: {len(request)} {things}{about}")
        quiet_libraries(request.model in zoo.names())
        with heartbeat(path.name, self.progress):
            generate_run(request, path)
        run = open_run(path)
        self._note_prediction(run)
        return run

    def _note_prediction(self, run: Run) -> None:
        """Keep what a prediction of the first run took, by which those that follow are estimated."""
        cost = run.record.get("cost") or {}
        if self._prediction_seconds is None and cost.get("nfe") and cost.get("seconds"):
            self._prediction_seconds = cost["seconds"] / cost["nfe"]

    def _expected_seconds(self, request: Request) -> float:
        """Return about how long a search takes, by its budget of predictions; 0 for what is not known."""
        budgets = [method.budget for method in request.methods if getattr(method, "searches", False)]
        return (self._prediction_seconds or 0.0) * len(request) * max(budgets, default=0)

    def draw_other_seeds(self) -> Run:
        """Draw the baseline with the seeds that follow the report's own."""
        request = replace(self.request, seed=self.request.seed + len(self.request))
        return self.draw(self.plan.baseline, request, f"{self.plan.baseline.folder}-{OTHER_SEEDS}")

    def try_to_draw(self, variant: Variant) -> Run | str:
        """Return the run of a variant, or why it cannot be drawn: the drawing itself is the trial.

        Several processes agree by a first call of the first one.
        """
        if self.processes.size > 1:
            return self.first_call_error(variant) or self.draw(variant)
        try:
            return self.draw(variant)
        except Exception as error:  # a method may raise anything on a model that it was not made for
            if any(isinstance(one, OSError) and one.errno in _OF_THE_DISK for one in (error, error.__cause__)):
                raise
            return _reason(error.__cause__ or error if isinstance(error, RunFailed) else error)

    def first_call_error(self, variant: Variant) -> str | None:
        """Try a first call of a variant and return why it fails; None where it works or its run is finished."""
        error_text = None
        if self.is_first and not _is_finished(self.out / RUNS / variant.folder):
            self.progress(f"{variant.name}: a first call")
            try:
                one_call(self.pipe, variant.of(self.request))
            except Exception as error:
                error_text = _reason(error)
        return self.processes.share(error_text)

    # -- measurements -------------------------------------------------------------------------------------------------

    def measure_once(
        self, name: str, variants: Sequence[Variant], measure: Callable[[], dict[str, Any]], batch: int | None = None
    ) -> dict[str, Any]:
        """Return a measurement that a file keeps, measured now unless the file has it for the same conditions.

        All processes return the same, and only the first one measures.

        Args:
            name: of the file in the report's folder.
            variants: that are measured.
            measure: takes the measurement, JSON-ready.
            batch: pictures in a call; None for the request's own.
        """
        path, measurement = self.out / name, None
        if self.is_first:
            conditions = self._conditions(variants, batch or self.request.batch)
            measurement = _read_object(path)
            if measurement is None or measurement.get("of") != conditions:
                measurement = {**measure(), "of": conditions}
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, measurement)
        return self.processes.share(measurement)

    def part_of(self, name: str, variants: Sequence[Variant], batch: int | None = None) -> UnfinishedMeasurement:
        """Return where a measurement that takes long is kept while it is made; see :meth:`measure_once`."""
        return UnfinishedMeasurement(self.out / f"{name}.part", self._conditions(variants, batch or self.request.batch))

    def _conditions(self, variants: Sequence[Variant], batch: int) -> dict[str, Any]:
        """Return everything that a measurement of variants depends on: request, device, turns, reward."""
        device = loading.pick_device(self.request.device)
        _, digest = loading.locate(self.request.model)
        request = replace(self.request.with_model_defaults(), batch=batch)
        settings = request.settings(digest, device, loading.pick_dtype(request.dtype, device))
        settings["prompts"] = settings["prompts"][: request.batch]  # times are of the first chunk
        names = {"ways": [variant.name for variant in variants], "turns": self.plan.turns, "reward": self.plan.reward}
        return {"settings": settings, "device": record.describe_device(device), **names}


@dataclass(frozen=True)
class UnfinishedMeasurement:
    """What there is of a measurement that is being made, kept beside its file.

    Attributes:
        path: of the part.
        conditions: of the measurement; a part made under others is none.
    """

    path: Path
    conditions: dict[str, Any]

    def read(self) -> dict[str, Any] | None:
        """Return the part that is there; None for none."""
        part = _read_object(self.path)
        return part if part is not None and part.pop("of", None) == json.loads(json.dumps(self.conditions)) else None

    def keep(self, part: dict[str, Any]) -> None:
        """Write the part that is made."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {**part, "of": self.conditions})

    def remove(self) -> None:
        """Remove the part: the measurement is made."""
        self.path.unlink(missing_ok=True)


def _reason(error: BaseException) -> str:
    """Return in a line why a method cannot run."""
    return f"{'' if isinstance(error, DiffAccelError) else f'{type(error).__name__}: '}{first_line(error)}"


def _is_finished(folder: Path) -> bool:
    run_record = _read_object(folder / record.RUN)
    return run_record is not None and run_record.get("state") == "finished"


def _read_object(path: Path) -> dict[str, Any] | None:
    """Read a JSON object; None where there is no readable one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
