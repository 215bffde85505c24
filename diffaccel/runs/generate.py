"""Run a request into a folder, resumable, by any number of processes: images, or videos.

Work is cut into chunks of consecutive images, one pipeline call each. A run that was stopped draws its unfinished
chunks again and nothing else, and processes take whole chunks, so the files are the same however often a run was
stopped and however many processes shared it.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffaccel import record
from diffaccel.active import active
from diffaccel.processes import Processes, join
from diffaccel.runs import loading
from diffaccel.runs.call_arguments import (
    call_arguments,
    call_parameters,
    check_settings,
    check_subjects,
    class_labels,
    frame_rate,
    source_of,
    steps_of_student,
)
from diffaccel.runs.chunk import generate_chunk
from diffaccel.runs.failures import failures
from diffaccel.runs.folder import RunFolder
from diffaccel.runs.request import Request
from diffaccel.runs.side_files import SEARCH, TRACES
from diffaccel.runs.threads import cpu_threads
from diffaccel.whole_folder import check_writable

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

OUT = "out"
GO_ON = "go on"  # verdict of a look that proves nothing yet


@dataclass(frozen=True)
class Early:
    """When a run may end before its last picture.

    Attributes:
        rule: what is to be proven, as the record states it.
        looks: numbers of pictures after which to look, growing; each is rounded up to whole chunks.
        look: maps the run's folder and a record of the pictures so far to a verdict, JSON-ready: its "verdict" is
            :data:`GO_ON` while nothing is proven.
    """

    rule: str
    looks: tuple[int, ...]
    look: Callable[[Path, dict[str, Any]], dict[str, Any]]

    def stages(self, folder: RunFolder) -> list[int]:
        """Return the looks as numbers of chunks; the last is that of the whole run."""
        ends = list(itertools.accumulate(map(len, folder.chunks)))
        stages = {next((i for i, end in enumerate(ends, 1) if end >= look), len(ends)) for look in self.looks}
        return sorted(stages | {len(ends)})


@dataclass(frozen=True)
class _Model:
    """Where a run's weights are and how they compute.

    Attributes:
        folder: of the model's files; unused for an open pipeline.
        digest: of the weights.
    """

    folder: Path
    digest: str
    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True)
class _Work:
    """Chunks that are not finished.

    Attributes:
        pending: to be drawn now.
        later: left to a later call.
        needs_pipeline: whether the pipeline must be open: to draw, or for the arguments that the record lacks.
    """

    pending: list[int]
    later: list[int]
    needs_pipeline: bool


@dataclass(frozen=True)
class _Run:
    """All that a pipeline call of a run needs; ``pipe`` is None when nothing is left to be drawn."""

    request: Request
    folder: RunFolder
    processes: Processes
    pipe: Any
    call: dict[str, Any]


@dataclass(frozen=True)
class _End:
    """Where a run ended: after how many chunks, and by which verdict."""

    chunks: int
    verdict: dict[str, Any] | None


def generate_run(
    request: Request,
    out: Path | None = None,
    *,
    pipe: Any = None,
    digest: str = "",
    overwrite: bool = False,
    stop_after: int | None = None,
    early: Early | None = None,
    progress: bool = False,
    command: list[str] | None = None,
) -> dict[str, Any]:
    """Generate a request's images into a folder and return the record that is also in its ``run.json``.

    The returned record also names the folder ("out"), the number of images that this call drew ("drawn"), the number of
    processes and the rank of this one. A folder with part of the same run is continued; only its missing or damaged
    chunks are drawn.

    Args:
        request: what to generate.
        out: the folder; images are named by their id. None names one in ``./out`` after the request.
        pipe: an open pipeline to use as it is, its methods included, under the name ``request.model``. None opens one.
        digest: of an open pipeline's weights, so that a folder does not mix images of two; "" when there is no need.
        overwrite: discard another run's files in ``out``.
        stop_after: draw at most this many chunks now and leave the rest to a later call; the record is then unfinished.
        early: end the run as soon as this is proven; the record's "until" holds the verdict. The same request without
            it continues to the last picture.
        progress: show a bar on stderr.
        command: the command line, for the record.

    Raises:
        DiffAccelError: for a folder that holds another run (naming what differs), that another process writes, or
            that cannot be written, and for whatever in the request the model cannot do. Nothing is written then.
        RunFailed: when generation cannot go on, for example for lack of memory. Finished images are kept.
    """
    request = request.with_model_defaults()
    check_writable(out or Path(OUT))
    request, model, processes = _resolve(request, pipe, digest)
    with cpu_threads(request.threads), contextlib.ExitStack() as locks:
        folder = _checked_folder(request, model, out, overwrite, command)
        if processes.rank == 0:
            locks.enter_context(folder)
        work = _remaining(folder, early, stop_after, overwrite)
        if work is None:
            return _result(folder, processes, drawn=0)
        call: dict[str, Any] = {}
        if work.needs_pipeline:
            with failures(request, folder):
                pipe = _open(request, model, progress) if pipe is None else pipe
                call = _checked_call(pipe, request)
        run = _Run(request, folder, processes, pipe, call)
        processes.wait()
        if processes.rank == 0:
            folder.prepare(overwrite)
        processes.wait()
        end = _draw_stages(run, work, early, progress)
        if end is not None:
            if processes.rank == 0:
                folder.close(call, upto=end.chunks, until=end.verdict)
            processes.wait()
        drawn = [number for number in work.pending if end is None or number < end.chunks]
    return _result(folder, processes, drawn=sum(len(folder.chunks[number]) for number in drawn))


# -- before anything is written ---------------------------------------------------------------------------------------


def _resolve(request: Request, pipe: Any, digest: str) -> tuple[Request, _Model, Processes]:
    """Find the model and the processes that share the run, and check what the model draws from.

    The methods of an open pipeline become those of the request.
    """
    if pipe is not None:
        check_subjects(pipe, request)
        state = active(pipe)
        request = replace(request, methods=tuple(state.configs) if state else ())
        request = _with_made_steps(request, steps_of_student(getattr(pipe, "scheduler", None)))
        return request, _Model(Path(), digest, pipe.device, pipe.dtype), Processes()
    processes, device = join(loading.pick_device(request.device))
    dtype = loading.pick_dtype(request.dtype, device)
    files, digest = loading.locate(request.model)
    cls = loading.pipeline_class(files)
    if cls is not None:  # before the weights are loaded
        check_subjects(cls, request)
        check_settings(cls, request)
    request = _with_made_steps(request, loading.student_steps(files), tells=processes.rank == 0)
    return request, _Model(files, digest, device, dtype), processes


def _with_made_steps(request: Request, made: int | None, tells: bool = True) -> Request:
    """Return the request with the number of steps that a distilled student makes, and say where another was asked."""
    if made is None or request.steps in (None, made):
        return request
    if tells:
        logger.warning(
            "'%s' is a distilled student of %d step%s: steps=%d is not followed, and the record says %d.",
            request.model, made, "s" * (made != 1), request.steps, made,
        )  # fmt: skip
    return replace(request, steps=made)


def _checked_folder(
    request: Request, model: _Model, out: Path | None, overwrite: bool, command: list[str] | None
) -> RunFolder:
    """Return the run's folder with its started record, after checking that the run fits into it."""
    settings = request.settings(model.digest, model.device, model.dtype)
    device = record.describe_device(model.device)
    new = record.Record(kind=record.SAMPLE, settings=settings, command=list(command or ()), device=device)
    folder = RunFolder(out or Path(OUT) / _name(request, new), new, request.chunks())
    folder.check(overwrite)
    return folder


def _name(request: Request, new: record.Record) -> str:
    """Return a folder name that tells runs apart: the same request finds its folder again."""
    subject = request.subjects[0] or Path(request.model).name
    words = re.sub(r"[^a-z0-9]+", "-", subject.lower()).strip("-")[:40].strip("-")
    return f"{words or 'images'}-{new.fingerprint[:8]}"


def _remaining(folder: RunFolder, early: Early | None, stop_after: int | None, overwrite: bool) -> _Work | None:
    """Return the chunks that are left to be drawn; None when the run is finished."""
    finished = {} if overwrite else folder.finished()
    old = {} if overwrite else folder.old() or {}
    same_rule = early is None or old.get("until", {}).get("rule") == early.rule
    required = old["until"]["chunks"] if early is not None and same_rule else len(folder.chunks)
    if same_rule and old.get("state") == "finished" and all(number in finished for number in range(required)):
        return None
    missing = [number for number in range(len(folder.chunks)) if number not in finished]
    pending = missing[:stop_after]
    return _Work(pending, missing[len(pending) :], needs_pipeline=bool(pending) or not old.get("call"))


def _open(request: Request, model: _Model, progress: bool) -> Any:
    """Open the request's pipeline; its own bar of steps is shown below that of images on a terminal."""
    pipe = loading.open_pipeline(request, model.folder, model.device, model.dtype)
    steps = progress and sys.stderr.isatty()
    pipe.set_progress_bar_config(disable=not steps, desc="steps", position=1, leave=False, delay=2)
    return pipe


def _checked_call(pipe: Any, request: Request) -> dict[str, Any]:
    """Return the arguments of every pipeline call, after checking them and the request's classes."""
    call = call_arguments(pipe, request)
    if source_of(pipe) == "class":
        class_labels(pipe, [item.prompt or "" for item in request.items()])
    return call


# -- drawing ----------------------------------------------------------------------------------------------------------


def _draw_stages(run: _Run, work: _Work, early: Early | None, progress: bool) -> _End | None:
    """Draw the pending chunks from look to look; None when chunks were left to a later call."""
    folder, pending = run.folder, work.pending
    end: _End | None = None
    stages = [len(folder.chunks)] if early is None else early.stages(folder)
    with _bar(run, pending, progress) as bar:
        for upto in stages:
            numbers = [number for number in pending if number < upto]
            pending = pending[len(numbers) :]
            if numbers:
                _draw(run, numbers, bar)
            if work.later and work.later[0] < upto:
                return None
            end = _End(upto, None if early is None else _look(run, early, upto))
            if end.verdict is not None and end.verdict["verdict"] != GO_ON:
                break
    return end


def _draw(run: _Run, numbers: list[int], bar: Any) -> None:
    """Draw this process's share of some chunks; all of them are there when it returns."""
    folder, processes = run.folder, run.processes
    with failures(run.request, folder, folder.abandon if processes.size == 1 else None):
        searches = _searches(run.pipe)
        shared = searches and _shares(run.pipe) and len(numbers) < processes.size  # all share each call of a search
        for number in numbers if shared else numbers[processes.rank :: processes.size]:
            chunk = folder.chunks[number]
            traces = folder.path / (SEARCH if searches else TRACES) / f"{number:05d}"
            if processes.rank == 0 or not shared:
                folder.begin(number)
            images, cost, profile = generate_chunk(
                run.pipe, chunk, run.call, frame_rate(run.pipe, run.request),
                folder=traces if searches or _leaves_files(run.pipe) else None, shared=shared,
            )  # fmt: skip
            latents = profile.latents(len(images)) if run.request.latents else None
            if processes.rank == 0 or not shared:
                noise = [] if searches else profile.noise_sha256(len(chunk))  # of a search it is one of many
                folder.add(number, images, run.call, cost, noise=noise, latents=latents)
            bar.update(len(images))
    processes.wait()


def _look(run: _Run, early: Early, upto: int) -> dict[str, Any]:
    """Return the verdict on the first ``upto`` chunks, found by the first process and shared with all."""
    verdict = early.look(run.folder.path, run.folder.so_far(upto)) if run.processes.rank == 0 else None
    return {**run.processes.share(verdict), "rule": early.rule, "chunks": upto}


def _searches(pipe: Any) -> bool:
    """Return whether the pipeline's loop is a search, which leaves files."""
    state = active(pipe)
    return state is not None and state.loop is not None and state.loop.searches


def _shares(pipe: Any) -> bool:
    """Return whether all processes of a launch may make one call of the pipeline's search together."""
    state = active(pipe)
    return bool(state is not None and getattr(state.loop, "shares_calls", True))


def _leaves_files(pipe: Any) -> bool:
    """Return whether the pipeline's loop leaves files beside its pictures, without being a search."""
    state = active(pipe)
    return state is not None and getattr(state.loop, "leaves_files", False)


def _result(folder: RunFolder, processes: Processes, drawn: int) -> dict[str, Any]:
    place = {"out": str(folder.path), "rank": processes.rank, "processes": processes.size, "drawn": drawn}
    return {**place, **(folder.old() or {})}


def _bar(run: _Run, pending: list[int], shown: bool) -> Any:
    """Return a bar of this process's share of images, shown by the first process after a second."""
    from tqdm import tqdm

    processes = run.processes
    total = sum(len(run.folder.chunks[number]) for number in pending[:: processes.size])
    label = None if processes.size == 1 else f"1 of {processes.size} processes"
    unit = "video" if run.pipe is not None and "num_frames" in call_parameters(run.pipe) else "image"
    return tqdm(total=total, desc=label, unit=unit, disable=not shown or processes.rank > 0, delay=1)
