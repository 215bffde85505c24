"""What a search leaves: its trace as JSON, a plot of reward against NFE, and the samples beside the best."""

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
from diffaccel.samplers.search.scoring import Judge

FORMAT = 1


def report(config: SamplerConfig, plan: SearchPlan, searches: Sequence[Search], *, interrupted: bool) -> dict[str, Any]:
    """JSON-ready: the method, its levels, and for each picture the rewards, what it cost and every decision."""
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
    folder: Path, found: dict[str, Any], judge: Judge, kept: Sequence[tuple[Search, Particle]], x0: Tensor
) -> None:
    """``trace.json``, ``reward.png`` and the kept samples, each beside its name first and renamed."""
    from torchvision.utils import save_image

    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "trace.json", json.dumps(_finite(found), indent=1))
    with atomic(folder / "reward.png") as file:
        plot(found, file)
    place: dict[int, int] = {}
    for (search, sample), latents in zip(kept, x0, strict=True):
        place[search.row] = place.get(search.row, -1) + 1
        pixels = judge.pixels(latents[None])[0]
        picture = pixels[:, pixels.shape[1] // 2] if pixels.ndim == 4 else pixels  # of a clip, its middle
        name = f"{search.row:03d}-{place[search.row]}_{sample.reward:.4g}.png"
        with atomic(folder / name) as file:
            save_image(picture.cpu(), file, format="png")


def plot(found: dict[str, Any], file: BinaryIO) -> None:
    """The highest reward so far against NFE, a line a picture; a dot is the sample that came of it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for picture in found["pictures"]:
        climb = [step for step in picture["climb"] if not step["sample"]]
        line = axes.step([s["nfe"] for s in climb], [s["reward"] for s in climb], where="post", linewidth=1)
        color = line[0].get_color()
        if picture["reward"] is not None:
            axes.plot([picture["nfe"]], [picture["reward"]], "o", color=color, markersize=4)
    axes.set_xlabel("NFE")
    axes.set_ylabel(f"highest reward so far ({found['method']['reward']})")
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120, format="png")


def _finite(value: Any) -> Any:
    """The same with None for every number that JSON has no word for."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
