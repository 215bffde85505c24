"""Fidelity: the distance of a run's pictures to the baseline's of the same prompt and seed, picture by picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffaccel.errors import DiffAccelError, size_text
from diffaccel.eval.comparison.paired_scores import mean_estimate
from diffaccel.eval.comparison.row import Better, Estimate, Row
from diffaccel.eval.comparison.verdict import ONE_COLOUR
from diffaccel.eval.images.prefetch import ahead
from diffaccel.eval.metrics import paired
from diffaccel.eval.sets.run import Pairs, Run
from diffaccel.files import read_tensor

if TYPE_CHECKING:
    from diffaccel.eval.networks.lpips import Lpips

PairFunction = Callable[[Tensor, Tensor], Tensor]  # two batches (B, 3, H, W), baseline first, to a value a pair (B,)


@dataclass(frozen=True)
class Distance:
    """A distance of two pictures, as rows name it, and the function that computes it."""

    metric: str
    key: str
    better: Better
    unit: str
    measure: PairFunction
    detail: dict[str, Any] = field(default_factory=dict)


LATENTS = Distance("latent_error", "latent error", "lower", "", paired.latent_error)
BUILT_IN = (
    Distance("psnr", "PSNR", "higher", "dB", paired.psnr),
    Distance("ssim", "SSIM", "higher", "", paired.ssim),
)


def _one_colour(base_images: Tensor, images: Tensor) -> Tensor:
    """Return 1 for pairs whose second picture is of one colour while the first is not, else 0. (B,)."""
    spreads = [(x.amax((2, 3)).int() - x.amin((2, 3)).int()).amax(1) for x in (images, base_images)]
    return ((spreads[0] <= FLAT) & (spreads[1] > FLAT)).double()


FLAT = 2  # levels of 255 that a video's compression may leave in a picture of one colour
BLANK = Distance(ONE_COLOUR, "of one colour", "lower", "", _one_colour)


def lpips_distance(network: Lpips) -> Distance:
    """Return LPIPS in the features of AlexNet (arXiv 1801.03924)."""
    return Distance("lpips", "LPIPS-Alex", "lower", "", network, {"weights_sha256": network.weights_sha256})


def measure(
    baseline: Run, run: Run, pairs: Pairs, distances: Sequence[Distance], *, batch: int = 32
) -> list[tuple[Distance, Tensor]]:
    """Measure every distance of every pair, in the order of pairs, (n,) float64; that of latents where both kept them.

    Raises:
        DiffAccelError: for pictures of different sizes.
    """
    parts: list[list[Tensor]] = [[] for _ in distances]
    for base_images, images in _batches(baseline, run, pairs, batch):
        for distance, values in zip(distances, parts, strict=True):
            values.append(distance.measure(base_images, images).double().cpu())
    measured = [(distance, torch.cat(values)) for distance, values in zip(distances, parts, strict=True)]
    errors = _latent_errors(baseline, run, pairs)
    return measured if errors is None else [*measured, (LATENTS, errors)]


def _batches(baseline: Run, run: Run, pairs: Pairs, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of paired images of one size, the baseline's first."""
    base_images: list[Tensor] = []
    images: list[Tensor] = []
    read = ahead(lambda places: (baseline.image(places[0]), run.image(places[1])), pairs)
    for (_, j), (base_image, image) in zip(pairs, read, strict=True):
        if base_image.shape != image.shape:
            raise DiffAccelError(
                f"'{run.pictures[j].id}' of '{run.name}' is {size_text(*image.shape[1:])}, and its pair in "
                f"'{baseline.name}' {size_text(*base_image.shape[1:])}. Make both at one size."
            )
        if base_images and (len(base_images) == batch or base_image.shape != base_images[0].shape):
            yield torch.stack(base_images), torch.stack(images)
            base_images, images = [], []
        base_images.append(base_image)
        images.append(image)
    if base_images:
        yield torch.stack(base_images), torch.stack(images)


def _latent_errors(baseline: Run, run: Run, pairs: Pairs) -> Tensor | None:
    """Return the relative error of what the decoder was given, (n,); None unless both runs kept it."""
    files = [(baseline.pictures[i].latents, run.pictures[j].latents) for i, j in pairs]
    if any(None in both for both in files):
        return None
    errors = []
    for base_file, file in files:
        base_latents, latents = read_tensor(base_file), read_tensor(file)  # type: ignore[arg-type]
        if base_latents.shape != latents.shape:
            return None
        errors.append(paired.latent_error(base_latents[None], latents[None]))
    return torch.cat(errors)


def estimate(values: Tensor, clusters: Sequence[Any]) -> Estimate | None:
    """Return the mean over the pairs that have a finite value, with its interval; None where none has.

    Only PSNR has no number for pictures that are equal. The detail counts such pairs, and has the PSNR of all pairs'
    pixels together, ``-10 log10`` of their mean squared error, in which they count.
    """
    finite = torch.isfinite(values)
    if not finite.any():
        return None
    kept = [label for label, is_finite in zip(clusters, finite.tolist(), strict=True) if is_finite]
    mean, equal = mean_estimate(values[finite], kept), int((~finite).sum())
    if not equal:
        return mean
    pooled = -10 * math.log10(float((10 ** (-values / 10)).mean()))
    note = f"{equal} of {len(values)} pairs identical, left out of the mean; {pooled:.2f} dB over the pixels of all"
    return replace(
        mean, note="; ".join(filter(None, (note, mean.note))), detail={"identical_pairs": equal, "pooled": pooled}
    )


def row(run: Run, distance: Distance, values: Tensor, *, clusters: Sequence[Any], floor: Estimate | None) -> Row:
    """Return the row of a distance: its mean over pairs with an interval, and which pairs are the worst.

    Args:
        run: the run.
        distance: that was measured.
        values: of every pair, (n,).
        clusters: of every pair, a label; the interval resamples whole clusters.
        floor: the mean between the baseline and itself with other seeds.
    """
    summary = paired.summarise(values, better=distance.better)
    distance_row = Row(
        metric=distance.metric, key=distance.key, family="fidelity", run=run.name, better=distance.better,
        unit=distance.unit, n=len(values), m=len(values), detail={**distance.detail, **summary},
    )  # fmt: skip
    if floor is not None:
        distance_row.set_floor(floor)
    equal_value = 0 if distance.better == "lower" else 1
    mean = estimate(values, clusters)
    distance_row.identical = mean is None or bool((values == equal_value).all())
    if mean is None:
        distance_row.detail["identical_pairs"] = len(values)
        return distance_row
    distance_row.value = mean.value
    distance_row.n = len(values) - mean.detail.get("identical_pairs", 0)
    distance_row.detail |= mean.detail
    distance_row.add_note(mean.note)
    distance_row.set_interval("interval", mean.interval)
    return distance_row
