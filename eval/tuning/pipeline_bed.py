"""Plans on an open pipeline: drawn into run folders, measured against the baseline's pictures, timed in turns."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import Any

from diffaccel.errors import first_line
from diffaccel.eval.comparison.measures import Measures
from diffaccel.eval.sets.candidates import only_methods
from diffaccel.eval.sets.run import Run, open_run
from diffaccel.eval.timing import turns as timing
from diffaccel.eval.tuning import measuring
from diffaccel.eval.tuning.bed import Part, Refused
from diffaccel.runs.generate import generate_run
from diffaccel.runs.request import Request
from diffaccel.runs.variant import Variant

HELD_OUT_SEEDS = 1_000_000  # added to the seeds of held-out pictures


@dataclass(eq=False)
class PipelineBed:
    """Draws and measures plans on a pipeline without methods.

    Attributes:
        request: everything but prompts, seeds and methods.
        subjects: by set, its prompts or classes; None each for a pipeline that draws from noise alone.
        folder: that keeps the baseline's pictures, and those of plans until they are measured.
        metrics: of the gate.
        first: number of tuning prompts on which the baseline is compared with itself.
        once: returns what was kept under a key, or else makes and keeps it, so that it is the same after a stop.
    """

    pipe: Any
    digest: str
    request: Request
    subjects: Mapping[str, Sequence[str | None]]
    folder: Path
    metrics: Sequence[str]
    measures: Measures
    first: int = 4
    once: Callable[[str, Callable[[], Any]], Any] = lambda key, make: make()
    _own: dict[str, float] = field(default_factory=dict)

    def baseline(self) -> Variant:
        """Return the plain pipeline with its number of steps."""
        return Variant((), {"steps": self.request.steps})

    def baseline_values(self) -> dict[str, float]:
        """Return by metric what a gate compares of the baseline itself; measured on the first tuning prompts."""
        if not self._own:
            run = self._draw(self.baseline(), Part("tuning", 0, self.first))
            own = measuring.own_values(measuring.compare_pair(run, run, self.measures), self.metrics)
            self._own = {**own, "seconds": self.once("warm seconds", self._warm_seconds), "speedup": 1.0}
        return self._own

    def _warm_seconds(self, calls: int = 3) -> float:
        """Return seconds a picture of warm baseline calls, as the certificate times them."""
        return median(self._base_call(Part("tuning", 0, self.first)) for _ in range(calls))

    def call_seconds(self, calls: int = 3) -> float:
        """Return seconds a picture of the baseline: the median of calls after a first one."""
        return median([self._base_call(Part("tuning", 0, 1)) for _ in range(calls + 1)][1:])

    def evaluate(self, plan: Variant, part: Part) -> dict[str, Any]:
        """Draw a plan on a part, and the baseline where it is not drawn yet; time baseline calls beside tuning ones."""
        start = time.perf_counter()
        base_run = self._draw(self.baseline(), part)
        around = [self._base_call(part)] if part.prompts == "tuning" else []
        try:
            run = self._draw(plan, part)
        except OSError:
            raise
        except Exception as error:  # a method's own code runs, on a pipeline that it may not be for
            raise Refused(first_line(error)) from error
        if around and (part.start == 0 or part.stop - part.start > 8):  # one alone is too noisy to begin with
            around.append(self._base_call(part))
        values, cost = measuring.numbers(measuring.compare_pair(base_run, run, self.measures), self.metrics)
        if broken := [metric for metric, numbers in values.items() if any(map(math.isnan, numbers))]:
            raise Refused(f"{broken[0]} of what it draws is not a number")
        ratio = median(around) / _call_seconds(run) if around else None
        if part.prompts == "tuning":  # measured, and many
            shutil.rmtree(run.path, ignore_errors=True)
        return {"values": values, "cost": cost, "ratio": ratio, "spent": time.perf_counter() - start}

    def take_turns(self, plans: list[Variant], turns: int, part: Part) -> dict[str, Any]:
        """Time plans in turns with the baseline, whole calls, on the part's first pictures."""
        start = time.perf_counter()
        request = self._request(Variant(), part)
        result = timing.take_turns(self.pipe, request, [self.baseline(), *plans], turns=turns, warm_up=1)
        base, *others = result["variants"]
        timed = {entry["name"]: {"seconds": entry["seconds_per_image"], "ratio": entry["ratio"]} for entry in others}
        spent = time.perf_counter() - start
        return {"plans": timed, "baseline": base["seconds_per_image"], "spent": spent, "turns": turns}

    def _base_call(self, part: Part) -> float:
        """Return seconds a picture of one baseline call."""
        request = self._request(self.baseline(), part)
        cost, _ = timing.one_call(self.pipe, request)
        return cost["seconds"] / len(request.chunks()[0])

    def _draw(self, plan: Variant, part: Part) -> Run:
        word = plan.name
        name = f"{plan.folder[:60]}-{sha256(word.encode()).hexdigest()[:8]}"
        out = self.folder / name / part.name
        out.parent.mkdir(parents=True, exist_ok=True)
        with only_methods(self.pipe, plan.methods):
            generate_run(self._request(plan, part), out, pipe=self.pipe, digest=self.digest)
        return open_run(out)

    def _request(self, plan: Variant, part: Part) -> Request:
        """Return the request of a part's pictures: picture ``i`` of a set has that set's seed ``i``."""
        subjects = tuple(self.subjects[part.prompts][part.start : part.stop])
        seed = self.request.seed + part.start + (HELD_OUT_SEEDS if part.prompts == "held-out" else 0)
        request = replace(plan.of(self.request), seed=seed)
        if None in subjects:
            return replace(request, num=len(subjects))
        texts = tuple(text for text in subjects if text is not None)
        return replace(request, classes=texts) if self.request.classes else replace(request, prompts=texts)


def _call_seconds(run: Run) -> float:
    """Return the median seconds a picture of a run's calls, the first one left out where there are others."""
    costs = [chunk["cost"]["seconds"] for chunk in run.record["chunks"]]
    pictures = len(run) / len(costs)
    return median(costs[1:] or costs) / pictures
