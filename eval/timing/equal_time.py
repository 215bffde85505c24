"""Equal wall time: the acceleration against the baseline with fewer steps, and the best of several against one picture.

An acceleration that is worse than the baseline with fewer steps, at the same time, is no acceleration; one that is
twice as fast may draw two pictures where the baseline draws one. Both are answered from times that were measured in
turns on one machine. The best picture is chosen by one CLIP, the reward, whose own time counts, and scored by another
one, the judge, which never chooses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.eval.comparison import fidelity, verdict
from diffaccel.eval.comparison.clip_scores import ClipScores
from diffaccel.eval.comparison.distribution import FEWEST, features
from diffaccel.eval.comparison.row import Section, without_lone_carrier
from diffaccel.eval.metrics import frechet_intervals
from diffaccel.eval.metrics.frechet import Moments
from diffaccel.eval.networks.extractors.base import Extractor
from diffaccel.eval.networks.extractors.clip import ClipExtractor
from diffaccel.eval.sets.run import Run, pair
from diffaccel.eval.uncertainty.intervals import Interval, Paired, paired_difference

KEY = "equal_time"
_SSIM = next(distance for distance in fidelity.BUILT_IN if distance.metric == "ssim")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Comparison of two ways to spend the same time, the accelerated one first.

    Attributes:
        accelerated, instead: names of the two ways.
        time: how their times were made equal, in words.
        ratio: of times, with its interval, whose ends are None for fewer than 6 turns.
        judge: difference of the judge's scores, accelerated minus instead.
        ssim: difference of SSIM to the baseline with all its steps; None where the pictures are of other seeds.
        fd: difference of Fréchet distances; None where there are too few pictures, or no network.
        fd_is_own: whether it is of distances to the baseline's own pictures, which are no quality.
        why: reason for which there is no answer; "" where there is one.
    """

    accelerated: str
    instead: str
    time: str = ""
    ratio: dict[str, Any] | None = None
    judge: Paired | None = None
    ssim: Paired | None = None
    fd: Interval | None = None
    fd_is_own: bool = False
    why: str = ""


def best_by(reward: ClipExtractor, run: Run, count: int) -> Run:
    """Choose of every ``count`` consecutive pictures, which must be of one prompt, the one with the highest reward.

    Raises:
        DiffAccelError: for a run without prompts, or another number of pictures of each.
    """
    prompts = run.prompts
    groups = [] if prompts is None else [prompts[i : i + count] for i in range(0, len(prompts), count)]
    if not groups or any(len(group) < count or len(set(group)) > 1 for group in groups):
        raise DiffAccelError(f"'{run.name}' does not hold {count} pictures of every prompt in a row. Draw it so.")
    best = scores(reward, run).view(-1, count).argmax(1).tolist()
    pictures = tuple(run.pictures[i * count + k] for i, k in enumerate(best))
    return replace(run, name=f"best-of-{count}", pictures=pictures)


def scores(clip: ClipExtractor, run: Run) -> Tensor:
    """Score every picture by its prompt, ``100 max(cos, 0)``, (n,) float64."""
    return ClipScores(clip).of_run(run)


def against_fewer_steps(
    budget: Mapping[str, Any],
    baseline: Run,
    accelerated: Run,
    fewer: Run | None,
    *,
    judge: ClipExtractor | None,
    extractor: Extractor | None = None,
    target: Tensor | Moments | None = None,
) -> Answer:
    """Compare the acceleration with the baseline of so few steps that it costs no more: the same prompts and seeds.

    Args:
        budget: of :func:`diffaccel.eval.timing.budget.fewer_steps`.
        baseline: with all its steps, for the similarity to its pictures.
        accelerated, fewer: the two runs; ``fewer`` is None where the budget has no number of steps.
        judge: a CLIP, where there are prompts.
        extractor: network of the Fréchet distance to ``target``, where there are 100 pictures.
        target: features of a reference set; None for the baseline's own.
    """
    if fewer is None:
        return Answer(accelerated=accelerated.name, instead="fewer steps", why=budget["why"])
    two_runs, prompts = (accelerated, fewer), baseline.prompts
    pairs = {run.name: pair(baseline, run) for run in two_runs}

    def in_baseline_order(values: Tensor, run: Run) -> Tensor:
        return values[[j for _, j in pairs[run.name]]]

    ssim, fewer_ssim = (fidelity.measure(baseline, run, pairs[run.name], [_SSIM])[0][1] for run in two_runs)
    judged = None
    if judge is not None and prompts is not None:
        a, b = (in_baseline_order(scores(judge, run), run) for run in two_runs)
        judged = _paired(a, b, prompts)
    fd = None
    if extractor is not None and len(baseline) >= FEWEST:
        a, b = (in_baseline_order(features(run, extractor), run) for run in two_runs)
        if target is None:  # the baseline's own pictures, of the same prompts and seeds
            own_pairs = [(i, i) for i in range(len(baseline))]
            fd = frechet_intervals.difference(a, b, features(baseline, extractor), pairs=own_pairs)
        else:
            fd = frechet_intervals.difference(a, b, target)
    return Answer(
        accelerated=accelerated.name, instead=f"{baseline.name}, {budget['steps']} steps", ratio=budget["ratio"],
        time=f"{budget['steps']} steps fit: the acceleration takes {_times(budget['ratio'])} their time", judge=judged,
        ssim=_paired(ssim, fewer_ssim, prompts), fd=fd, fd_is_own=target is None,
    )  # fmt: skip


def against_baseline(
    budget: Mapping[str, Any],
    baseline: Run,
    accelerated: Run,
    many: Run | None,
    *,
    reward: ClipExtractor,
    judge: ClipExtractor,
    extractor: Extractor | None = None,
    target: Tensor | Moments | None = None,
) -> Answer:
    """Compare the best of as many accelerated pictures as fit into the baseline's time with the baseline's picture.

    Args:
        budget: of :func:`diffaccel.eval.timing.budget.pictures_that_fit`.
        baseline, accelerated: the runs of the report.
        many: ``budget["pictures"]`` accelerated pictures for each of the baseline's; None where only one fits.
        reward: CLIP that chooses the best picture.
        judge: CLIP that scores the choice, and must be another network.
        extractor: network of the Fréchet distance to ``target``.
        target: features of a reference set; without one there is no such distance.

    Raises:
        DiffAccelError: for a judge that is the reward, and prompts that differ.
    """
    check_judge(reward, judge)
    count, name = budget["pictures"], accelerated.name
    if many is None:
        one = "one with its reward" if budget["reward"] else "one"
        why = f"no second picture fits: the baseline takes {_times(budget['ratio'])} as long as {one}"
        return Answer(accelerated=f"{name}, best of several", instead=baseline.name, why=why)
    best = best_by(reward, many, count)
    if best.prompts != baseline.prompts:
        raise DiffAccelError(f"'{many.name}' was not drawn from the prompts of '{baseline.name}'. Draw it again.")
    fd = None
    if extractor is not None and target is not None and len(baseline) >= FEWEST:
        fd = frechet_intervals.difference(features(best, extractor), features(baseline, extractor), target)
    return Answer(
        accelerated=f"{name}, best of {count} by {reward.name}", instead=baseline.name, ratio=budget["ratio"],
        time=f"{count} pictures fit: the baseline takes {_times(budget['ratio'])} the time of one with its reward",
        judge=_paired(scores(judge, best), scores(judge, baseline), baseline.prompts), fd=fd,
    )  # fmt: skip


def check_judge(reward: ClipExtractor, judge: ClipExtractor) -> None:
    """Raise when the judge is the reward: its score of its own choice would be biased upwards."""
    if reward.weights_sha256 == judge.weights_sha256:
        raise DiffAccelError(
            f"'{reward.name}' would choose pictures and then judge its own choice. Give a judge of other weights."
        )


def section(answers: Sequence[Answer], *, judge: str = "", reward: str = "", device: str = "") -> Section:
    """Tabulate the answers for a report."""
    note = "Differences are the first column's value minus the second's, with 95 % intervals over prompts. Times were "
    note += f"measured in turns{f' on {device}' if device else ''}."
    if judge and reward:
        note += f" The best picture is chosen by {reward}, whose own time counts, and judged by {judge}."
    rows = [_cells(answer) for answer in answers]
    columns = ("accelerated", "instead", "time", f"clip_score[{judge}]" if judge else "clip score", "preferred",
               "SSIM to the baseline", "Fréchet distance")  # fmt: skip
    return Section(
        key=KEY, title="What the same time buys", note=note, columns=columns, rows=tuple(rows),
        data={"answers": [_numbers(answer) for answer in answers], "judge": judge, "reward": reward},
    )  # fmt: skip


def _cells(answer: Answer) -> tuple[str, ...]:
    """Return an answer as the cells of a row."""
    if answer.why:
        return answer.accelerated, answer.instead, answer.why, "", "", "", ""
    wins = answer.judge.wins if answer.judge and not answer.judge.interval.too_few else None
    return (
        answer.accelerated,
        answer.instead,
        answer.time,
        _signed(answer.judge.interval if answer.judge else None, 2, "higher"),
        f"{wins.value:.0%} ({wins.low:.0%} to {wins.high:.0%})" if wins else "",
        _signed(answer.ssim.interval if answer.ssim else None, 4),
        _signed(answer.fd, 3, "" if answer.fd_is_own else "lower"),
    )


def _signed(difference: Interval | None, digits: int, better: str = "") -> str:
    """Return a difference with its interval and verdict, or with the reason where it has none.

    A difference of distances to the baseline's own pictures has no better side, and no verdict.
    """
    if difference is None:
        return ""
    value, low, high = (f"{end:+.{digits}f}" for end in (difference.value, difference.low, difference.high))
    if difference.too_few:
        return f"{value}, {difference.too_few}"
    interval, note, _ = without_lone_carrier(difference, "the spread of the difference")
    if interval is None:
        return f"{value}, {note}"
    word = verdict.word_of_difference(interval.low, interval.high, better) if better else ""
    return ", ".join(filter(None, (f"{value} ({low} to {high})", word, note)))


def _numbers(answer: Answer) -> dict[str, Any]:
    """Return an answer as JSON-ready numbers."""
    numbers: dict[str, Any] = {"accelerated": answer.accelerated, "instead": answer.instead, "why": answer.why}
    numbers["time_ratio"] = answer.ratio
    for key, paired in (("judge", answer.judge), ("ssim", answer.ssim)):
        numbers[key] = None if paired is None else {**_ends(paired.interval), "wins": _ends(paired.wins), "n": paired.n}
    numbers["fd"] = None if answer.fd is None else _ends(answer.fd)
    return numbers


def _ends(interval: Interval) -> dict[str, Any]:
    """Return an interval as numbers; its ends are null where too few stand behind them."""
    shown = None if interval.too_few else without_lone_carrier(interval)[0]
    low, high = (None, None) if shown is None else (shown.low, shown.high)
    return {"value": interval.value, "low": low, "high": high, "method": interval.method, "units": interval.units}


def _times(ratio: Mapping[str, Any]) -> str:
    ends = "" if ratio["low"] is None else f" ({ratio['low']:.2f} to {ratio['high']:.2f})"
    return f"{ratio['value']:.2f}x{ends}"


def _paired(a: Tensor, b: Tensor, prompts: Sequence[str] | None) -> Paired | None:
    """Return the paired difference; None where there is a single prompt, or picture, to resample."""
    if len(set(prompts if prompts is not None else range(len(a)))) < 2:
        return None
    return paired_difference(a, b, clusters=prompts)
