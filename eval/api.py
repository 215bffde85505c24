"""``diffaccel.eval.compare``: two or more ways to draw the same pictures, measured side by side, in one call."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffaccel import zoo
from diffaccel.errors import DiffAccelError
from diffaccel.eval import report as reports
from diffaccel.eval.comparison import compare_runs
from diffaccel.eval.comparison.measures import Measures
from diffaccel.eval.comparison.result import Comparison
from diffaccel.eval.sets import requests as subjects
from diffaccel.eval.sets.candidates import Side, is_pipeline, side
from diffaccel.eval.sets.run import Run, open_run
from diffaccel.eval.timing.turns import take_turns
from diffaccel.runs import loading as opening
from diffaccel.runs.request import Request

JUDGE, BATCH = "emoji-clip-judge", 8
Progress = Callable[[str], None]


def compare(
    baseline: Any,
    candidate: Any,
    *more: Any,
    prompts: str | Sequence[str] | None = None,
    seeds: int | Sequence[int] | None = None,
    model: Any = None,
    out: str | Path | None = None,
    report: str | Path | None = None,
    extractors: Sequence[str] | None = None,
    clips: Sequence[str] | None = None,
    reference: Any = None,
    other_seeds: bool | str | Path = True,
    turns: int = 0,
    progress: Progress = lambda text: None,
    measures: dict[str, Any] | None = None,
    **call: Any,
) -> Comparison:
    """Draw the same prompts and seeds in every way, and measure what each costs and how it differs from the baseline.

    >>> import diffaccel.eval
    >>> found = diffaccel.eval.compare("plain:steps=8", "dpmpp2m:steps=4", prompts=["a red apple", "two cats"])
    >>> print(found.table())

    Args:
        baseline, candidate, more: each a run's folder, a variant such as ``"plain:steps=8"``, a config or a list of
            configs, an open pipeline (with methods on it or without), or a function ``(prompts, seeds) -> uint8
            (N, 3, H, W)``.
        prompts: texts, a file of them, or a packaged set; class names for a model that draws classes. None takes those
            of a run among the sides, else the first 100 of ``emoji-1000``.
        seeds: of the first picture, and picture ``i`` takes ``seeds + i``; or consecutive seeds, one a picture, so many
            that every prompt gets as many. The same on all sides. None takes those of a run among them, else 0.
        model: what variants and configs run on: a name of the zoo, a folder, a hub id, or an open pipeline. None takes
            the first open pipeline among the sides, else the model of a run among them, else the zoo's default.
        out: a folder that keeps the pictures; the same call goes on where it was stopped. None uses a temporary one
            that lives as long as what is returned.
        report: a folder for ``report.json``, ``report.md`` and ``report.html``.
        extractors: networks for distances of distributions, which need 100 pictures a side; None takes "tiny", and
            none for videos.
        clips: CLIPs for the fit to the prompts; None takes the zoo's judge for the zoo's models, and none for others.
        reference: images, or a file of statistics, that distributions are compared with; None for the baseline's own.
        other_seeds: draw the baseline with other seeds too, for what chance alone does; or that run's folder. A
            baseline that is a folder already is not drawn again.
        turns: time so many calls of every side in turns, where all of them are variants or configs; 0 for none, and
            seconds are then those of the runs themselves.
        progress: told what is done now.
        measures: more of what :class:`diffaccel.eval.comparison.measures.Measures` has, such as ``distances``.
        call: ``steps``, ``size`` (height, width), ``guidance``, ``negative``, ``batch`` (default 8), ``dtype``,
            ``device``, ``threads`` and ``latents`` of every side that is drawn now, as
            :class:`diffaccel.runs.request.Request` has them.

    Returns:
        What was measured: ``table()`` shows it, ``row(metric, run)`` finds a number.

    Raises:
        DiffAccelError: for a side that is none of these, runs that are not of the same pictures, and whatever the
            model cannot do.
    """
    given = (baseline, candidate, *more)
    host = model if is_pipeline(model) else None
    if model is None:
        host = next((what for what in given if is_pipeline(what)), None)
    sides = named([side(what, host=host) for what in given])
    request = _request(sides, host, model, prompts, seeds, call)
    if clips is None:
        clips = (JUDGE,) if request.model in zoo.names() and request.prompts else ()
    folder = Path(tempfile.mkdtemp(prefix="diffaccel-")) if out is None else Path(out)
    try:
        runs = [_drawn(each, request, folder, progress) for each in sides]
        others = _others(other_seeds, sides[0], request, folder, progress)
        if extractors is None:
            extractors = () if runs[0].is_video else ("tiny",)
        timing = None
        if turns:
            timing = _timed(sides, host, request, turns, progress)
        chosen = Measures.named(
            others=others, extractors=extractors, clips=clips, reference=reference, timing=timing,
            device=request.device, **(measures or {}),
        )  # fmt: skip
        found = compare_runs(runs[0], runs[1:], chosen, progress=progress)
        if report is not None:
            reports.write(found, Path(report))
    except BaseException:
        if out is None:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    if out is None:
        weakref.finalize(found, shutil.rmtree, folder, ignore_errors=True)
    return found


def named(sides: Sequence[Run | Side]) -> list[Run | Side]:
    """The sides with a name each that no other has: a second ``plain`` becomes ``plain-2``."""
    found: list[Run | Side] = []
    taken: set[str] = set()
    for each in sides:
        name = next(n for n in (each.name, *(f"{each.name}-{i}" for i in range(2, 1000))) if n not in taken)
        taken.add(name)
        found.append(each if name == each.name else replace(each, name=name))
    return found


def _request(
    sides: Sequence[Run | Side],
    host: Any,
    model: Any,
    prompts: str | Sequence[str] | None,
    seeds: int | Sequence[int] | None,
    call: dict[str, Any],
) -> Request:
    """The pictures that all sides show."""
    known = next((each.record["settings"] for each in sides if isinstance(each, Run) and each.record), None)
    changes = dict(call)
    if host is not None:
        changes["model"] = subjects.name_of(host)
    elif model is not None:
        changes["model"] = str(model)
    try:
        request = subjects.again(known, **changes) if known else Request(**{"batch": BATCH, **changes})
    except TypeError as error:
        raise DiffAccelError(f"compare takes no such setting ({error}). See diffaccel.runs.request.Request.") from error
    if not any(isinstance(each, Side) for each in sides):
        return request
    pipeline = host
    if host is None and any(isinstance(each, Side) and each.variant is not None for each in sides):
        pipeline = opening.pipeline_class(request.model)
    texts = subjects.texts_of(prompts)
    if texts or not known:
        request = subjects.drawing(pipeline, request, texts)
    return request if seeds is None else _with_seeds(request, seeds)


def _with_seeds(request: Request, seeds: int | Sequence[int]) -> Request:
    if isinstance(seeds, int):
        return replace(request, seed=seeds)
    numbers, count = list(seeds), len(request.subjects)
    if not numbers or numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        raise DiffAccelError(f"seeds are {numbers[:6]}; they must be consecutive, as range(0, {count}) is.")
    if len(numbers) % count:
        raise DiffAccelError(f"{len(numbers)} seeds do not go evenly to {count} prompts. Give a multiple of {count}.")
    return replace(request, seed=numbers[0], num=len(numbers) // count)


def _drawn(each: Run | Side, request: Request, folder: Path, progress: Progress) -> Run:
    if isinstance(each, Run):
        return each
    progress(f"{each.name}: {len(request)} pictures")
    return replace(each.draw(request, folder / each.name), name=each.name)


def _others(
    wanted: bool | str | Path, baseline: Run | Side, request: Request, folder: Path, progress: Progress
) -> Run | None:
    if not isinstance(wanted, bool):
        return open_run(wanted)
    if not wanted or isinstance(baseline, Run):
        return None
    again = replace(baseline, name=f"{baseline.name}-other-seeds")
    return _drawn(again, replace(request, seed=request.seed + len(request)), folder, progress)


def _timed(sides: Sequence[Run | Side], host: Any, request: Request, turns: int, progress: Progress) -> dict[str, Any]:
    chosen = [each.variant for each in sides if isinstance(each, Side) and each.variant is not None]
    if len(chosen) < len(sides):
        raise DiffAccelError("Only variants and configs can be timed in turns. Leave turns out, or give only those.")
    pipe = opening.open_plain(request) if host is None else host
    return take_turns(pipe, request, chosen, turns=turns, progress=progress)
