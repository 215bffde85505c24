"""Run a request into a folder, resumable, by any number of processes: images, or videos.

Work is cut into chunks of consecutive images, one pipeline call each. A run that was stopped makes its unfinished
chunks anew and nothing else, and processes take whole chunks, so the files come out the same however often a run was
stopped and however many processes shared it.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffaccel import record
from diffaccel.compose import Active, active, summary
from diffaccel.errors import DiffAccelError, first_line
from diffaccel.families import find
from diffaccel.files import Clip
from diffaccel.runs import loading as opening
from diffaccel.runs.call_arguments import (
    call_arguments,
    call_parameters,
    check_subjects,
    class_labels,
    frame_rate,
    source_of,
)
from diffaccel.runs.folder import RunFailed, RunFolder, check_writable
from diffaccel.runs.processes import World, join_world
from diffaccel.runs.request import Item, Request

if TYPE_CHECKING:
    from diffaccel.runs import profile as meter

OUT = "out"
SEARCH = "search"  # folder of a run where searches leave their traces, one for each call
GO_ON = "go on"  # the verdict of a look that proves nothing yet
_NO_MEMORY = re.compile(r"out of memory|not enough memory|can't allocate memory", re.IGNORECASE)


@dataclass(frozen=True)
class Early:
    """When a run may end before its last picture.

    Attributes:
        rule: what is to be proven, as the record tells it.
        looks: numbers of pictures after which to look, growing; each is rounded up to whole chunks.
        look: from the run's folder and a record of the pictures so far to what they prove, JSON-ready: its "verdict" is
            :data:`GO_ON` while nothing is proven.
    """

    rule: str
    looks: tuple[int, ...]
    look: Callable[[Path, dict[str, Any]], dict[str, Any]]

    def stages(self, folder: RunFolder) -> list[int]:
        """The looks as numbers of chunks; the last is that of the whole run."""
        ends = list(itertools.accumulate(map(len, folder.chunks)))
        found = {next((i for i, end in enumerate(ends, 1) if end >= look), len(ends)) for look in self.looks}
        return sorted(found | {len(ends)})


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
    """Generate a request's images into a folder and return the record that is also in its ``run.json``, with the
    folder itself as ``"out"``, and how many processes shared the work and which one this is.

    A folder with part of the same run is continued; only its missing or damaged chunks are made.

    Args:
        request: what to generate.
        out: the folder; images are named by their id. None names one in ``./out`` after the request.
        pipe: an open pipeline to use as it is, its methods included, under the name ``request.model``. None opens one.
        digest: of an open pipeline's weights, so that a folder does not mix images of two; "" when there is no need.
        overwrite: throw away what another run left in ``out``.
        stop_after: make at most so many chunks now and leave the rest to a later call; the record is then unfinished.
        early: end the run as soon as this is proven; what was proven is the record's "until". The same request without
            it goes on to the last picture.
        progress: show a bar on stderr.
        command: the command line, for the record.

    Raises:
        DiffAccelError: for a folder that holds another run (naming what differs) or cannot be written, and for
            whatever in the request the model cannot do. Nothing is written then.
        RunFailed: when generation cannot go on, say for want of memory. Finished images stay.
    """
    request = request.with_model_defaults()
    check_writable(out or Path(OUT))
    source = Path()
    if pipe is None:
        world, device = join_world(request.device)
        dtype = opening.pick_dtype(request.dtype, device)
        source, digest = opening.locate(request.model)
        if not request.prompts:
            _check_class(source, request)
    else:
        check_subjects(pipe, request)
        world, device, dtype, state = World(), pipe.device, pipe.dtype, active(pipe)
        request = replace(request, methods=tuple(state.configs) if state else ())
    with _threads(request.threads):
        settings, about = request.settings(digest, device, dtype), record.describe_device(device)
        new = record.Record(kind=record.SAMPLE, settings=settings, command=list(command or ()), device=about)
        folder = RunFolder(out or Path(OUT) / _name(request, new), new, request.chunks())
        folder.check(overwrite)
        done = {} if overwrite else folder.finished()
        old = {} if overwrite else folder.old() or {}
        known = early is None or old.get("until", {}).get("rule") == early.rule
        wanted = old["until"]["chunks"] if early is not None and known else len(folder.chunks)
        if known and old.get("state") == "finished" and all(number in done for number in range(wanted)):
            return _result(folder, world)
        missing = [number for number in range(len(folder.chunks)) if number not in done]
        pending = missing[:stop_after]
        left = missing[len(pending) :]
        call: dict[str, Any] = {}
        if pending or not old.get("call"):
            with _failures(request, folder):
                if pipe is None:
                    pipe = opening.open_pipeline(request, source, device, dtype)
                    steps = progress and sys.stderr.isatty()
                    pipe.set_progress_bar_config(disable=not steps, desc="steps", position=1, leave=False, delay=2)
                call = call_arguments(pipe, request)
                if source_of(pipe) == "class":
                    class_labels(pipe, [item.prompt or "" for chunk in folder.chunks for item in chunk])
        world.wait()
        if world.rank == 0:
            folder.prepare(overwrite)
        world.wait()
        stages = [len(folder.chunks)] if early is None else early.stages(folder)
        proven: dict[str, Any] | None = None
        with _bar(pipe, folder, pending, world, progress) as bar:
            for upto in stages:
                now = [number for number in pending if number < upto]
                pending = pending[len(now) :]
                if now:
                    _make(pipe, request, call, folder, now, world, bar)
                if left and left[0] < upto:
                    return _result(folder, world)
                if early is not None:
                    found = early.look(folder.path, folder.so_far(upto)) if world.rank == 0 else None
                    proven = {**world.share(found), "rule": early.rule, "chunks": upto}
                    if proven["verdict"] != GO_ON:
                        break
        if world.rank == 0:
            folder.close(call, upto=upto, until=proven)
        world.wait()
    return _result(folder, world)


def _make(
    pipe: Any,
    request: Request,
    call: dict[str, Any],
    folder: RunFolder,
    numbers: list[int],
    world: World,
    bar: Any,
) -> None:
    """This process's share of some chunks; all of them are there when it returns."""
    with _failures(request, folder, folder.abandon if world.size == 1 else None):
        search = _search(pipe)
        together = search is not None and len(numbers) < world.size  # they share each call of a search
        for number in numbers if together else numbers[world.rank :: world.size]:
            chunk = folder.chunks[number]
            if search is not None:
                search.folder, search.shared = folder.path / SEARCH / f"{number:05d}", together
            images, cost, measured = generate_chunk(pipe, chunk, call, frame_rate(pipe, request))
            latents = measured.latents if request.latents else None
            if world.rank == 0 or not together:
                folder.add(number, images, call, cost, noise=measured.noise_sha256(len(chunk)), latents=latents)
            bar.update(len(images))
    world.wait()


def _search(pipe: Any) -> Active | None:
    """What is active on a pipeline whose loop is a search: it leaves files, and processes may share its calls."""
    state = active(pipe)
    return state if state is not None and state.loop is not None and state.loop.searches else None


def _result(folder: RunFolder, world: World) -> dict[str, Any]:
    return {"out": str(folder.path), "rank": world.rank, "processes": world.size, **(folder.old() or {})}


def _name(request: Request, new: record.Record) -> str:
    """A folder name that tells runs apart: the same request finds its folder again."""
    about = request.subjects[0] or Path(request.model).name
    words = re.sub(r"[^a-z0-9]+", "-", about.lower()).strip("-")[:40].strip("-")
    return f"{words or 'images'}-{new.fingerprint[:8]}"


def _check_class(source: Path, request: Request) -> None:
    """Missing prompts are worth a look at the pipeline's class before its weights are loaded."""
    cls = opening.pipeline_class(source)
    if cls is not None:
        check_subjects(cls, request)


def generate_chunk(
    pipe: Any, chunk: list[Item], call: dict[str, Any], fps: float
) -> tuple[list[Any], dict[str, Any], meter.Measured]:
    """The pictures, or clips, of one chunk by one pipeline call, what it cost, and what was measured inside it.

    Every image is drawn from a CPU generator with its own seed, so that it depends on neither its neighbours nor the
    device.
    """
    import torch

    from diffaccel.runs import profile as meter

    rows = dict(call)
    if "negative_prompt" in rows:
        rows["negative_prompt"] = [rows["negative_prompt"]] * len(chunk)
    rows |= _subjects(pipe, chunk)
    if "num_frames" in call_parameters(pipe):
        rows["output_type"] = "pil"  # some give arrays by default
    generators = [torch.Generator().manual_seed(item.seed) for item in chunk]
    if pipe.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(pipe.device)
    with meter.measure(pipe) as measured, warnings.catch_warnings():
        # how diffusers tells of not-a-number in a picture, which it then draws black
        warnings.filterwarnings("error", "invalid value encountered in cast", RuntimeWarning)
        made = pipe(generator=generators, **rows)
    frames = getattr(made, "frames", None)
    images = made.images if frames is None else [Clip(list(clip), fps) for clip in frames]
    return images, _cost(pipe, rows, measured), measured


def _subjects(pipe: Any, chunk: list[Item]) -> dict[str, Any]:
    """The arguments that say what each row of a call shows."""
    source = source_of(pipe)
    if source == "nothing":
        return {"batch_size": len(chunk)}
    texts = [item.prompt or "" for item in chunk]
    return {"prompt": texts} if source == "text" else {"class_labels": class_labels(pipe, texts)}


# -- what it cost -----------------------------------------------------------------------------------------------------


def _cost(pipe: Any, call: dict[str, Any], measured: meter.Measured) -> dict[str, Any]:
    """Seconds, whole and by part and by network call; NFE (a guided prediction counts once), rows through the network,
    network calls; peak memory in bytes."""
    run = summary(pipe).last_run
    peak = record.peak_memory(pipe.device)
    if run is not None:
        peak = max(peak or 0, run["peak_memory"]) or None
    return {
        "seconds": round(measured.seconds, 4),
        "nfe": measured.forwards // _branches(pipe, call) if run is None else run["nfe"],
        "forwards": measured.forwards,
        "calls": measured.calls,
        "peak_memory": peak,
        "parts": {part: round(seconds, 4) for part, seconds in measured.parts.items()},
        "steps": [round(seconds, 5) for seconds in measured.steps],
    }


def _branches(pipe: Any, call: dict[str, Any]) -> int:
    """How many rows a stock loop sends through its network for one guided prediction."""
    family = find(pipe)
    if family is not None:
        return 2 if family.guidance_scale(pipe, {**call_parameters(pipe), **call}) is not None else 1
    return 2 if getattr(pipe, "do_classifier_free_guidance", False) else 1


# -- how it can end ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _failures(request: Request, folder: RunFolder, abandon: Callable[[], None] | None = None) -> Iterator[None]:
    """Say in one sentence why a run stopped; one without a finished chunk leaves nothing behind."""
    kept = f"Finished images stay in '{folder.path}', and the same command continues."
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"Stopped. {kept}") from None
    except Exception as error:
        if abandon is not None:
            abandon()
        kept = kept if folder.path.is_dir() else ""
        what, smaller = ("video", "--batch, --frames or --size") if request.frames else ("image", "--batch or --size")
        if _out_of_memory(error):
            raise RunFailed(
                f"Out of memory with {request.batch} {what}s a call on {folder.new.device['type']} "
                f"({first_line(error, 90)}). Try a smaller {smaller}, or --dtype bfloat16. {kept}"
            ) from error
        if isinstance(error, DiffAccelError):
            raise
        if isinstance(error, RuntimeWarning):
            raise RunFailed(
                f"The model gave not-a-number instead of pixels in {folder.new.settings['dtype']}. "
                f"Try another --dtype, --size or --guidance. {kept}"
            ) from error
        what = f"{type(error).__name__} while generating: {first_line(error)}"
        raise RunFailed(f"{what} (DIFFACCEL_DEBUG=1 shows where). {kept}") from error


def _out_of_memory(error: BaseException) -> bool:
    import torch

    kinds = (torch.OutOfMemoryError, MemoryError)
    if isinstance(error, kinds) or isinstance(error.__cause__, kinds):
        return True
    return isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Torch's CPU threads inside the block; 0 leaves them."""
    import torch

    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count:
            torch.set_num_threads(before)


def _bar(pipe: Any, folder: RunFolder, pending: list[int], world: World, shown: bool) -> Any:
    """Images of this process's share, on rank 0; appears when they take longer than a second."""
    from tqdm import tqdm

    total = sum(len(folder.chunks[number]) for number in pending[:: world.size])
    label = None if world.size == 1 else f"1 of {world.size} processes"
    unit = "video" if pipe is not None and "num_frames" in call_parameters(pipe) else "image"
    return tqdm(total=total, desc=label, unit=unit, disable=not shown or world.rank > 0, delay=1)
