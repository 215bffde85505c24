"""Pictures of the page: a strip of the same prompts across the runs, and galleries of pairs, the worst first."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffaccel.eval.comparison.result import Comparison
from diffaccel.eval.sets.run import Run

SIDE, STRIP_SIDE = 256, 128  # largest height and width of a picture in a gallery, and in the strip
SMALL = 128  # pictures up to this size are shown with sharp pixels, not smoothed
AMPLIFICATION = 5  # of differences
PROMPTS, MOST_RUNS = 6, 8  # of the strip


def of_page(comparison: Comparison, pairs: int) -> dict[str, Any]:
    """Return everything that the page shows of pictures, JSON-ready.

    Args:
        comparison: the runs.
        pairs: number of pairs in the gallery of each run.
    """
    return {
        "strip": strip(comparison),
        "galleries": [gallery(comparison, run, pairs) for run in comparison.runs],
    }


def strip(comparison: Comparison, count: int = PROMPTS) -> dict[str, Any]:
    """Choose prompts that all runs share, spread evenly; show them for the baseline and the first runs.

    Returns:
        ``prompts``, ``runs`` with a picture of every prompt, and names of the runs that were ``left_out``.
    """
    baseline, runs = comparison.baseline, comparison.runs[: MOST_RUNS - 1]
    places = [dict(comparison.pairs[run.name]) for run in runs]
    shared = [i for i in range(len(baseline)) if all(i in place for place in places)]
    chosen = _spread(shared, count)
    lines = [(baseline, chosen), *((run, [place[i] for i in chosen]) for run, place in zip(runs, places, strict=True))]
    return {
        "prompts": [baseline.pictures[i].prompt or baseline.pictures[i].id for i in chosen],
        "runs": [
            {"run": run.name, "pictures": [_shown(_frame(run, i), STRIP_SIDE) for i in indices]}
            for run, indices in lines
        ],
        "left_out": [run.name for run in comparison.runs[MOST_RUNS - 1 :]],
    }


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
    spread = _spread(range(len(pairs)), count)
    indices = list(dict.fromkeys([*worst, *(i for i in spread if i not in worst)]))[:count]
    return {
        "run": run.name,
        "metric": row.key if row else "",
        "pairs": [_pair(comparison, run, i) | {"worst": i in worst} for i in indices],
    }


def _spread(indices: Sequence[int], count: int) -> list[int]:
    """Return up to ``count`` of some indices, evenly spread, each once."""
    if not indices:
        return []
    places = np.linspace(0, len(indices) - 1, min(count, len(indices))).round().astype(int)
    return [indices[place] for place in dict.fromkeys(places.tolist())]


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
        "images": [_shown(still, SIDE) for still in (base_image, image, difference)],
    }


def _still(run: Run, index: int) -> Tensor:
    """Return a picture; of a video the first, the middle and the last frame above each other."""
    if not run.is_video:
        return run.image(index)
    frames = run.video(index)
    return torch.cat(list(frames[[0, len(frames) // 2, len(frames) - 1]]), dim=1)


def _frame(run: Run, index: int) -> Tensor:
    """Return a picture; of a video the middle frame."""
    if not run.is_video:
        return run.image(index)
    frames = run.video(index)
    return frames[len(frames) // 2]


def _shown(image: Tensor, side: int) -> dict[str, Any]:
    """Return a picture (3, H, W) as the page embeds it: a data URL, its size, and whether its pixels stay sharp."""
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    picture.thumbnail((side, side * 3) if picture.height > 2 * picture.width else (side, side))
    return {
        "src": inline(picture),
        "width": picture.width,
        "height": picture.height,
        "small": max(image.shape[1:]) <= SMALL,
    }


def inline(picture: Image.Image) -> str:
    """Encode a picture as a data URL."""
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=90, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
