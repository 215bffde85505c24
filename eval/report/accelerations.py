"""Everything that a report on accelerations needs, in one folder and by one call: runs, times, equal time, report.

Each part is kept as soon as it is finished, so the same call goes on wherever it was stopped. Several processes share
the runs; one of them measures times, while the others wait.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffaccel import record, registry, zoo
from diffaccel.errors import DiffAccelError, first_line
from diffaccel.eval import report as reports
from diffaccel.eval.comparison import compare_runs
from diffaccel.eval.comparison import reference_statistics as statistics_rows
from diffaccel.eval.comparison.measures import Measures
from diffaccel.eval.features.extract import extract
from diffaccel.eval.images.open import open_source
from diffaccel.eval.metrics.frechet import Moments
from diffaccel.eval.networks.extractors import Extractor, as_clip, extractor
from diffaccel.eval.networks.extractors.clip import ClipExtractor
from diffaccel.eval.report.plan import Made, ReportPlan, could_not_run
from diffaccel.eval.sets.run import Run, open_run
from diffaccel.eval.timing import budget as time_budget
from diffaccel.eval.timing import equal_time
from diffaccel.eval.timing.turns import one_call, take_turns
from diffaccel.files import write_json
from diffaccel.runs import loading as opening
from diffaccel.runs.generate import generate_run
from diffaccel.runs.loading import quiet_libraries
from diffaccel.runs.processes import join_world
from diffaccel.runs.request import Request
from diffaccel.runs.variant import Variant

TIMING, PLANS, RUNS = "timing.json", "equal_time.json", "runs"
OTHER_SEEDS = "other-seeds"


def make(
    plan: ReportPlan,
    out: Path,
    *,
    command: list[str] | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Made | None:
    """Draw, time, compare and write ``report.json``, ``report.md`` and ``report.html`` into ``out``.

    Returns:
        What was made; None in all but the first of several processes.

    Raises:
        DiffAccelError: where no way could run, and for whatever the model cannot do.
    """
    return _Work(plan, out, progress).make(command or [])


class _Work:
    """One report being made: its folder, its processes, and a pipeline that is opened when it is first needed."""

    def __init__(self, plan: ReportPlan, out: Path, progress: Callable[[str], None]) -> None:
        self.plan, self.out = plan, out
        self.world, device = join_world(plan.request.device)
        self.progress = progress if self.world.rank == 0 else lambda text: None  # the first process tells
        self.request = replace(plan.request, device=str(device) if self.world.size > 1 else plan.request.device)
        self.failed: dict[str, str] = {}

    def make(self, command: list[str]) -> Made | None:
        plan = self.plan
        judge, reward = (self._clip(name) for name in (next(iter(plan.judges), ""), plan.reward))
        if judge is not None and reward is not None:
            equal_time.check_judge(reward, judge)
        baseline = self._draw(plan.baseline)
        others = self._others() if plan.other_seeds else None
        ways = {way.name: way for way in self._ways() if self._works(way)}
        runs = {name: self._draw(way) for name, way in ways.items()}
        if not runs:
            reasons = "; ".join(f"{name}: {why}" for name, why in self.failed.items())
            raise DiffAccelError(f"None of the accelerations could run, so there is nothing to report. {reasons}")
        timing = self._kept(TIMING, [plan.baseline, *ways.values()], lambda: self._timed(list(ways.values())))
        answers = self._answers(ways, runs, baseline, timing, judge, reward) if plan.equal_time else []
        if self.world.rank > 0:
            return None
        self._forget_pipeline()
        measures = Measures.named(
            others=others, extractors=plan.extractors, clips=plan.judges, reference=plan.reference, timing=timing,
            device=plan.request.device,
        )  # fmt: skip
        found = compare_runs(baseline, list(runs.values()), measures, progress=self.progress)
        if answers:
            device = timing["device"]["name"]
            names = [clip.name if clip else "" for clip in (judge, reward)]
            found.sections.append(equal_time.section(answers, judge=names[0], reward=names[1], device=device))
        if self.failed:
            found.sections.append(could_not_run(self.failed))
        return Made(found, reports.write(found, self.out, command=command), self.failed)

    # -- runs ---------------------------------------------------------------------------------------------------------

    def _ways(self) -> list[Variant]:
        """The accelerations, and all registered methods if asked for; one without default options has failed."""
        found = list(self.plan.accelerated)
        known = {way.name for way in (self.plan.baseline, *found)}
        for name in registry.names() if self.plan.everything else ():
            try:
                way = Variant((registry.config_class(name)(),), self.plan.baseline.call)
            except (DiffAccelError, TypeError) as error:
                self.failed[name] = f"it has no default options: {first_line(error)}"
                continue
            if way.name not in known:
                found.append(way)
        return found

    def _works(self, way: Variant) -> bool:
        """Whether a first call of it goes well, or its run is finished already; else why not is noted."""
        folder = self.out / RUNS / way.folder
        why = None
        if self.world.rank == 0 and not _finished(folder):
            self.progress(f"{way.name}: a first call")
            try:
                one_call(self.pipe, way.of(self.request))
            except Exception as error:  # a method may raise anything on a model that it was not made for
                kind = "" if isinstance(error, DiffAccelError) else f"{type(error).__name__}: "
                why = f"{kind}{first_line(error)}"
        why = self.world.share(why)
        if why is not None:
            self.failed[way.name] = why
        return why is None

    def _draw(self, way: Variant, request: Request | None = None, folder: str | None = None) -> Run:
        request = way.of(request or self.request)
        path = self.out / RUNS / (folder or way.folder)
        if not _finished(path):
            self.progress(f"{path.name}: {len(request)} pictures")
        quiet_libraries(request.model in zoo.names())
        generate_run(request, path)
        return open_run(path)

    def _others(self) -> Run:
        request = replace(self.request, seed=self.request.seed + len(self.request))
        return self._draw(self.plan.baseline, request, f"{self.plan.baseline.folder}-{OTHER_SEEDS}")

    # -- times --------------------------------------------------------------------------------------------------------

    @cached_property
    def pipe(self) -> Any:
        """The model, open and without methods."""
        quiet_libraries(self.request.model in zoo.names())
        pipe = opening.open_plain(self.request)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _forget_pipeline(self) -> None:
        """Its memory is for the networks that measure."""
        if self.__dict__.pop("pipe", None) is not None:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _timed(self, ways: list[Variant]) -> dict[str, Any]:
        return take_turns(
            self.pipe, self.request, [self.plan.baseline, *ways], turns=self.plan.turns, progress=self.progress
        )

    def _kept(self, name: str, ways: Sequence[Variant], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What is in a file of the folder, if it was measured for the same things on the same machine; else made now.

        All processes return the same, and only the first one measures.
        """
        path, made = self.out / name, None
        if self.world.rank == 0:
            about = self._about(ways)
            made = _read(path)
            if made is None or made.get("of") != about:
                made = {**make(), "of": about}
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, made)
        return self.world.share(made)

    def _about(self, ways: Sequence[Variant]) -> dict[str, Any]:
        device = opening.pick_device(self.request.device)
        _, digest = opening.locate(self.request.model)
        request = self.request.with_model_defaults()
        settings = request.settings(digest, device, opening.pick_dtype(request.dtype, device))
        settings["prompts"] = settings["prompts"][: request.batch]  # times are of the first chunk
        named = {"ways": [way.name for way in ways], "turns": self.plan.turns, "reward": self.plan.reward}
        return {"settings": settings, "device": record.describe_device(device), **named}

    # -- equal time ---------------------------------------------------------------------------------------------------

    def _answers(
        self,
        ways: dict[str, Variant],
        runs: dict[str, Run],
        baseline: Run,
        timing: dict[str, Any],
        judge: ClipExtractor | None,
        reward: ClipExtractor | None,
    ) -> list[equal_time.Answer]:
        plan, turns = self.plan, self.plan.turns
        network = (
            extractor(plan.extractors[0], device=opening.pick_device(plan.request.device)) if plan.extractors else None
        )
        target = None
        if plan.reference is not None and network is not None and self.world.rank == 0:
            target = self._target(plan.reference, network)
        answers = []
        for name, way in ways.items():
            key = f"{way.folder}.{PLANS}"
            two = [plan.baseline, way]

            def budget(way: Variant = way) -> dict[str, Any]:
                shared: dict[str, Any] = {"turns": turns, "progress": self.progress}
                found = {
                    "fewer": time_budget.fewer_steps(self.pipe, self.request, plan.baseline, way, timing, **shared)
                }
                if reward is not None:
                    found["many"] = time_budget.pictures_that_fit(
                        self.pipe, self.request, plan.baseline, way, reward, **shared
                    )
                return found

            budgets = self._kept(f"{RUNS}/{key}", two, budget)
            fewer, steps = None, budgets["fewer"]["steps"]
            if steps is not None:
                fewer = self._draw(Variant(plan.baseline.methods, {**plan.baseline.call, "steps": steps}))
            many, count = None, budgets.get("many", {}).get("pictures", 1)
            if count > 1 and judge is not None:
                several = replace(self.request, num=self.request.num * count)
                many = self._draw(way, several, f"{way.folder}-{count}-of-each")
            if self.world.rank > 0:
                continue
            answers.append(
                equal_time.against_fewer_steps(
                    budgets["fewer"], baseline, runs[name], fewer, judge=judge, extractor=network, target=target
                )
            )
            if reward is not None and judge is not None:
                answers.append(
                    equal_time.against_baseline(
                        budgets["many"], baseline, runs[name], many, reward=reward, judge=judge, extractor=network,
                        target=target,
                    )
                )  # fmt: skip
        return answers

    def _target(self, reference: str, network: Extractor) -> Tensor | Moments:
        if statistics_rows.is_statistics(reference):
            return statistics_rows.moments(reference, network)[0]
        return extract(open_source(reference), network).values

    def _clip(self, name: str) -> ClipExtractor | None:
        if not name:
            return None
        return as_clip(extractor(name, device=opening.pick_device(self.plan.request.device)))


def _finished(folder: Path) -> bool:
    made = _read(folder / record.RUN)
    return made is not None and made.get("state") == "finished"


def _read(path: Path) -> dict[str, Any] | None:
    import json

    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
