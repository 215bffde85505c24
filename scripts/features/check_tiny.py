"""Measure the sensitivity of the embedded feature network: does its Fréchet distance grow with every degradation?

    python -m scripts.features.check_tiny --out out/features [--images FOLDER] [--weights FILE | --untrained]

Sets of pictures unseen in training are split into halves A and B. Six rising levels of each degradation are applied to
B and compared with A; the noise floor is the distance of A to the clean B. Mode drop replaces the pictures of whole
modes in B by copies of other pictures of B. The script prints a table, writes ``check.json``, and exits with status 1
unless every Spearman correlation of level and distance is at least 0.9.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffaccel.eval.metrics.frechet import Moments, distance
from diffaccel.eval.networks.tiny_network import WEIGHTS, TinyNetwork, load_tiny, weights_sha256
from diffaccel.files import write_json
from diffaccel.record import now, versions
from scripts.features import degradations, pictures
from scripts.features.pictures import PictureSet

LEVELS: dict[str, tuple[float, ...]] = {
    "blur": (0.5, 0.75, 1.0, 1.5, 2.5, 4.0),  # standard deviation, pixels
    "noise": (4, 8, 16, 32, 64, 96),  # standard deviation, of 255
    "jpeg": (90, 75, 50, 30, 15, 5),  # quality of libjpeg
    "desaturation": (1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1.0),  # share of the way to luma
    "patch shuffle": (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0),  # share of 8 x 8 patches that change places
    "mode drop": (0.1, 0.25, 0.4, 0.6, 0.75, 0.9),  # share of the modes that are missing
}


def degraded(images: Tensor, kind: str, level: float, seed: int) -> Tensor:
    """Degrade uint8 pictures; all levels of a kind use the same random numbers."""
    generator = torch.Generator().manual_seed(seed)
    x, strength = images.float() / 255, torch.full((len(images),), float(level))
    if kind == "blur":
        return pictures.to_uint8(degradations.gaussian_blur(x, strength))
    if kind == "noise":
        return pictures.to_uint8(x + level / 255 * torch.randn(x.shape, generator=generator))
    if kind == "desaturation":
        return pictures.to_uint8(degradations.desaturate(x, strength))
    if kind == "patch shuffle":
        return pictures.to_uint8(degradations.shuffle_patches(x, strength, 8, generator))
    return torch.stack([_jpeg(image, int(level)) for image in images])


def _jpeg(image: Tensor, quality: int) -> Tensor:
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1)


def spearman(values: list[float]) -> float:
    """Compute the rank correlation with 0, 1, 2, ..."""
    rank = torch.tensor(values, dtype=torch.float64).argsort().argsort().double()
    return float(torch.corrcoef(torch.stack([rank, torch.arange(len(values)).double()]))[0, 1])


def measure(features: Callable[[Tensor], Tensor], images: PictureSet, seed: int) -> dict[str, Any]:
    """Measure one set: a row per degradation, and the distance between modes."""
    half = len(images.images) // 2
    a, b = images.images[:half], images.images[half : 2 * half]
    whole, clean = Moments.of(features(a)), features(b)
    floor = distance(whole, Moments.of(clean))
    modes = sorted(set(images.mode))
    of_mode = torch.tensor([modes.index(name) for name in images.mode])
    rows = []
    for kind, levels in LEVELS.items():
        if kind == "mode drop":
            if len(modes) < 7:
                continue
            sources = [_drop_modes(of_mode[half : 2 * half], len(modes), missing, seed) for missing in levels]
            distances = [distance(whole, Moments.of(clean[index])) for index in sources]
        else:
            distances = [distance(whole, Moments.of(features(degraded(b, kind, level, seed)))) for level in levels]
        rows.append({
            "degradation": kind,
            "levels": list(levels),
            "distances": distances,
            "noise floor": floor,
            "first level over floor": distances[0] / floor,
            "spearman": spearman(distances),
            "strictly rising": all(x < y for x, y in zip([floor, *distances], distances, strict=False)),
        })  # fmt: skip
    apart = _mode_distances(torch.cat([features(a), clean]), of_mode, modes)
    return {"pictures": 2 * half, "side": a.shape[-1], "modes": len(modes), "rows": rows, "apart": apart}


def _drop_modes(of_mode: Tensor, modes: int, missing: float, seed: int) -> Tensor:
    """Return indices of pictures, with those of dropped modes replaced by random ones of the remaining modes."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(modes, generator=generator)
    remaining = torch.isin(of_mode, order[: max(1, round(modes * (1 - missing)))])
    pool = remaining.nonzero().flatten()
    choice = (torch.rand(len(of_mode), generator=generator) * len(pool)).long().clamp_max(len(pool) - 1)
    return torch.where(remaining, torch.arange(len(of_mode)), pool[choice])


def _mode_distances(features: Tensor, of_mode: Tensor, modes: list[str]) -> dict[str, float]:
    """Compute the distance of two modes, and that of two halves of the first, at equal numbers of pictures.

    The modes are "animal" and "food", or else the two largest.
    """
    order = sorted(range(len(modes)), key=lambda m: (modes[m] not in ("animal", "food"), -int((of_mode == m).sum())))
    if len(order) < 2:
        return {}
    first, second = (features[of_mode[: len(features)] == m] for m in order[:2])
    n = min(len(first) // 2, len(second))
    half, other_half, other_mode = (Moments.of(part[:n]) for part in (first, first[n:], second))
    names = f"{modes[order[0]]}, {modes[order[1]]}"
    between, within = distance(half, other_mode), distance(half, other_half)
    return {f"between {names}": between, "within the first": within, "ratio": between / within, "pictures each": n}


def extractor(network: TinyNetwork, device: str) -> Callable[[Tensor], Tensor]:
    """Return a function that computes features on the CPU, 16 pictures at a time."""
    network = network.to(device).eval()

    def features(images: Tensor) -> Tensor:
        with torch.inference_mode():
            return torch.cat([network(part.to(device)).cpu() for part in images.split(16)])

    return features


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description="Measure what the embedded feature network notices.")
    parser.add_argument(
        "--out", type=Path, required=True, help="check.json is written here; drawn pictures are kept here"
    )
    parser.add_argument("--images", type=Path, help="measure on this folder of pictures too")
    parser.add_argument(
        "--data", type=Path, default=Path("data/emoji"), help="icons, measured where this folder exists"
    )
    parser.add_argument("--count", type=int, default=1200, help="pictures a set, at most")
    parser.add_argument("--rounds", type=int, default=3, help="how often emoji-flux draws each of its 240 prompts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--weights", type=Path, default=WEIGHTS)
    source.add_argument("--untrained", action="store_true", help="random weights, for comparison")
    return parser.parse_args()


def picture_sets(options: argparse.Namespace) -> dict[str, Callable[[], PictureSet]]:
    """Return the sets to measure, by name."""
    sets: dict[str, Callable[[], PictureSet]] = {
        "held-out families": lambda: pictures.held_out(options.count, options.seed + 1),
        "emoji-flux": lambda: pictures.drawn(options.rounds, options.seed, options.out),
    }
    if options.data.exists():
        sets["icons"] = lambda: pictures.icons(options.data, options.count)
    if options.images:
        sets["folder"] = lambda: pictures.folder(options.images, options.count)
    return sets


def print_table(name: str, result: dict[str, Any]) -> None:
    """Print the measurement of one set."""
    print(f"\n{name}: {result['pictures']} pictures of {result['side']} px, {result['modes']} modes", flush=True)
    print(f"{'degradation':14} {'floor':>8}  {'distances at six levels':54} {'1st/floor':>9} spearman rising")
    for row in result["rows"]:
        values = " ".join(f"{value:8.3f}" for value in row["distances"])
        rising = "yes" if row["strictly rising"] else "NO"
        print(f"{row['degradation']:14} {row['noise floor']:8.3f}  {values:54} ", end="")
        print(f"{row['first level over floor']:9.2f} {row['spearman']:8.3f} {rising:>6}", flush=True)
    print("  ".join(f"{key}: {value:.3f}" for key, value in result["apart"].items()), flush=True)


def main() -> None:
    """Measure every set, print the tables and write ``check.json``."""
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    network = TinyNetwork() if options.untrained else load_tiny(options.weights)
    features = extractor(network.requires_grad_(False), options.device)
    report: dict[str, Any] = {
        "date": now(),
        "weights sha256": None if options.untrained else weights_sha256(options.weights),
        "versions": versions(),
        "sets": {},
    }
    passed = True
    for name, load in picture_sets(options).items():
        result = report["sets"][name] = measure(features, load(), options.seed)
        print_table(name, result)
        passed &= all(row["spearman"] >= 0.9 for row in result["rows"])
        write_json(options.out / "check.json", report)
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
