"""Nearest reference pictures: the cosine of every picture to the closest one shows whether a run repeats them."""

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
SHOWN = 3  # pairs of each run


def nearest_cosines(samples: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Find ``max_j cos(x_i - m, y_j - m)`` with the reference's mean ``m``, and its ``j``: (n,) float64 and (n,).

    What all pictures share, such as a white ground, is in the mean and makes none of them near another.

    Args:
        samples: features ``(n, d)``.
        reference: features ``(m, d)``.
    """
    mean = reference.double().mean(0)
    y = F.normalize(reference.double() - mean, dim=1)
    blocks = [(F.normalize(x.double() - mean, dim=1) @ y.T).max(1) for x in samples.split(BLOCK)]
    return torch.cat([block.values for block in blocks]).clamp(max=1), torch.cat([block.indices for block in blocks])


def section(baseline: Run, runs: Sequence[Run], reference: Source, extractor: Extractor) -> Section:
    """Tabulate how near the reference every run is, and its three nearest pictures with what they are near to."""
    reference_features = extract(reference, extractor)
    lines, data = [], {}
    for run in (baseline, *runs):
        cosines, places = nearest_cosines(features(run, extractor), reference_features.values)
        top = cosines.argsort(descending=True, stable=True)[:SHOWN].tolist()
        pairs = [(run.pictures[i].id, reference_features.ids[int(places[i])], float(cosines[i])) for i in top]
        numbers = {"mean": float(cosines.mean()), "p99": float(cosines.quantile(0.99)), "nearest": pairs}
        texts = "; ".join(f"{picture} ~ {neighbour} ({cosine:.3f})" for picture, neighbour, cosine in pairs)
        lines.append((run.name, f"{numbers['mean']:.3f}", f"{numbers['p99']:.3f}", texts))
        data[run.name] = numbers
    note = f"Cosine of {extractor.name}'s features, less the reference's mean, of every picture to the nearest one of "
    note += f"{reference.name}. A run much nearer than the baseline, or pairs near 1, may repeat what the model was "
    note += "trained on."
    return Section(
        key=f"nearest-{extractor.key}", title=f"Nearest pictures of {reference.name} by {extractor.name}", note=note,
        columns=("run", "mean", "99th percentile", "nearest pairs"), rows=tuple(lines), data={"runs": data},
    )  # fmt: skip
