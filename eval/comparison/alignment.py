"""Fit of pictures to their prompts, by networks that look at both, and its change since the baseline.

The score of a CLIP is 100 max(cos, 0) of the features of a picture and of its prompt (arXiv 2104.08718), averaged over
pictures; a preference scorer has a scale of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.eval.comparison import fidelity, paired_scores
from diffaccel.eval.comparison.clip_scores import CONVENTION, ClipScores
from diffaccel.eval.comparison.distribution import features
from diffaccel.eval.comparison.row import Row
from diffaccel.eval.images.prefetch import ahead
from diffaccel.eval.metrics.clip_score import clip_i
from diffaccel.eval.networks.extractors.clip import ClipExtractor
from diffaccel.eval.networks.scorers import Scorer
from diffaccel.eval.sets.run import Pairs, Run, pair_by_prompt

BATCH = 32  # pictures that a scorer gets at once
RowsAndValues = tuple[list[Row], dict[str, Tensor]]  # rows of one metric, and by run its value of every pair


def clip_scores(
    baseline: Run, runs: Sequence[Run], pairs: Mapping[str, Pairs], others: Run | None, clip: ClipExtractor
) -> RowsAndValues:
    """Measure the CLIP score: a row of the baseline, and one of each run with paired differences.

    Raises:
        DiffAccelError: for a run whose prompts are not known.
    """
    _check_prompts_are_known(baseline, runs, others, "--clip")
    scores = ClipScores(clip)
    detail = {"extractor": clip.name, "weights_sha256": clip.weights_sha256, "convention": CONVENTION}
    if cut := clip.truncated(list(dict.fromkeys(baseline.prompts or []))):
        detail["from"] = f"{cut} prompts were too long for it and cut"
    score = paired_scores.Score(metric="clip_score", key=f"clip_score[{clip.name}]", family="alignment", detail=detail)
    values = {run.name: scores.of_run(run) for run in (baseline, *runs)}
    scored_others = None if others is None else (others, scores.of_run(others))
    return paired_scores.rows(score, values, baseline, runs, pairs, scored_others)


def clip_similarity(
    baseline: Run, runs: Sequence[Run], pairs: Mapping[str, Pairs], others: Run | None, clip: ClipExtractor
) -> RowsAndValues:
    """Measure CLIP-I (arXiv 2208.12242), the cosine of image features of every pair: a row of each run.

    It is exactly 1 where features are equal to the bit.
    """
    detail = {"extractor": clip.name, "weights_sha256": clip.weights_sha256}
    distance = fidelity.Distance("clip_i", f"CLIP-I[{clip.name}]", "higher", "", clip_i, detail)
    base_features = features(baseline, clip)

    def cosines(run: Run, run_pairs: Pairs) -> Tensor:
        a, b = base_features[[i for i, _ in run_pairs]], features(run, clip)[[j for _, j in run_pairs]]
        values = distance.measure(a, b)
        values[(a == b).all(1)] = 1.0  # without rounding
        return values

    floor = None
    if others is not None:
        other_pairs = pair_by_prompt(baseline, others)
        floor = fidelity.estimate(cosines(others, other_pairs), paired_scores.cluster_labels(baseline, other_pairs))
    values = {run.name: cosines(run, pairs[run.name]) for run in runs}
    rows = [
        fidelity.row(
            run, distance, values[run.name], floor=floor,
            clusters=paired_scores.cluster_labels(baseline, pairs[run.name]),
        )
        for run in runs
    ]  # fmt: skip
    return rows, values


def preference_scores(
    baseline: Run, runs: Sequence[Run], pairs: Mapping[str, Pairs], others: Run | None, scorer: Scorer
) -> RowsAndValues:
    """Measure a preference score: a row of the baseline, and one of each run with paired differences.

    Raises:
        DiffAccelError: for a run whose prompts are not known, and whatever the scorer refuses.
    """
    _check_prompts_are_known(baseline, runs, others, "--scorer")
    detail = {"scorer": scorer.name, "licence": scorer.licence}
    score = paired_scores.Score(metric=scorer.name, key=scorer.name, family="alignment", detail=detail)
    values = {run.name: _score_pictures(scorer, run) for run in (baseline, *runs)}
    scored_others = None if others is None else (others, _score_pictures(scorer, others))
    return paired_scores.rows(score, values, baseline, runs, pairs, scored_others)


def _score_pictures(scorer: Scorer, run: Run) -> Tensor:
    """Score every picture with its prompt, in batches of pictures of one size."""
    scores: list[Tensor] = []
    batch: list[Tensor] = []
    prompts = run.prompts or []
    for index, image in enumerate(ahead(run.image, range(len(run)))):
        if batch and (len(batch) == BATCH or image.shape != batch[0].shape):
            scores.append(scorer(torch.stack(batch), prompts[index - len(batch) : index]))
            batch = []
        batch.append(image)
    scores.append(scorer(torch.stack(batch), prompts[len(run) - len(batch) :]))
    return torch.cat(scores)


def _check_prompts_are_known(baseline: Run, runs: Sequence[Run], others: Run | None, option: str) -> None:
    """Raise for a run whose prompts are not known."""
    for run in (baseline, *runs, *([others] if others is not None else [])):
        if run.prompts is None:
            raise DiffAccelError(
                f"The prompts of '{run.name}' are not known. Leave {option} out, or compare runs of diffaccel."
            )
