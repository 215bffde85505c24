"""The files of a search: its trace as JSON, a plot of reward against NFE, and the kept samples."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor

from diffaccel.config import SamplerConfig
from diffaccel.files import atomic, write_text
from diffaccel.samplers.search.chains import Search
from diffaccel.samplers.search.particles import Particle
from diffaccel.samplers.search.plan import SearchPlan
from diffaccel.samplers.search.scoring import PictureScorer

FORMAT = 1


def make_report(
    config: SamplerConfig, plan: SearchPlan, searches: Sequence[Search], *, interrupted: bool
) -> dict[str, Any]:
    """Make the JSON-ready report: the method, its levels, and each picture's rewards, costs and decisions."""
    return {
        "format": FORMAT,
        "method": config.to_dict(),
        "sigmas": list(plan.sigmas),
        "final_sample_kind": plan.kind,
        "interrupted": interrupted,
        "pictures": [
            {
                "prompt": search.prompt,
                "seed": search.seed,
                "reward": None if search.best is None else (search.samples or [search.best])[0].reward,
                "rewards": [sample.reward for sample in search.samples],
                "climb": [{"nfe": nfe, "reward": reward, "sample": end} for nfe, reward, end in search.climb],
                "decisions": search.log,
                **search.ledger.to_dict(),
            }
            for search in searches
        ],
    }


def write(
    folder: Path,
    report: dict[str, Any],
    scorer: PictureScorer,
    samples: Sequence[tuple[Search, Particle]],
    x0: Tensor,
) -> None:
    """Write ``trace.json``, ``reward.png`` and the samples, whose latents are ``x0``, each file atomically."""
    from torchvision.utils import save_image

    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "trace.json", json.dumps(_finite(report), indent=1))
    with atomic(folder / "reward.png") as file:
        plot(report, file)
    ranks: dict[int, int] = {}
    for (search, sample), latents in zip(samples, x0, strict=True):
        rank = ranks[search.row] = ranks.get(search.row, -1) + 1
        pixels = scorer.pixels(latents[None])[0]
        picture = pixels[:, pixels.shape[1] // 2] if pixels.ndim == 4 else pixels  # the middle frame of a clip
        with atomic(folder / f"{search.row:03d}-{rank}_{sample.reward:.4g}.png") as file:
            save_image(picture.cpu(), file, format="png")


def plot(report: dict[str, Any], file: BinaryIO) -> None:
    """Plot the highest reward so far against NFE, one line per picture that ends in a dot, its final sample."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for picture in report["pictures"]:
        climb = [step for step in picture["climb"] if not step["sample"]]
        line = axes.step([s["nfe"] for s in climb], [s["reward"] for s in climb], where="post", linewidth=1)
        color = line[0].get_color()
        if picture["reward"] is not None:
            axes.plot([picture["nfe"]], [picture["reward"]], "o", color=color, markersize=4)
    axes.set_xlabel("NFE")
    axes.set_ylabel(f"highest reward so far ({report['method']['reward']})")
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120, format="png")


def _finite(value: Any) -> Any:
    """Replace NaN and infinities, which JSON lacks, by None at any depth."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
