"""How well pictures fit their prompts, by networks that look at both, and what changed since the baseline.

A CLIP's score is 100 max(cos, 0) of a picture's and its prompt's features (arXiv 2104.08718), then the mean; a
preference scorer's is its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.eval.comparison import fidelity
from diffaccel.eval.comparison import paired_scores as scored
from diffaccel.eval.comparison.distribution import features
from diffaccel.eval.comparison.row import Row
from diffaccel.eval.images.prefetch import ahead
from diffaccel.eval.metrics import clip_score as alignment
from diffaccel.eval.networks.extractors.clip import ClipExtractor
from diffaccel.eval.networks.scorers import Scorer
from diffaccel.eval.sets.run import Pairs, Run, pair_prompts

BATCH = 32  # pictures that a scorer gets at once
Found = tuple[list[Row], dict[str, Tensor]]


def clip_scores(
    baseline: Run, runs: Sequence[Run], pairs: Mapping[str, Pairs], others: Run | None, clip: ClipExtractor
) -> Found:
    """CLIP score: the baseline's row and one of each run with paired differences; and every pair's score by run.

    Raises:
        DiffAccelError: for a run whose prompts are not known.
    """
    everyone = _everyone(baseline, runs, others, "--clip")
    texts = list(dict.fromkeys(prompt for run in everyone for prompt in run.prompts or []))
    place, embedded = {text: i for i, text in enumerate(texts)}, clip.texts(texts)

    def scores(run: Run) -> Tensor:
        return alignment.clip_score(features(run, clip), embedded[[place[prompt] for prompt in run.prompts or []]])

    detail = {"extractor": clip.name, "weights_sha256": clip.weights_sha256, "convention": "100 max(cos, 0) a picture"}
    if cut := clip.truncated(list(dict.fromkeys(baseline.prompts or []))):
        detail["from"] = f"{cut} prompts were too long for it and cut"
    score = scored.Score(metric="clip_score", key=f"clip_score[{clip.name}]", family="alignment", detail=detail)
    values = {run.name: scores(run) for run in (baseline, *runs)}
    return scored.rows(score, values, baseline, runs, pairs, None if others is None else scores(others))


def clip_similarity(
    baseline: Run, runs: Sequence[Run], pairs: Mapping[str, Pairs], others: Run | None, clip: ClipExtractor
) -> Found:
    """CLIP-I (arXiv 2208.12242): a row of each run, and every pair's cosine of image features by run; exactly 1 where
    features are equal to the bit."""
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


def preferred(
    baseline: Run, runs: Sequence[Run], pairs: Mapping[str, Pairs], others: Run | None, scorer: Scorer
) -> Found:
    """The same of a preference scorer.

    Raises:
        DiffAccelError: for a run whose prompts are not known, and whatever the scorer refuses.
    """
    _everyone(baseline, runs, others, "--scorer")

    def scores(run: Run) -> Tensor:
        parts: list[Tensor] = []
        waiting: list[Tensor] = []
        prompts = run.prompts or []
        for at, image in enumerate(ahead(run.image, range(len(run)))):
            if waiting and (len(waiting) == BATCH or image.shape != waiting[0].shape):
                parts.append(scorer(torch.stack(waiting), prompts[at - len(waiting) : at]))
                waiting = []
            waiting.append(image)
        parts.append(scorer(torch.stack(waiting), prompts[len(run) - len(waiting) :]))
        return torch.cat(parts)

    detail = {"scorer": scorer.name, "licence": scorer.licence}
    score = scored.Score(metric=scorer.name, key=scorer.name, family="alignment", detail=detail)
    values = {run.name: scores(run) for run in (baseline, *runs)}
    return scored.rows(score, values, baseline, runs, pairs, None if others is None else scores(others))


def _everyone(baseline: Run, runs: Sequence[Run], others: Run | None, option: str) -> list[Run]:
    everyone = [baseline, *runs, *([others] if others is not None else [])]
    for run in everyone:
        if run.prompts is None:
            raise DiffAccelError(
                f"The prompts of '{run.name}' are not known. Leave {option} out, or compare runs of diffaccel."
            )
    return everyone
