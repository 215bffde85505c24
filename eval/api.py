"""``diffaccel.eval.compare``: two or more ways to draw the same pictures, measured side by side, in one call."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffaccel import zoo
from diffaccel.errors import DiffAccelError
from diffaccel.eval.comparison import compare_runs
from diffaccel.eval.comparison.measures import Measures
from diffaccel.eval.comparison.result import Comparison
from diffaccel.eval.report import check_folder
from diffaccel.eval.report import write as write_report
from diffaccel.eval.sets import requests
from diffaccel.eval.sets.candidates import Candidate, is_pipeline
from diffaccel.eval.sets.candidates import candidate as to_candidate
from diffaccel.eval.sets.run import Run, open_run
from diffaccel.eval.timing.turns import take_turns
from diffaccel.eval.uncertainty.turns import LONG
from diffaccel.runs import loading
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
    >>> comparison = diffaccel.eval.compare("plain:steps=8", "dpmpp2m:steps=4", prompts=["a red apple", "two cats"])
    >>> print(comparison.table())

    Args:
        baseline, candidate, more: each a run's folder, a variant such as ``"plain:steps=8"``, a config or a list of
            configs, an open pipeline (with methods on it or without; the steps of its preset replace ``steps``, as a
            variant's do), or a function ``(prompts, seeds) -> uint8 (N, 3, H, W)``.
        prompts: texts, a file of them, or a packaged set; class names for a model that draws classes. None takes those
            of a run among the candidates, else the first 100 of ``emoji-1000``.
        seeds: of the first picture, and picture ``i`` takes ``seeds + i``; or consecutive seeds, one a picture, so many
            that every prompt gets as many. The same for all candidates. None takes those of a run among them, else 0.
        model: what variants and configs run on: a name of the zoo, a folder, a hub id, or an open pipeline. None takes
            the first open pipeline among the candidates, else the model of a run among them, else the zoo's default.
        out: a folder that keeps the pictures; the same call goes on where it was stopped. None uses a temporary one
            that lives as long as what is returned.
        report: a folder for ``report.json``, ``report.md`` and ``report.html``.
        extractors: networks for distances of distributions, which need 100 pictures a run; None takes "tiny", that of
            the shipped statistics for a zoo model that has some (see ``reference``), and none for videos.
        clips: CLIPs for the fit to the prompts; None takes the zoo's judge for the zoo's models, and none for others.
        reference: images, or a file of statistics, that distributions are compared with; "none" for the baseline's own.
            None takes the statistics of the training pictures that ship for a zoo model, where ``extractors`` are not
            named, else the baseline's own.
        other_seeds: draw the baseline with other seeds too, as the noise floor of every metric; or that run's folder.
            A baseline that is a folder already is not drawn again.
        turns: number of timed calls of every candidate, in turns, where all of them are variants or configs; 0 for
            none, and seconds are then those of the runs themselves.
        progress: called with a line of text at every step.
        measures: further attributes of :class:`diffaccel.eval.comparison.measures.Measures`, such as ``distances``.
        call: ``steps``, ``size`` (height, width), ``guidance``, ``negative``, ``batch`` (default 8), ``dtype``,
            ``device``, ``threads`` and ``latents`` of every candidate that is drawn now, as
            :class:`diffaccel.runs.request.Request` has them.

    Returns:
        What was measured: ``table()`` shows it, ``row(metric, run)`` finds a number.

    Raises:
        DiffAccelError: for a candidate that is none of these, runs that are not of the same pictures, and whatever the
            model cannot do.
    """
    if report is not None:
        check_folder(Path(report))
    values = (baseline, candidate, *more)
    host = _host(model, values)
    candidates = with_unique_names([to_candidate(value, host=host) for value in values])
    request = _request(candidates, host, model, prompts, seeds, call)
    plan = ComparisonPlan(
        candidates=candidates, host=host, request=request, other_seeds=other_seeds, turns=turns, extractors=extractors,
        clips=_default_clips(request) if clips is None else clips, reference=reference, measures=measures or {},
    )  # fmt: skip
    folder = Path(tempfile.mkdtemp(prefix="diffaccel-")) if out is None else Path(out)
    try:
        runs, others = _draw(plan, folder, progress)
        comparison = _measure(plan, runs, others, progress)
        if report is not None:
            write_report(comparison, Path(report))
    except BaseException:
        if out is None:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    if out is None:
        weakref.finalize(comparison, shutil.rmtree, folder, ignore_errors=True)
    return comparison


@dataclass(frozen=True, kw_only=True)
class ComparisonPlan:
    """What is compared, what it is drawn from, and how it is measured.

    Attributes:
        candidates: the baseline, then the others, each of another name.
        host: an open pipeline that variants and configs are put on; None opens the request's model.
        request: prompts, seeds and call settings of every candidate that is drawn now.
        other_seeds: whether the baseline is drawn with other seeds too; or the folder of that run.
        turns: timed calls of every candidate; 0 for none.
        extractors: networks for distances of distributions; None for the default of the runs' kind.
        clips: CLIPs for the fit to the prompts.
        reference: images, or a file of statistics, that distributions are compared with.
        measures: further attributes of :class:`Measures`.
    """

    candidates: Sequence[Run | Candidate]
    host: Any
    request: Request
    other_seeds: bool | str | Path
    turns: int
    extractors: Sequence[str] | None
    clips: Sequence[str]
    reference: Any
    measures: dict[str, Any]


# -- the plan ---------------------------------------------------------------------------------------------------------


def _host(model: Any, values: Sequence[Any]) -> Any:
    """Return the open pipeline that variants and configs are put on: the model, else the first one among the values."""
    if model is None:
        return next((value for value in values if is_pipeline(value)), None)
    return model if is_pipeline(model) else None


def with_unique_names(candidates: Sequence[Run | Candidate]) -> list[Run | Candidate]:
    """Rename candidates so that no two share a name: a second ``plain`` becomes ``plain-2``."""
    renamed: list[Run | Candidate] = []
    taken: set[str] = set()
    for item in candidates:
        name = next(n for n in (item.name, *(f"{item.name}-{i}" for i in range(2, 1000))) if n not in taken)
        taken.add(name)
        renamed.append(item if name == item.name else replace(item, name=name))
    return renamed


def _request(
    candidates: Sequence[Run | Candidate],
    host: Any,
    model: Any,
    prompts: str | Sequence[str] | None,
    seeds: int | Sequence[int] | None,
    call: dict[str, Any],
) -> Request:
    """Return the request of the pictures that all candidates show: that of a run among them, with what was changed."""
    settings = next((run.record["settings"] for run in candidates if isinstance(run, Run) and run.record), None)
    changes = dict(call)
    if host is not None:
        changes["model"] = requests.pipeline_name(host)
    elif model is not None:
        changes["model"] = str(model)
    try:
        request = requests.from_settings(settings, **changes) if settings else Request(**{"batch": BATCH, **changes})
    except TypeError as error:
        raise DiffAccelError(f"compare takes no such setting ({error}). See diffaccel.runs.request.Request.") from error
    drawn = [item for item in candidates if isinstance(item, Candidate)]
    if not drawn:
        return request
    pipeline = host
    if host is None and any(item.variant is not None for item in drawn):
        pipeline = loading.pipeline_class(request.model)
    texts = requests.load_texts(prompts)
    if texts or not settings:
        request = requests.with_texts(request, texts, pipeline)
    return request if seeds is None else _with_seeds(request, seeds)


def _with_seeds(request: Request, seeds: int | Sequence[int]) -> Request:
    """Return the request with a first seed, or with as many pictures of each prompt as consecutive seeds are for."""
    if isinstance(seeds, int):
        return replace(request, seed=seeds)
    numbers, count = list(seeds), len(request.subjects)
    if not numbers or numbers != list(range(numbers[0], numbers[0] + len(numbers))):
        raise DiffAccelError(f"seeds are {numbers[:6]}; they must be consecutive, as range(0, {count}) is.")
    if len(numbers) % count:
        raise DiffAccelError(f"{len(numbers)} seeds do not go evenly to {count} prompts. Give a multiple of {count}.")
    return replace(request, seed=numbers[0], num=len(numbers) // count)


def _default_clips(request: Request) -> tuple[str, ...]:
    return (JUDGE,) if request.model in zoo.names() and request.prompts else ()


# -- drawing ----------------------------------------------------------------------------------------------------------


def _draw(plan: ComparisonPlan, folder: Path, progress: Progress) -> tuple[list[Run], Run | None]:
    """Draw every candidate into a folder of its own; return the runs, and the baseline's run of other seeds."""
    runs = [_draw_candidate(item, plan.request, folder, progress) for item in plan.candidates]
    return runs, _draw_other_seeds(plan, folder, progress)


def _draw_candidate(item: Run | Candidate, request: Request, folder: Path, progress: Progress) -> Run:
    if isinstance(item, Run):
        return item
    progress(f"{item.name}: {len(request)} pictures")
    return replace(item.draw(request, folder / item.name), name=item.name)


def _draw_other_seeds(plan: ComparisonPlan, folder: Path, progress: Progress) -> Run | None:
    if not isinstance(plan.other_seeds, bool):
        return open_run(plan.other_seeds)
    baseline, request = plan.candidates[0], plan.request
    if not plan.other_seeds or isinstance(baseline, Run):
        return None
    renamed = replace(baseline, name=f"{baseline.name}-other-seeds")
    return _draw_candidate(renamed, replace(request, seed=request.seed + len(request)), folder, progress)


# -- measuring --------------------------------------------------------------------------------------------------------


def _measure(plan: ComparisonPlan, runs: Sequence[Run], others: Run | None, progress: Progress) -> Comparison:
    """Time the candidates in turns where that is asked for, load the networks and measure every run."""
    timing = _time(plan, progress) if plan.turns else None
    measures = Measures.load(
        others=others, extractors=plan.extractors, clips=plan.clips, reference=plan.reference, timing=timing,
        device=plan.request.device, baseline=runs[0], **plan.measures,
    )  # fmt: skip
    return compare_runs(runs[0], runs[1:], measures, progress=progress)


def _time(plan: ComparisonPlan, progress: Progress) -> dict[str, Any]:
    """Time the variants of the candidates in turns on one pipeline."""
    variants = [item.variant for item in plan.candidates if isinstance(item, Candidate) and item.variant is not None]
    if len(variants) < len(plan.candidates):
        raise DiffAccelError("Only variants and configs can be timed in turns. Leave turns out, or give only those.")
    pipe = loading.open_plain(plan.request) if plan.host is None else plan.host
    return take_turns(pipe, plan.request, variants, turns=plan.turns, meter_seconds=LONG, progress=progress)
