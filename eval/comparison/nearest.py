"""Whether pictures repeat the reference set: the cosine of each one to its nearest reference picture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from diffaccel.eval.comparison.distribution import features
from diffaccel.eval.comparison.row import Section
from diffaccel.eval.features.extract import extract
from diffaccel.eval.images.source import Source
from diffaccel.eval.networks.extractors.base import Extractor
from diffaccel.eval.sets.run import Run

BLOCK = 2048
SHOWN = 3  # of each run


def nearest(samples: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """``max_j cos(x_i - m, y_j - m)`` with the reference's mean ``m``, and its ``j``: (n,) float64 and (n,).

    What all pictures share, such as a white ground, is in the mean and makes none of them near another.

    Args:
        samples: features ``(n, d)``.
        reference: features ``(m, d)``.
    """
    mean = reference.double().mean(0)
    y = F.normalize(reference.double() - mean, dim=1)
    found = [(F.normalize(x.double() - mean, dim=1) @ y.T).max(1) for x in samples.split(BLOCK)]
    return torch.cat([part.values for part in found]).clamp(max=1), torch.cat([part.indices for part in found])


def section(baseline: Run, runs: Sequence[Run], reference: Source, extractor: Extractor) -> Section:
    """How near the reference every run is, and its three nearest pictures with what they are near to."""
    known = extract(reference, extractor)
    lines, data = [], {}
    for run in (baseline, *runs):
        cosines, places = nearest(features(run, extractor), known.values)
        top = cosines.argsort(descending=True, stable=True)[:SHOWN].tolist()
        shown = [(run.pictures[i].id, known.ids[int(places[i])], float(cosines[i])) for i in top]
        of = {"mean": float(cosines.mean()), "p99": float(cosines.quantile(0.99)), "nearest": shown}
        texts = "; ".join(f"{mine} ~ {theirs} ({cosine:.3f})" for mine, theirs, cosine in shown)
        lines.append((run.name, f"{of['mean']:.3f}", f"{of['p99']:.3f}", texts))
        data[run.name] = of
    note = f"Cosine of {extractor.name}'s features, less the reference's mean, of every picture to the nearest one of "
    note += f"{reference.name}. A run much nearer than the baseline, or pairs near 1, may repeat what the model was "
    note += "trained on."
    return Section(
        key=f"nearest-{extractor.key}", title=f"Nearest pictures of {reference.name} by {extractor.name}", note=note,
        columns=("run", "mean", "99th percentile", "nearest pairs"), rows=tuple(lines), data={"runs": data},
    )  # fmt: skip
