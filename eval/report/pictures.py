"""Galleries of the page: pictures of one prompt and seed side by side with their difference, the worst pairs first."""

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

SIDE = 256  # largest height and width of a picture on the page
SMALL = 128  # pictures up to this size are shown with sharp pixels, not smoothed
AMPLIFICATION = 5  # of differences


def gallery(comparison: Comparison, run: Run, count: int) -> dict[str, Any]:
    """Choose pairs of one run: half of them its worst by the first fidelity metric, the rest spread evenly."""
    pairs = comparison.pairs[run.name]
    row = next(
        (
            row
            for row in comparison.rows
            if row.run == run.name and row.family == "fidelity" and row.detail.get("worst")
        ),
        None,
    )
    worst = [] if row is None or row.identical else row.detail["worst"][: min((count + 1) // 2, len(pairs) // 4)]
    spread = np.linspace(0, len(pairs) - 1, count).round().astype(int).tolist()
    indices = list(dict.fromkeys([*worst, *(i for i in spread if i not in worst)]))[:count]
    return {
        "run": run.name,
        "metric": row.key if row else "",
        "pairs": [_pair(comparison, run, i) | {"worst": i in worst} for i in indices],
    }


def _pair(comparison: Comparison, run: Run, index: int) -> dict[str, Any]:
    """Return one pair as the page shows it: its prompt, its numbers, both pictures and their difference."""
    baseline, (i, j) = comparison.baseline, comparison.pairs[run.name][index]
    base_image, image = _still(baseline, i), _still(run, j)
    picture = baseline.pictures[i]
    pair_values = ((row.key, comparison.pair_values(row)) for row in comparison.rows if row.run == run.name)
    numbers = {key: float(values[index]) for key, values in pair_values if values is not None}
    difference = ((base_image.int() - image.int()).abs() * AMPLIFICATION).clamp(max=255).to(torch.uint8)
    return {
        "prompt": picture.prompt or picture.id,
        "seed": picture.seed,
        "measured": ", ".join(f"{key} {number:.4g}" for key, number in numbers.items()),
        "images": [inline(base_image), inline(image), inline(difference)],
        "small": max(base_image.shape[1:]) <= SMALL,
    }


def _still(run: Run, index: int) -> Tensor:
    """Return a picture; of a video the first, the middle and the last frame above each other."""
    if not run.is_video:
        return run.image(index)
    frames = run.video(index)
    return torch.cat(list(frames[[0, len(frames) // 2, len(frames) - 1]]), dim=1)


def inline(image: Tensor) -> str:
    """Encode a picture (3, H, W) as a data URL, no larger than a thumbnail."""
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    picture.thumbnail((SIDE, SIDE * 3) if picture.height > 2 * picture.width else (SIDE, SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=90, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
