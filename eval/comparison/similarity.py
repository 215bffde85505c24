"""CLIP-I: how alike a run's pictures and the baseline's are to a CLIP, at equal prompt and seed (arXiv 2208.12242)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from diffaccel.eval import alignment
from diffaccel.eval.comparison import fidelity, scored
from diffaccel.eval.comparison.distribution import features
from diffaccel.eval.comparison.row import Row
from diffaccel.eval.extractors.clip import ClipExtractor
from diffaccel.eval.runs import Pairs, Run, pair_prompts


def rows(
    baseline: Run, runs: Sequence[Run], pairs: Mapping[str, Pairs], others: Run | None, clip: ClipExtractor
) -> tuple[list[Row], dict[str, Tensor]]:
    """A row of each run, and every pair's cosine by run; exactly 1 where features are equal to the bit."""
    detail = {"extractor": clip.name, "weights_sha256": clip.weights_sha256}
    distance = fidelity.Distance("clip_i", f"CLIP-I[{clip.name}]", "higher", "", alignment.clip_i, detail)
    of_baseline = features(baseline, clip)

    def cosines(run: Run, places: Pairs) -> Tensor:
        one, other = of_baseline[[i for i, _ in places]], features(run, clip)[[j for _, j in places]]
        found = distance.measure(one, other)
        found[(one == other).all(1)] = 1.0  # without rounding
        return found

    floor = None if others is None else float(cosines(others, pair_prompts(baseline, others)).mean())
    values = {run.name: cosines(run, pairs[run.name]) for run in runs}
    found = [
        fidelity.row(run, distance, values[run.name], clusters=scored.units(baseline, pairs[run.name]), floor=floor)
        for run in runs
    ]
    return found, values
