"""Measure what the embedded feature network notices: does its Fréchet distance grow with every spoiling?

    python -m scripts.features.check_tiny --out out/features [--images FOLDER] [--weights FILE | --untrained]

Sets of pictures that training never saw are cut into halves A and B. Six rising levels of each degradation are applied
to B and compared with A; the noise floor is the distance of A to B as it is. Mode drop takes whole modes from B and
puts copies of other pictures of B in their place. Prints a table, writes ``check.json``, and ends with status 1 unless
every Spearman correlation of level and distance is at least 0.9.
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
from scripts.features import degradations as spoil
from scripts.features import pictures
from scripts.features.pictures import Set

LEVELS: dict[str, tuple[float, ...]] = {
    "blur": (0.5, 0.75, 1.0, 1.5, 2.5, 4.0),  # standard deviation, pixels
    "noise": (4, 8, 16, 32, 64, 96),  # standard deviation, of 255
    "jpeg": (90, 75, 50, 30, 15, 5),  # quality of libjpeg
    "desaturation": (1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1.0),  # share of the way to luma
    "patch shuffle": (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0),  # share of 8 x 8 patches that change places
    "mode drop": (0.1, 0.25, 0.4, 0.6, 0.75, 0.9),  # share of the modes that are missing
}


def spoiled(images: Tensor, kind: str, level: float, seed: int) -> Tensor:
    """Pictures uint8, spoiled; level ``i`` of one kind uses the same random numbers as any other level."""
    generator = torch.Generator().manual_seed(seed)
    x, strength = images.float() / 255, torch.full((len(images),), float(level))
    if kind == "blur":
        return pictures.to_uint8(spoil.gaussian_blur(x, strength))
    if kind == "noise":
        return pictures.to_uint8(x + level / 255 * torch.randn(x.shape, generator=generator))
    if kind == "desaturation":
        return pictures.to_uint8(spoil.desaturate(x, strength))
    if kind == "patch shuffle":
        return pictures.to_uint8(spoil.shuffle_patches(x, strength, 8, generator))
    return torch.stack([_jpeg(image, int(level)) for image in images])


def _jpeg(image: Tensor, quality: int) -> Tensor:
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=quality)
    return torch.from_numpy(np.array(Image.open(buffer))).permute(2, 0, 1)


def spearman(values: list[float]) -> float:
    """Rank correlation with 0, 1, 2, ..."""
    rank = torch.tensor(values, dtype=torch.float64).argsort().argsort().double()
    return float(torch.corrcoef(torch.stack([rank, torch.arange(len(values)).double()]))[0, 1])


def measure(features: Callable[[Tensor], Tensor], images: Set, seed: int) -> dict[str, Any]:
    """Rows of degradations, and how far apart modes are, for one set."""
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
            fates = [_refilled(of_mode[half : 2 * half], len(modes), missing, seed) for missing in levels]
            found = [distance(whole, Moments.of(clean[fate])) for fate in fates]
        else:
            found = [distance(whole, Moments.of(features(spoiled(b, kind, level, seed)))) for level in levels]
        rows.append({
            "degradation": kind,
            "levels": list(levels),
            "distances": found,
            "noise floor": floor,
            "first level over floor": found[0] / floor,
            "spearman": spearman(found),
            "strictly rising": all(x < y for x, y in zip([floor, *found], found, strict=False)),
        })  # fmt: skip
    every = torch.cat([features(a), clean])
    apart = _apart(every, of_mode, modes)
    return {"pictures": 2 * half, "side": a.shape[-1], "modes": len(modes), "rows": rows, "apart": apart}


def _refilled(of_mode: Tensor, modes: int, missing: float, seed: int) -> Tensor:
    """Indices of pictures where those of missing modes are replaced by random ones of the modes that are left."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(modes, generator=generator)
    left = torch.isin(of_mode, order[: max(1, round(modes * (1 - missing)))])
    pool = left.nonzero().flatten()
    place = (torch.rand(len(of_mode), generator=generator) * len(pool)).long().clamp_max(len(pool) - 1)
    return torch.where(left, torch.arange(len(of_mode)), pool[place])


def _apart(features: Tensor, of_mode: Tensor, modes: list[str]) -> dict[str, float]:
    """Between "animal" and "food", or else the two largest modes, and between halves of the first; equal counts."""
    order = sorted(range(len(modes)), key=lambda m: (modes[m] not in ("animal", "food"), -int((of_mode == m).sum())))
    if len(order) < 2:
        return {}
    first, second = (features[of_mode[: len(features)] == m] for m in order[:2])
    n = min(len(first) // 2, len(second))
    one, other, third = (Moments.of(part[:n]) for part in (first, first[n:], second))
    names = f"{modes[order[0]]}, {modes[order[1]]}"
    between, within = distance(one, third), distance(one, other)
    return {f"between {names}": between, "within the first": within, "ratio": between / within, "pictures each": n}


def extractor(network: TinyNetwork, device: str) -> Callable[[Tensor], Tensor]:
    """Features on the CPU, 16 pictures at a time."""
    network = network.to(device).eval()

    def features(images: Tensor) -> Tensor:
        with torch.inference_mode():
            return torch.cat([network(part.to(device)).cpu() for part in images.split(16)])

    return features


def main() -> None:
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
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--weights", type=Path, default=WEIGHTS)
    which.add_argument("--untrained", action="store_true", help="random weights, for comparison")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(options.seed)
    network = TinyNetwork() if options.untrained else load_tiny(options.weights)
    features = extractor(network.requires_grad_(False), options.device)
    makers: dict[str, Callable[[], Set]] = {
        "held-out families": lambda: pictures.held_out(options.count, options.seed + 1),
        "emoji-flux": lambda: pictures.drawn(options.rounds, options.seed, options.out),
    }
    if options.data.exists():
        makers["icons"] = lambda: pictures.icons(options.data, options.count)
    if options.images:
        makers["folder"] = lambda: pictures.folder(options.images, options.count)
    report: dict[str, Any] = {
        "date": now(),
        "weights sha256": None if options.untrained else weights_sha256(options.weights),
        "versions": versions(),
        "sets": {},
    }
    passed = True
    for name, make in makers.items():
        result = report["sets"][name] = measure(features, make(), options.seed)
        print(f"\n{name}: {result['pictures']} pictures of {result['side']} px, {result['modes']} modes", flush=True)
        print(f"{'degradation':14} {'floor':>8}  {'distances at six levels':54} {'1st/floor':>9} spearman rising")
        for row in result["rows"]:
            values = " ".join(f"{value:8.3f}" for value in row["distances"])
            rising = "yes" if row["strictly rising"] else "NO"
            print(f"{row['degradation']:14} {row['noise floor']:8.3f}  {values:54} ", end="")
            print(f"{row['first level over floor']:9.2f} {row['spearman']:8.3f} {rising:>6}", flush=True)
            passed &= row["spearman"] >= 0.9
        print("  ".join(f"{key}: {value:.3f}" for key, value in result["apart"].items()), flush=True)
        write_json(options.out / "check.json", report)
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
