"""Early stopping: no more pictures than a question needs, ``eval run --baseline RUN --until "ssim within 0.02"``.

After 64, 128, 256, ... pictures the run is compared with the first ones of its baseline, and it ends when every
condition is proven to hold, or one is proven not to (:mod:`diffaccel.eval.uncertainty.sequential`). A condition is
about the mean over pictures of

- a distance to the baseline's picture, whose value for equal pictures is known: ``ssim``, ``lpips``, ``latent_error``.
  "Within 0.02" is a mean SSIM above 0.98. The proof needs bounds of the metric: a picture counts with an LPIPS of at
  most 1 and a latent error of at most 2, which those of unrelated pictures rarely reach.
- a picture's fit to its prompt, minus that of the baseline's picture: ``clip_score[emoji-clip-judge]``.

All conditions together err with a probability of at most 5 %, whatever the number of looks and however skewed the
values: the level is shared by the conditions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from diffaccel.errors import DiffAccelError, unknown
from diffaccel.eval.comparison import fidelity
from diffaccel.eval.networks import lpips
from diffaccel.eval.networks.extractors import as_clip, clips, extractor
from diffaccel.eval.sets.run import Run, open_run, run_from_record
from diffaccel.eval.timing import equal_time
from diffaccel.eval.uncertainty.sequential import LEAST_CLUSTERS, Sequential, doubling
from diffaccel.runs.generate import GO_ON, Early
from diffaccel.runs.request import Request

FIRST, LEVEL = 64, 0.95
EQUAL = {"ssim": 1.0, "lpips": 0.0, "latent_error": 0.0}  # the metric of equal pictures
BOUNDS = {"ssim": (-1.0, 1.0), "lpips": (0.0, 1.0), "latent_error": (0.0, 2.0)}  # values beyond count as the bound
CLIP_SCORE, CLIP_BOUNDS = "clip_score", (-100.0, 100.0)  # of a difference of two scores from 0 to 100
Difference = Callable[[Run, Run], Tensor]  # of two runs of the same pictures to a number a picture, 0 for no change
_CONDITION = re.compile(r"\s*([A-Za-z_]+(?:\[[^\[\]]+\])?)\s+within\s+(\S+)\s*")
_HOW = 'Write it like "ssim within 0.02" or "ssim within 0.02 and clip_score[emoji-clip-judge] within 0.5".'


@dataclass(frozen=True)
class Tolerance:
    """Condition that the mean of a metric is within a tolerance of its value for equal pictures."""

    metric: str
    tolerance: float

    @property
    def clip(self) -> str:
        """Name of a CLIP score's network; "" for other metrics."""
        return self.metric.partition("[")[2].removesuffix("]")

    @property
    def bounds(self) -> tuple[float, float]:
        """Least and greatest difference of the metric to its value for equal pictures."""
        if self.clip:
            return CLIP_BOUNDS
        low, high = BOUNDS[self.metric]
        return low - EQUAL[self.metric], high - EQUAL[self.metric]


def parse(text: str) -> tuple[Tolerance, ...]:
    """Parse conditions ``METRIC within NUMBER``, joined by ``and``.

    Raises:
        DiffAccelError: for anything else, an unknown metric, one that is there twice, or no positive number.
    """
    conditions = [_parse_condition(part) for part in re.split(r"\sand\s", text)]
    names = [condition.metric for condition in conditions]
    if duplicate := next((name for name in names if names.count(name) > 1), None):
        raise DiffAccelError(f"'{duplicate}' is there twice in '{text}'. Give it one tolerance.")
    return tuple(conditions)


def _parse_condition(text: str) -> Tolerance:
    match = _CONDITION.fullmatch(text)
    if match is None:
        raise DiffAccelError(f"'{text.strip()}' is no condition. {_HOW}")
    metric, number = match.groups()
    try:
        condition = Tolerance(metric, float(number))
        Sequential(condition.tolerance)  # refuses tolerances that are not positive
    except ValueError:
        raise DiffAccelError(f"'{number}' is no tolerance; it must be a positive number. {_HOW}") from None
    if metric == "psnr":
        raise DiffAccelError("PSNR of equal pictures is infinite, so none is within a tolerance. Take ssim.")
    clip_metrics = [f"{CLIP_SCORE}[{name}]" for name in clips()]
    if metric == CLIP_SCORE:
        raise DiffAccelError(f"Say whose CLIP score: {', '.join(clip_metrics)}.")
    if metric not in EQUAL and not metric.startswith(f"{CLIP_SCORE}["):
        raise unknown("metric with a tolerance", metric, [*EQUAL, *clip_metrics])
    if condition.tolerance >= (widest := max(map(abs, condition.bounds))):
        raise DiffAccelError(
            f"'{text.strip()}' holds of any two runs: {metric} is never further from its value for equal pictures than "
            f"{widest:g}. Give a smaller tolerance."
        )
    return condition


def stopping_rule(
    text: str, baseline: str | Path, request: Request, *, looks: Sequence[int] = (), device: Any = "cpu"
) -> Early:
    """Return the rule that ends a run once it is proven to be like a baseline's, or not to be.

    Args:
        text: as :func:`parse` reads it.
        baseline: the folder of a finished run of the same prompts and seeds; it may hold more pictures.
        request: of the run.
        looks: numbers of pictures after which to look; by default 64, 128, 256, ..., and the last picture.
        device: on which networks compute.

    Raises:
        DiffAccelError: for fewer than 16 prompts, looks that are none, a baseline that lacks a picture, and whatever
            :func:`parse` refuses.
    """
    conditions, base = parse(text), open_run(baseline)
    planned = _planned_looks(looks, request)
    _check_first_look(planned[0], request)
    _check_baseline(base, request, conditions)
    level = 1 - (1 - LEVEL) / len(conditions)
    tests = {c: Sequential(c.tolerance, planned, level, c.bounds) for c in conditions}
    differences = {condition: _difference(condition, device) for condition in conditions}

    def look(folder: Path, run_record: dict[str, Any]) -> dict[str, Any]:
        base_part, run = _same_pictures(base, run_from_record(folder, run_record))
        measured = {c: (tests[c], differences[c](base_part, run)) for c in conditions}
        return _verdict(measured, run.prompts)

    rule = f"{' and '.join(f'{c.metric} within {c.tolerance:g}' for c in conditions)} of {_identity(base)}"
    return Early(f"{rule}, looks at {', '.join(map(str, planned))}", planned, look)


def _planned_looks(looks: Sequence[int], request: Request) -> tuple[int, ...]:
    """Return the looks, each at the end of a chunk, and the last one after the last picture."""
    total = len(request)
    wanted = tuple(looks) or doubling(total, min(FIRST, total))
    chunk_ends = (-(-look // request.batch) * request.batch for look in wanted if look < total)
    return tuple(dict.fromkeys((*(min(total, end) for end in chunk_ends), total)))


def _check_first_look(look: int, request: Request) -> None:
    """Raise when the first look sees too few prompts, or seeds where there are none."""
    prompts = len({item.prompt if item.prompt is not None else item.seed for item in request.items()[:look]})
    if prompts < LEAST_CLUSTERS:
        raise DiffAccelError(
            f"The first look, after {look} pictures, would see {prompts} prompts, and an interval needs at least "
            f"{LEAST_CLUSTERS} to be trusted. Use more prompts, or look later."
        )


def _check_baseline(base: Run, request: Request, conditions: Sequence[Tolerance]) -> None:
    """Raise when the baseline lacks a picture of the request, or latents that a condition needs."""
    keys = {picture.key for picture in base.pictures}
    if lacking := next((item for item in request.items() if (item.prompt, item.seed) not in keys), None):
        raise DiffAccelError(
            f"The baseline '{base.name}' has no picture of seed {lacking.seed} of '{lacking.prompt}'. Give the run the "
            "baseline's prompts and seeds, at most as many of them."
        )
    latents = request.latents and all(picture.latents is not None for picture in base.pictures)
    if not latents and any(condition.metric == "latent_error" for condition in conditions):
        raise DiffAccelError(f"'latent_error' needs the latents of '{base.name}' and of this run. Draw both --latents.")


def _same_pictures(base: Run, run: Run) -> tuple[Run, Run]:
    """Return the baseline with the pictures that the run has so far, and the run in the baseline's order."""
    by_key = {picture.key: picture for picture in run.pictures}
    base_pictures = tuple(picture for picture in base.pictures if picture.key in by_key)
    pictures = tuple(by_key[picture.key] for picture in base_pictures)
    return replace(base, pictures=base_pictures), replace(run, pictures=pictures)


def _verdict(measured: dict[Tolerance, tuple[Sequential, Tensor]], prompts: list[str] | None) -> dict[str, Any]:
    """Return what the conditions prove together: all hold, one does not, or neither is proven yet.

    Args:
        measured: by condition its test, and the difference of every picture, (n,).
        prompts: of every picture; None where there are none.
    """
    metrics, verdicts = {}, []
    for condition, (test, values) in measured.items():
        interval = test.interval(values, clusters=prompts)
        verdicts.append(test.look(values, clusters=prompts))
        metrics[condition.metric] = {
            "tolerance": condition.tolerance, "verdict": verdicts[-1], "difference": interval.value,
            "low": _finite(interval.low), "high": _finite(interval.high), "level": interval.level,
            "method": interval.method,
        }  # fmt: skip
    images = len(next(iter(measured.values()))[1])
    seen = f"{images} pictures" if prompts is None else f"{len(set(prompts))} prompts"
    if "different" in verdicts:
        names = ", ".join(c.metric for c, verdict in zip(measured, verdicts, strict=True) if verdict == "different")
        verdict, sentence = "different", f"difference in {names} proven after {seen}"
    elif set(verdicts) == {"equivalent"}:
        verdict, sentence = "equivalent", f"equivalence proven after {seen}"
    else:
        verdict, sentence = GO_ON, f"neither equivalence nor difference proven after {seen}"
    return {"verdict": verdict, "sentence": sentence, "images": images, "metrics": metrics}


def _difference(condition: Tolerance, device: Any) -> Difference:
    """Return the function that measures a condition's metric, less its value for equal pictures."""
    if condition.clip:
        clip = as_clip(extractor(condition.clip, device=device))
        return lambda baseline, run: equal_time.scores(clip, run) - equal_time.scores(clip, baseline)
    built_in = [distance for distance in fidelity.BUILT_IN if distance.metric == condition.metric]
    # the latent error needs no distance: it is measured wherever both runs have latents
    distances = [fidelity.lpips_distance(lpips.load(None))] if condition.metric == "lpips" else built_in

    def difference(baseline: Run, run: Run) -> Tensor:
        pairs = [(i, i) for i in range(len(run))]
        for distance, values in fidelity.measure(baseline, run, pairs, distances):
            if distance.metric == condition.metric:
                return values.clamp(*BOUNDS[condition.metric]) - EQUAL[condition.metric]
        raise DiffAccelError(f"'{condition.metric}' of '{run.name}' and '{baseline.name}' could not be measured.")

    return difference


def _identity(baseline: Run) -> str:
    """Return the baseline's name and what made it, so that a rule about another baseline is another rule."""
    return f"{baseline.name} ({baseline.record.get('fingerprint', 'a folder')})"


def _finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None
