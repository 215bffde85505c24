"""Make no more pictures than a question needs: ``eval run --baseline RUN --until "ssim within 0.02"``.

After 64, 128, 256, ... pictures the run is compared with the first ones of its baseline, and it ends when every
condition is proven to hold, or one is proven not to (:mod:`diffaccel.eval.uncertainty.sequential`). A condition is
about the mean over pictures of

- a distance to the baseline's picture, whose value for equal pictures is known: ``ssim``, ``lpips``, ``latent_error``.
  "Within 0.02" is a mean SSIM above 0.98.
- a picture's fit to its prompt, minus that of the baseline's picture: ``clip_score[emoji-clip-judge]``.

All conditions together err with a chance of at most 5 %, however often is looked: the level is shared by looks and
conditions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from diffaccel.errors import DiffAccelError, unknown
from diffaccel.eval.comparison import fidelity
from diffaccel.eval.networks import lpips
from diffaccel.eval.networks.extractors import as_clip, clips, extractor
from diffaccel.eval.sets.run import Run, of_record, open_run
from diffaccel.eval.timing import equal_time
from diffaccel.eval.uncertainty.sequential import LEAST_CLUSTERS, Sequential, doubling
from diffaccel.runs.generate import GO_ON, Early
from diffaccel.runs.request import Request

FIRST, LEVEL = 64, 0.95
EQUAL = {"ssim": 1.0, "lpips": 0.0, "latent_error": 0.0}  # values of equal pictures
CLIP_SCORE = "clip_score"
Difference = Callable[[Run, Run], Tensor]
_CONDITION = re.compile(r"\s*([A-Za-z_]+(?:\[[^\[\]]+\])?)\s+within\s+(\S+)\s*")
_HOW = 'Write it like "ssim within 0.02" or "ssim within 0.02 and clip_score[emoji-clip-judge] within 0.5".'


@dataclass(frozen=True)
class Condition:
    """A mean that is to be proven within a tolerance of what no difference would give."""

    metric: str
    tolerance: float

    @property
    def clip(self) -> str:
        """The network of a CLIP score, or ""."""
        return self.metric.partition("[")[2].removesuffix("]")


def parse(text: str) -> tuple[Condition, ...]:
    """The conditions of ``METRIC within NUMBER``, joined by ``and``.

    Raises:
        DiffAccelError: for anything else, an unknown metric, one that is there twice, or no positive number.
    """
    found = []
    for part in re.split(r"\sand\s", text):
        match = _CONDITION.fullmatch(part)
        if match is None:
            raise DiffAccelError(f"'{part.strip()}' is no condition. {_HOW}")
        metric, number = match.groups()
        try:
            condition = Condition(metric, float(number))
            Sequential(condition.tolerance)
        except ValueError:
            raise DiffAccelError(f"'{number}' is no tolerance; it must be a positive number. {_HOW}") from None
        if metric == "psnr":
            raise DiffAccelError("PSNR of equal pictures is infinite, so none is within a tolerance. Take ssim.")
        if metric == CLIP_SCORE:
            raise DiffAccelError(f"Say whose CLIP score: {', '.join(f'{CLIP_SCORE}[{name}]' for name in clips())}.")
        if metric not in EQUAL and not metric.startswith(f"{CLIP_SCORE}["):
            raise unknown("metric with a tolerance", metric, [*EQUAL, *(f"{CLIP_SCORE}[{name}]" for name in clips())])
        found.append(condition)
    names = [condition.metric for condition in found]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise DiffAccelError(f"'{twice}' is there twice in '{text}'. Give it one tolerance.")
    return tuple(found)


def early(
    text: str, baseline: str | Path, request: Request, *, looks: Sequence[int] = (), device: Any = "cpu"
) -> Early:
    """When a run of ``request`` may end: once it is proven to be like a baseline's, or not to be.

    Args:
        text: as :func:`parse` reads it.
        baseline: the folder of a finished run of the same prompts and seeds; it may hold more pictures.
        request: of the run.
        looks: numbers of pictures after which to look; by default 64, 128, 256, ..., and the last picture.
        device: of networks.

    Raises:
        DiffAccelError: for fewer than 16 prompts, looks that are none, a baseline that lacks a picture, and whatever
            :func:`parse` refuses.
    """
    conditions, base = parse(text), open_run(baseline)
    total = len(request)
    planned = tuple(looks) or doubling(total, min(FIRST, total))
    planned = (*(min(total, _whole(look, request.batch)) for look in planned if look < total), total)
    planned = tuple(dict.fromkeys(planned))
    first = len({item.prompt if item.prompt is not None else item.seed for item in request.items()[: planned[0]]})
    if first < LEAST_CLUSTERS:
        raise DiffAccelError(
            f"The first look, after {planned[0]} pictures, would see {first} prompts, and an interval needs at least "
            f"{LEAST_CLUSTERS} to be trusted. Use more prompts, or look later."
        )
    place = {picture.key: i for i, picture in enumerate(base.pictures)}
    if lacking := next((item for item in request.items() if (item.prompt, item.seed) not in place), None):
        raise DiffAccelError(
            f"The baseline '{base.name}' has no picture of seed {lacking.seed} of '{lacking.prompt}'. Give the run the "
            "baseline's prompts and seeds, at most as many of them."
        )
    latents = request.latents and all(picture.latents is not None for picture in base.pictures)
    if not latents and any(condition.metric == "latent_error" for condition in conditions):
        raise DiffAccelError(f"'latent_error' needs the latents of '{base.name}' and of this run. Draw both --latents.")
    level = 1 - (1 - LEVEL) / len(conditions)
    tests = {condition: Sequential(condition.tolerance, planned, level) for condition in conditions}
    differences = {condition: _difference(condition, device) for condition in conditions}

    def look(folder: Path, made: dict[str, Any]) -> dict[str, Any]:
        run = of_record(folder, made)
        mine = {picture.key: i for i, picture in enumerate(run.pictures)}
        kept = [i for i, picture in enumerate(base.pictures) if picture.key in mine]
        same = Run(base.name, base.path, tuple(base.pictures[i] for i in kept), base.record)
        ordered = Run(run.name, run.path, tuple(run.pictures[mine[p.key]] for p in same.pictures), run.record)
        return _verdict({c: (tests[c], differences[c](same, ordered)) for c in conditions}, ordered.prompts)

    rule = f"{' and '.join(f'{c.metric} within {c.tolerance:g}' for c in conditions)} of {_named(base)}"
    return Early(f"{rule}, looks at {', '.join(map(str, planned))}", planned, look)


def _verdict(found: dict[Condition, tuple[Sequential, Tensor]], prompts: list[str] | None) -> dict[str, Any]:
    """What the conditions prove together: all hold, one does not, or not yet either."""
    measured, verdicts = {}, []
    for condition, (test, values) in found.items():
        interval = test.interval(values, clusters=prompts)
        verdicts.append(test.look(values, clusters=prompts))
        measured[condition.metric] = {
            "tolerance": condition.tolerance, "verdict": verdicts[-1], "difference": interval.value,
            "low": _finite(interval.low), "high": _finite(interval.high), "level": interval.level,
            "method": interval.method,
        }  # fmt: skip
    images = len(next(iter(found.values()))[1])
    count = images if prompts is None else len(set(prompts))
    what = "pictures" if prompts is None else "prompts"
    if "different" in verdicts:
        named = ", ".join(c.metric for c, verdict in zip(found, verdicts, strict=True) if verdict == "different")
        verdict, sentence = "different", f"difference in {named} proven after {count} {what}"
    elif set(verdicts) == {"equivalent"}:
        verdict, sentence = "equivalent", f"equivalence proven after {count} {what}"
    else:
        verdict, sentence = GO_ON, f"neither equivalence nor difference proven after {count} {what}"
    return {"verdict": verdict, "sentence": sentence, "images": images, "metrics": measured}


def _difference(condition: Condition, device: Any) -> Difference:
    """From two runs of the same pictures in the same order to a number a picture: 0 where nothing changed."""
    if condition.clip:
        clip = as_clip(extractor(condition.clip, device=device))
        return lambda baseline, run: equal_time.scores(clip, run) - equal_time.scores(clip, baseline)
    distances = {distance.metric: distance for distance in fidelity.BUILT_IN}
    if condition.metric == "lpips":
        distances["lpips"] = fidelity.Distance("lpips", "LPIPS-Alex", "lower", "", lpips.load(None))
    wanted = [distances[condition.metric]] if condition.metric in distances else []

    def difference(baseline: Run, run: Run) -> Tensor:
        pairs = [(i, i) for i in range(len(run))]
        for distance, values in fidelity.measure(baseline, run, pairs, wanted):
            if distance.metric == condition.metric:
                return values - EQUAL[condition.metric]
        raise DiffAccelError(f"'{condition.metric}' of '{run.name}' and '{baseline.name}' could not be measured.")

    return difference


def _whole(look: int, batch: int) -> int:
    """The end of the chunk in which a look falls."""
    return -(-look // batch) * batch


def _named(baseline: Run) -> str:
    """The baseline by its name and by what made it, so that a rule about another one is another rule."""
    return f"{baseline.name} ({baseline.record.get('fingerprint', 'a folder')})"


def _finite(value: float) -> float | None:
    return value if abs(value) < float("inf") else None
