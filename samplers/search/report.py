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

FORMAT = 2
LEGEND = 9  # pictures that the plot names


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
                "own": search.own,
                "budget": search.budget,
                "used": search.used,
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
    """Plot reward against NFE, one colour per picture.

    The line is the highest reward of a prediction so far, to the end of the search; the dot the final sample's; the
    dotted line that of the call's own noise, where it was first scored. A legend tells these and the prompts.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    pictures = report["pictures"]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    shown = []
    for picture in pictures:
        climb = [step for step in picture["climb"] if not step["sample"]]
        nfe, rewards = [step["nfe"] for step in climb], [step["reward"] for step in climb]
        if climb:  # the best stays the best to the end
            nfe, rewards = [*nfe, picture["nfe"]], [*rewards, rewards[-1]]
        (line,) = axes.step(nfe, rewards, where="post", linewidth=1)
        if picture["reward"] is not None:
            axes.plot([picture["nfe"]], [picture["reward"]], "o", color=line.get_color(), markersize=5)
        if picture["own"] is not None and math.isfinite(picture["own"]):
            axes.axhline(picture["own"], color=line.get_color(), linewidth=1, linestyle=":")
        shown.append((line, f"{_short(picture['prompt'])} (seed {picture['seed'] % 10**6})"))
    meanings: list[Any] = [
        (Line2D([], [], color="black", linewidth=1), "best prediction so far, $r(x_0)$"),
        (Line2D([], [], color="black", linestyle="", marker="o", markersize=5), "the final sample"),
        (Line2D([], [], color="black", linewidth=1, linestyle=":"), "the call's own noise, nothing chosen yet"),
    ]
    lines, texts = zip(*meanings, *shown[:LEGEND], strict=True)
    more = [f"and {len(shown) - LEGEND} more"] * (len(shown) > LEGEND)
    figure.legend(
        [*lines, *(Line2D([], [], linestyle="") for _ in more)], [*texts, *more],
        loc="outside lower center", fontsize=7, ncols=2,
    )  # fmt: skip
    spent = max((picture["nfe"] for picture in pictures), default=0)
    axes.set_title(f"{report['method']['name']}: {spent} of {report['method']['budget']} NFE a picture", fontsize=9)
    axes.set_xlabel("predictions (NFE)")
    axes.set_ylabel(f"reward ({report['method']['reward']}), higher is better".replace("$", r"\$"))
    axes.grid(alpha=0.3)
    figure.savefig(file, dpi=120, format="png")


def _short(text: str) -> str:
    """Return at most 48 characters of a prompt, without what matplotlib reads as mathematics."""
    text = " ".join(text.split()).replace("$", r"\$")
    return text if len(text) <= 48 else text[:47] + "…"


def _finite(value: Any) -> Any:
    """Replace NaN and infinities, which JSON lacks, by None at any depth."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
