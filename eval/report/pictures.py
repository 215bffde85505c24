"""Pictures for the page: same prompt and seed side by side, the worst pairs first, with their difference."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffaccel.eval.comparison.result import Comparison
from diffaccel.eval.sets.run import Run

SIDE = 256
SMALL = 128  # shown with its pixels, not smoothed
AMPLIFIED = 5


def gallery(comparison: Comparison, run: Run, count: int) -> dict[str, Any]:
    """Pairs of one run: half of them its worst by the first fidelity metric, the rest spread evenly."""
    base, places = comparison.baseline, comparison.pairs[run.name]
    row = next(
        (r for r in comparison.rows if r.run == run.name and r.family == "fidelity" and r.detail.get("worst")), None
    )
    worst = [] if row is None or row.identical else row.detail["worst"][: min((count + 1) // 2, len(places) // 4)]
    rest = [i for i in np.linspace(0, len(places) - 1, count).round().astype(int).tolist() if i not in worst]
    chosen = list(dict.fromkeys([*worst, *rest]))[:count]
    return {
        "run": run.name,
        "metric": row.key if row else "",
        "pairs": [_pair(comparison, base, run, places[i], i, i in worst) for i in chosen],
    }


def _pair(comparison: Comparison, base: Run, run: Run, places: tuple[int, int], at: int, worst: bool) -> dict[str, Any]:
    one, other = (_still(*at) for at in ((base, places[0]), (run, places[1])))
    picture = base.pictures[places[0]]
    of_pairs = ((row.key, comparison.of_pairs(row)) for row in comparison.rows if row.run == run.name)
    values = {key: float(numbers[at]) for key, numbers in of_pairs if numbers is not None}
    apart = ((one.int() - other.int()).abs() * AMPLIFIED).clamp(max=255).to(torch.uint8)
    return {
        "prompt": picture.prompt or picture.id,
        "seed": picture.seed,
        "worst": worst,
        "measured": ", ".join(f"{key} {value:.4g}" for key, value in values.items()),
        "images": [inline(one), inline(other), inline(apart)],
        "small": max(one.shape[1:]) <= SMALL,
    }


def _still(run: Run, index: int) -> Tensor:
    """The picture, or the first, the middle and the last frame of a video above each other."""
    if not run.is_video:
        return run.image(index)
    frames = run.video(index)
    return torch.cat(list(frames[[0, len(frames) // 2, len(frames) - 1]]), dim=1)


def inline(image: Tensor) -> str:
    """A picture (3, H, W) as a data URL, no larger than a thumbnail."""
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    picture.thumbnail((SIDE, SIDE * 3) if picture.height > 2 * picture.width else (SIDE, SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=90, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
