"""How far a run is from the baseline at equal prompt and seed, picture by picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError
from diffaccel.eval.comparison.row import Better, Row
from diffaccel.eval.images.prefetch import ahead
from diffaccel.eval.metrics import paired
from diffaccel.eval.sets.run import Pairs, Run
from diffaccel.eval.uncertainty import intervals
from diffaccel.files import read_tensor

Measure = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Distance:
    """A distance of two pictures: how it is called and computed."""

    metric: str
    key: str
    better: Better
    unit: str
    measure: Measure
    detail: dict[str, Any] = field(default_factory=dict)


LATENTS = Distance("latent_error", "latent error", "lower", "", paired.latent_error)
BUILT_IN = (
    Distance("psnr", "PSNR", "higher", "dB", paired.psnr),
    Distance("ssim", "SSIM", "higher", "", paired.ssim),
)


def measure(
    baseline: Run, run: Run, pairs: Pairs, distances: Sequence[Distance], *, batch: int = 32
) -> list[tuple[Distance, Tensor]]:
    """Every distance of every pair, in the order of pairs, (n,) float64; of latents too where both runs kept them.

    Raises:
        DiffAccelError: for pictures of different sizes.
    """
    parts: list[list[Tensor]] = [[] for _ in distances]
    for one, other in _batches(baseline, run, pairs, batch):
        for distance, found in zip(distances, parts, strict=True):
            found.append(distance.measure(one, other).double().cpu())
    measured = [(distance, torch.cat(found)) for distance, found in zip(distances, parts, strict=True)]
    errors = _latent_errors(baseline, run, pairs)
    return measured if errors is None else [*measured, (LATENTS, errors)]


def _batches(baseline: Run, run: Run, pairs: Pairs, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    ones: list[Tensor] = []
    others: list[Tensor] = []
    read = ahead(lambda places: (baseline.image(places[0]), run.image(places[1])), pairs)
    for (_, j), (one, other) in zip(pairs, read, strict=True):
        if one.shape != other.shape:
            raise DiffAccelError(
                f"'{run.pictures[j].id}' of '{run.name}' is {other.shape[2]}x{other.shape[1]}, and its pair in "
                f"'{baseline.name}' {one.shape[2]}x{one.shape[1]}. Make both at one size."
            )
        if ones and (len(ones) == batch or one.shape != ones[0].shape):
            yield torch.stack(ones), torch.stack(others)
            ones, others = [], []
        ones.append(one)
        others.append(other)
    if ones:
        yield torch.stack(ones), torch.stack(others)


def _latent_errors(baseline: Run, run: Run, pairs: Pairs) -> Tensor | None:
    """Relative error of what the decoder was given, (n,); None unless both runs kept it."""
    files = [(baseline.pictures[i].latents, run.pictures[j].latents) for i, j in pairs]
    if any(None in both for both in files):
        return None
    rows = []
    for one, other in files:
        a, b = read_tensor(one), read_tensor(other)  # type: ignore[arg-type]
        if a.shape != b.shape:
            return None
        rows.append(paired.latent_error(a[None], b[None]))
    return torch.cat(rows)


def row(run: Run, distance: Distance, values: Tensor, *, clusters: Sequence[Any], floor: float | None) -> Row:
    """The mean over pairs with its interval, which draws whole clusters, and where the worst pairs are."""
    summary = paired.summarise(values, better=distance.better)
    made = Row(
        metric=distance.metric, key=distance.key, family="fidelity", run=run.name, better=distance.better,
        unit=distance.unit, floor=floor, n=len(values), m=len(values), detail={**distance.detail, **summary},
    )  # fmt: skip
    finite = values[torch.isfinite(values)]
    made.identical = len(finite) == 0 or bool((values == (0 if distance.better == "lower" else 1)).all())
    if len(finite) < len(values):  # only PSNR has no number for pictures that are equal
        made.detail["identical_pairs"] = len(values) - len(finite)
        clusters = [c for c, v in zip(clusters, values.tolist(), strict=True) if math.isfinite(v)]
    if len(finite) == 0:
        return made
    made.value = float(finite.mean())
    if len(set(clusters)) > 1:
        made.interval = intervals.bootstrap_mean(finite, clusters=clusters)
    return made
