"""``tune``: search every method that fits a pipeline, certify what was found, and write a preset."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffaccel import presets, record, zoo
from diffaccel.active import active
from diffaccel.errors import DiffAccelError
from diffaccel.eval.comparison.gate import Gate
from diffaccel.eval.comparison.gate import parse as parse_gate
from diffaccel.eval.comparison.measures import Measures
from diffaccel.eval.report.summary import counted_things
from diffaccel.eval.sets import requests
from diffaccel.eval.sets.candidates import is_pipeline, weights_digest
from diffaccel.eval.tuning import measuring
from diffaccel.eval.tuning.certificate import certify
from diffaccel.eval.tuning.choice import choose
from diffaccel.eval.tuning.halving import Sizes, TuningSearch
from diffaccel.eval.tuning.journal import Journal
from diffaccel.eval.tuning.pipeline_bed import PipelineBed
from diffaccel.eval.tuning.result import Tuned, preset_values
from diffaccel.eval.tuning.rule import COST, Promise, fails_equals
from diffaccel.eval.tuning.sizes import default_budget, least_seconds, sizes_of, split
from diffaccel.eval.tuning.space import TuningSpace, registered
from diffaccel.folder_lock import FolderLock
from diffaccel.runs import loading
from diffaccel.runs.call_arguments import call_arguments, source_of
from diffaccel.runs.request import Request

PRESET, PICTURES, DEFAULT_GATE, NEAREST = "preset.json", "pictures", "ssim<0.9", "ssim<0"
OUT = Path("out") / "tune"
_SUBJECTS_WITHOUT = 200  # pictures of a pipeline that draws from noise alone
Progress = Callable[[str, float, float], None]


@dataclass(frozen=True, kw_only=True)
class TuningPlan:
    """What is tuned for what.

    Attributes:
        request: model and call settings; its steps are the baseline's.
        subjects: prompts or classes to draw tuning and held-out ones from; None each for a model without.
        gate: that no certified plan may fail; None with ``seconds`` alone.
        seconds: a picture's most; the plan nearest to the baseline within it is sought, not the fastest.
        methods: config classes by name.
        budget: seconds.
        seed: of prompts, pictures and the search.
        lpips: weights of LPIPS.
    """

    request: Request
    subjects: Sequence[str | None]
    gate: Gate | None
    seconds: float | None
    methods: dict[str, Any]
    budget: float
    seed: int
    lpips: str | Path | None = None

    @property
    def promise(self) -> Gate:
        """The gate with the limit of seconds."""
        limit = [] if self.seconds is None else [f"seconds>{self.seconds:g}"]
        texts = ([f"({self.gate.text})"] if limit else [self.gate.text]) if self.gate is not None else []
        return parse_gate(" or ".join([*texts, *limit]))

    @property
    def quality(self) -> Gate:
        """What says how near a plan is to the baseline: the gate, else SSIM."""
        if self.gate is None or all(metric in COST for metric in self.gate.metrics):
            return parse_gate(NEAREST)
        return self.gate


def tune(
    model: Any = zoo.DEFAULT,
    *,
    prompts: str | Sequence[str] | None = None,
    fail_if: str | None = None,
    seconds: float | None = None,
    methods: Sequence[str] | None = None,
    budget: float | None = None,
    out: str | Path = OUT,
    seed: int = 0,
    lpips: str | Path | None = None,
    announce: Callable[[str], None] = lambda text: None,
    progress: Progress = lambda text, spent, budget: None,
    **call: Any,
) -> Tuned:
    """Find the fastest plan of which a gate surely does not hold, certify it on held-out prompts, write a preset.

    The search goes on where it was stopped when it is repeated with the same folder.

    Args:
        model: a name of the zoo, a folder, a hub id, or an open pipeline without methods.
        prompts: texts, a file of them, or a packaged set, to draw tuning and held-out prompts from; class names for a
            model that draws classes. None takes ``emoji-1000``.
        fail_if: condition in the words of ``diffaccel eval compare --fail-if``; by default ``ssim<0.9``, unless
            ``seconds`` are given.
        seconds: a picture's most; the plan nearest to the baseline within it is sought.
        methods: names; None takes every registered one that says what may be tuned, and every sampler.
        budget: seconds of the whole tuning; None takes 900 on a GPU and 1800 on a CPU.
        out: folder for the journal, the baseline's pictures and ``preset.json``.
        seed: of prompts, pictures and the search.
        lpips: weights of LPIPS, where the gate names it.
        announce: called with a line of text before the search: the budget, and what is tuned.
        progress: called with what is done next, the seconds spent so far, and the budget.
        call: ``steps`` (the baseline's), ``size``, ``guidance``, ``negative``, ``batch``, ``dtype``, ``device`` and
            ``threads``, as :class:`diffaccel.runs.request.Request` has them.

    Raises:
        DiffAccelError: for an unknown method or metric, too few prompts, a pipeline with methods on it, and a folder
            that holds another tuning.
    """
    pipe = model if is_pipeline(model) else None
    if pipe is not None and active(pipe) is not None:
        raise DiffAccelError("The pipeline has methods on it already. Call diffaccel.remove(pipe) first.")
    gate = DEFAULT_GATE if fail_if is None and seconds is None else fail_if
    rule = None if gate is None else parse_gate(gate)
    for what, value in (("seconds", seconds), ("budget", budget)):  # before the folder keeps them
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (is_number and 0 < value < math.inf):
            got = f"{value:g} seconds" if is_number else repr(value)
            raise DiffAccelError(f"{what} is {got}; it must be a finite number above 0.")
    if rule is not None and fails_equals(rule, measuring.PERFECT):
        raise DiffAccelError(
            f"The rule '{rule.text}' fails also pictures that equal the baseline's, so that no plan could keep it. "
            "Give the loss that is too much, as ssim<0.9 or lpips>0.1."
        )
    classes = registered(methods)
    pipe, request, subjects = _open(pipe, model, prompts, call)
    plan = TuningPlan(
        request=request, subjects=subjects, gate=rule, seconds=seconds, methods=classes, seed=seed, lpips=lpips,
        budget=default_budget(pipe.device.type) if budget is None else budget,
    )  # fmt: skip
    measures = measuring.measures_of(_metrics(plan), lpips=lpips, device=pipe.device)
    folder = Path(out).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(folder)
    lock.acquire()
    bar = dict(getattr(pipe, "_progress_bar_config", {}))
    try:
        return _tune(pipe, plan, measures, folder, announce, progress)
    finally:
        pipe.set_progress_bar_config(**bar)
        lock.release()


def _open(
    pipe: Any, model: Any, prompts: str | Sequence[str] | None, call: dict[str, Any]
) -> tuple[Any, Request, Sequence[str | None]]:
    """Return the open pipeline, the request of the baseline, and what may be drawn."""
    name = str(model) if pipe is None else requests.pipeline_name(pipe)
    texts = requests.load_texts(prompts)
    try:
        request = Request(**{"model": name, **call})
    except TypeError as error:
        raise DiffAccelError(f"tune takes no such setting ({error}). See diffaccel.runs.request.Request.") from error
    if pipe is None:
        pipeline_class = loading.pipeline_class(name)
        source = "text" if pipeline_class is None else source_of(pipeline_class)
        loading.quiet_libraries(name in zoo.names())
    else:
        source = source_of(pipe)
    if source == "text" and not texts:
        texts = requests.load_texts(requests.DEFAULT_SET)
    if source == "class" and not texts:
        raise DiffAccelError(f"'{name}' draws classes. Name them with --prompts FILE, one a line.")
    if source == "nothing" and texts:
        raise DiffAccelError(f"'{name}' draws from noise alone, and takes no prompts. Leave them out.")
    drawn: Sequence[str | None] = texts or [None] * _SUBJECTS_WITHOUT
    first = tuple(texts[:1])
    request = replace(request, classes=first) if source == "class" else replace(request, prompts=first)
    request = request.with_model_defaults()
    pipe = loading.open_plain(request) if pipe is None else pipe
    request = replace(request, steps=call_arguments(pipe, request)["num_inference_steps"])
    return pipe, request, drawn


def _metrics(plan: TuningPlan) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*plan.promise.metrics, *plan.quality.metrics)))


def _tune(
    pipe: Any,
    plan: TuningPlan,
    measures: Measures,
    folder: Path,
    announce: Callable[[str], None],
    progress: Progress,
) -> Tuned:
    digest = weights_digest(pipe)
    pipe.set_progress_bar_config(disable=True)
    metrics = _metrics(plan)
    journal = Journal(folder, _settings(pipe, plan, digest), metrics)
    request = replace(plan.request, latents="latent_error" in metrics)
    bed = PipelineBed(
        pipe, digest, request, {"tuning": plan.subjects[:1]}, folder / PICTURES, metrics, measures, once=journal.once
    )
    call_seconds = journal.once("call seconds", bed.call_seconds)
    sizes = sizes_of(plan.budget, call_seconds, len(set(plan.subjects)) if plan.subjects[0] else len(plan.subjects))
    bed.subjects, bed.first = split(plan.subjects, sizes, plan.seed), sizes.rungs[0]
    announce(_announcement(plan, sizes, call_seconds))
    own = bed.baseline_values()
    space = TuningSpace.of(plan.methods, plan.request.steps or 1)
    promise, quality = Promise(plan.promise, own), Promise(plan.quality, own)
    search = TuningSearch(
        space, bed, promise, quality, journal, sizes, plan.seed,
        lambda text: progress(text, journal.spent(), plan.budget),
    )  # fmt: skip
    search.run()
    chosen = choose(search, best_within_time=plan.seconds is not None)
    values = preset_values(search, chosen, certify(search, chosen), _about(pipe, plan, digest, bed.baseline().name))
    values["search"]["budget"] = plan.budget
    path = folder / PRESET
    presets.write(path, values)
    return Tuned(path, values)


def _settings(pipe: Any, plan: TuningPlan, digest: str) -> dict[str, Any]:
    """Return everything that decides the plan, JSON-ready."""
    settings = plan.request.settings(digest, pipe.device, pipe.dtype)
    own = {"gate": plan.promise.text, "quality": plan.quality.text, "budget": plan.budget, "tuning seed": plan.seed}
    return {**settings, "subjects": list(plan.subjects), "choice": sorted(plan.methods), **own}


def _announcement(plan: TuningPlan, sizes: Sizes, call_seconds: float) -> str:
    aim = f"the fastest plan of which '{plan.promise.text}' does not hold"
    if plan.seconds is not None:
        aim = f"the nearest plan within {plan.seconds:g} s a picture"
    least = least_seconds(sizes, call_seconds)
    warning = f" Even the smallest tuning takes about {least:.3g} s, so that this one takes longer than its budget."
    return (
        f"Budget {plan.budget:g} s, {call_seconds:.3g} s a picture of the baseline "
        f"({counted_things(plan.request.steps or 1, 'steps')}). Looking for {aim}, among "
        f"{', '.join(plan.methods) or 'numbers of steps'}; {sizes.rungs[-1]} prompts to choose by, {sizes.held_out} "
        f"others to certify on.{warning if least > plan.budget else ''}"
    )


def _about(pipe: Any, plan: TuningPlan, digest: str, baseline: str) -> dict[str, Any]:
    settings = plan.request.settings(digest, pipe.device, pipe.dtype)
    way = {
        key: settings[key] for key in ("size", "guidance", "negative", "batch", "dtype", "threads") if key in settings
    }
    measured = {
        "device": record.describe_device(pipe.device), "versions": record.versions(), "baseline": baseline,
        "settings": way, "weights": digest, "gate": plan.promise.text,
    }  # fmt: skip
    return {"measured": measured, "model": {"model": plan.request.model, "architecture": presets.architecture(pipe)}}
