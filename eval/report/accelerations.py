"""Report on accelerations of one model, made by one call: runs, times, equal time, comparison, report.

Each part is kept as soon as it is finished, so the same call goes on wherever it was stopped. Several processes share
the runs; one of them measures times, while the others wait.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from diffaccel import registry
from diffaccel.errors import DiffAccelError, first_line
from diffaccel.eval.comparison import compare_runs, reference_statistics
from diffaccel.eval.comparison.measures import Measures
from diffaccel.eval.comparison.zoo_reference import ShippedStatistics
from diffaccel.eval.features.extract import extract
from diffaccel.eval.images.source import Source
from diffaccel.eval.metrics.frechet import Moments
from diffaccel.eval.networks.extractors import Extractor
from diffaccel.eval.networks.extractors.clip import ClipExtractor
from diffaccel.eval.report import by_batch, write
from diffaccel.eval.report.plan import AccelerationReport, ReportPlan, failures_section
from diffaccel.eval.report.workspace import RUNS, Workspace
from diffaccel.eval.sets.run import Run
from diffaccel.eval.timing import budget, equal_time
from diffaccel.eval.timing.turns import take_turns
from diffaccel.eval.uncertainty.turns import LONG
from diffaccel.runs.variant import Variant

TIMING, BATCH_TIMING, BUDGETS = "timing.json", "timing-batch-{}.json", "equal_time.json"


def make_report(
    plan: ReportPlan,
    out: Path,
    *,
    command: list[str] | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> AccelerationReport | None:
    """Draw, time, compare and write ``report.json``, ``report.md`` and ``report.html`` into ``out``.

    Returns:
        The report; None in all but the first of several processes.

    Raises:
        DiffAccelError: where no acceleration could run, and for whatever the model cannot do.
    """
    workspace = Workspace(plan, out, progress)
    judge, reward = (workspace.load_clip(name) for name in (next(iter(plan.judges), ""), plan.reward))
    if judge is not None and reward is not None:
        equal_time.check_judge(reward, judge)
    baseline = workspace.draw(plan.baseline)
    others = workspace.draw_other_seeds() if plan.other_seeds else None
    variants, runs, failures = _drawn(workspace)
    if not runs:
        reasons = "; ".join(f"{name}: {why}" for name, why in failures.items())
        raise DiffAccelError(f"None of the accelerations could run, so there is nothing to report. {reasons}")
    timing, *further = (
        _time(workspace, variants, {baseline.name: baseline, **runs}, batch) for batch in (None, *plan.batches)
    )
    answers: list[equal_time.Answer] = []
    measures = _measures(plan, baseline) if plan.equal_time else None
    if measures is not None:
        equal_time_inputs = _EqualTime.of(measures, workspace, baseline, timing, judge, reward)
        for name, variant in variants.items():
            answers += equal_time_inputs.answers(variant, runs[name])
    if not workspace.is_first:
        return None
    workspace.close_pipeline()
    measures = measures or _measures(plan, baseline)
    clips = [judge, *map(workspace.load_clip, plan.judges[1:])]
    measures = replace(measures, others=others, timing=timing, clips=[clip for clip in clips if clip is not None])
    comparison = compare_runs(baseline, list(runs.values()), measures, progress=workspace.progress)
    if answers:
        names = {"judge": judge.name if judge else "", "reward": reward.name if reward else ""}
        comparison.sections.append(equal_time.section(answers, device=timing["device"]["name"], **names))
    if failures:
        comparison.sections.append(failures_section(failures))
    by_batch_section = by_batch.section([timing, *further])
    if by_batch_section is not None:
        comparison.sections.append(by_batch_section)
    return AccelerationReport(comparison, write(comparison, out, command=command or []), failures)


# -- accelerations ----------------------------------------------------------------------------------------------------


def _drawn(workspace: Workspace) -> tuple[dict[str, Variant], dict[str, Run], dict[str, str]]:
    """Draw all accelerations; return by name those that work and their runs, and why the others cannot run."""
    tried, failures = accelerations(workspace.plan)
    working, runs = {}, {}
    for variant in tried:
        run = workspace.try_to_draw(variant)
        if isinstance(run, str):
            failures[variant.name] = run
        else:
            working[variant.name], runs[variant.name] = variant, run
    return working, runs, failures


def accelerations(plan: ReportPlan) -> tuple[list[Variant], dict[str, str]]:
    """Return the accelerations of a plan, with all registered methods where it asks for everything.

    Returns:
        The variants, and by name why a method has no variant: it needs an option.
    """
    variants, failures = list(plan.accelerated), {}
    names = {variant.name for variant in (plan.baseline, *variants)}
    for name in registry.names() if plan.everything else ():
        try:
            config_class = registry.config_class(name)
            configs = config_class.ways() if hasattr(config_class, "ways") else (config_class(),)
        except (DiffAccelError, TypeError) as error:
            failures[name] = f"it has no default options: {first_line(error)}"
            continue
        if getattr(config_class, "searches", False) and not plan.searches:
            continue
        ways = [Variant((config,), plan.baseline.call) for config in configs]
        variants += [variant for variant in ways if variant.name not in names]
    return variants, failures


def _time(
    workspace: Workspace, variants: Mapping[str, Variant], runs: Mapping[str, Run], batch: int | None = None
) -> dict[str, Any]:
    """Time the baseline and the accelerations in turns, with the report's number of pictures in a call or another.

    Turns are kept as they are made: a call that was stopped goes on with the next one.
    """
    plan, timed = workspace.plan, [workspace.plan.baseline, *variants.values()]
    request = workspace.request if batch is None else replace(workspace.request, batch=batch)
    span = LONG if batch is None else 0.0  # energy is reported of the report's own batch

    name = TIMING if batch is None else BATCH_TIMING.format(batch)
    part = workspace.part_of(name, timed, batch)
    expected = {key: seconds for key, run in runs.items() if (seconds := _seconds_of_call(run, request.batch))}

    def measure() -> dict[str, Any]:
        return take_turns(
            workspace.pipe, request, timed, turns=plan.turns, meter_seconds=span, progress=workspace.progress,
            spares=True, expected=expected, begun=part.read(), keep=part.keep,
        )  # fmt: skip

    timing = workspace.measure_once(name, timed, measure, batch)
    if workspace.is_first:
        part.remove()
    return timing


def _seconds_of_call(run: Run, batch: int) -> float | None:
    """Return about how long a call of a run took, for so many pictures."""
    seconds = (run.record.get("cost") or {}).get("seconds")
    return None if seconds is None else seconds / len(run) * min(batch, len(run))


def _measures(plan: ReportPlan, baseline: Run) -> Measures:
    """Load the extractors of a plan and open its reference, once for the whole report."""
    return Measures.load(
        extractors=plan.extractors, reference=plan.reference, device=plan.request.device, baseline=baseline
    )


# -- equal time -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class _EqualTime:
    """Runs, times and networks from which it is answered what the same wall time buys.

    Attributes:
        workspace: draws further runs and measures what fits into a time.
        baseline: the report's run.
        timing: of the baseline and all accelerations.
        judge: CLIP that judges pictures; None without prompts.
        reward: CLIP that chooses the best of several pictures; None for no such question.
        extractor: network for Fréchet distances; None for no such distance.
        target: features or moments of the reference set; None for the baseline's own.
    """

    workspace: Workspace
    baseline: Run
    timing: Mapping[str, Any]
    judge: ClipExtractor | None
    reward: ClipExtractor | None
    extractor: Extractor | None
    target: Tensor | Moments | None

    @classmethod
    def of(
        cls,
        measures: Measures,
        workspace: Workspace,
        baseline: Run,
        timing: Mapping[str, Any],
        judge: ClipExtractor | None,
        reward: ClipExtractor | None,
    ) -> _EqualTime:
        """Take the report's first extractor and, in the first process, what its distances are measured from."""
        target = None
        network = next(iter(measures.extractors), None)
        if measures.reference is not None and network is not None and workspace.is_first:
            target = _target(measures.reference, network)
        return cls(
            workspace=workspace, baseline=baseline, timing=timing, judge=judge, reward=reward, extractor=network,
            target=target,
        )  # fmt: skip

    def answers(self, variant: Variant, run: Run) -> list[equal_time.Answer]:
        """Answer what the time of one acceleration buys: fewer steps of the baseline, or several pictures.

        Returns:
            The answers; none in all but the first of several processes.
        """
        budgets = self._budgets(variant)
        fewer = self._draw_fewer_steps(budgets["fewer"]["steps"])
        many = self._draw_many(variant, budgets.get("many", {}).get("pictures", 1))
        if not self.workspace.is_first:
            return []
        distance: dict[str, Any] = {"extractor": self.extractor, "target": self.target}
        answers = [
            equal_time.against_fewer_steps(budgets["fewer"], self.baseline, run, fewer, judge=self.judge, **distance)
        ]
        if self.reward is not None and self.judge is not None:
            answers.append(
                equal_time.against_baseline(
                    budgets["many"], self.baseline, run, many, reward=self.reward, judge=self.judge, **distance
                )
            )
        return answers

    def _budgets(self, variant: Variant) -> dict[str, Any]:
        """Measure how many steps of the baseline, and how many accelerated pictures, fit into the same time."""
        workspace, baseline = self.workspace, self.workspace.plan.baseline

        def measure() -> dict[str, Any]:
            pipe, request = workspace.pipe, workspace.request
            options: dict[str, Any] = {"turns": workspace.plan.turns, "progress": workspace.progress}
            budgets = {"fewer": budget.fewer_steps(pipe, request, baseline, variant, self.timing, **options)}
            if self.reward is not None:
                budgets["many"] = budget.pictures_that_fit(
                    pipe, request, baseline, variant, self.reward, self.timing, **options
                )
            return budgets

        return workspace.measure_once(f"{RUNS}/{variant.folder}.{BUDGETS}", [baseline, variant], measure)

    def _draw_fewer_steps(self, steps: int | None) -> Run | None:
        """Draw the baseline with so many steps; None where no number of steps fits."""
        if steps is None:
            return None
        baseline = self.workspace.plan.baseline
        return self.workspace.draw(Variant(baseline.methods, {**baseline.call, "steps": steps}))

    def _draw_many(self, variant: Variant, count: int) -> Run | None:
        """Draw ``count`` accelerated pictures for each of the baseline's; None where only one fits."""
        if count < 2 or self.judge is None:
            return None
        request = replace(self.workspace.request, num=self.workspace.request.num * count)
        return self.workspace.draw(variant, request, f"{variant.folder}-{count}-of-each")


def _target(reference: Source | Path | ShippedStatistics, network: Extractor) -> Tensor | Moments:
    """Return the moments of a reference that is statistics, or extract the features of images."""
    if isinstance(reference, (Path, ShippedStatistics)):
        return reference_statistics.load_moments(reference, network)[0]
    return extract(reference, network).values
