"""Measure emoji-sd beside emoji-flux: the acceptance table and a grid of 24 fixed prompts.

    python -m scripts.zoo.emoji_sd.accept --model FOLDER --data data/emoji --out OUT [--count 128] [--by-eye 20]

``--model`` is a plain folder of the pipeline, or the packed one. Accepted: at 20 steps the judge's score within 4
points of emoji-flux's on the same prompts, colour and number words in 95 % of the pictures or more, 18 of the grid's 24
prompts recognisable, which somebody counts and gives as ``--by-eye``, and at most 8 MB packed. The scores at 4 steps
are told beside it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffaccel import zoo
from diffaccel.zoo import packing
from scripts.zoo.emoji import heldout, score
from scripts.zoo.emoji.world import World, load
from scripts.zoo.emoji_sd.export import BASE, LARGEST
from scripts.zoo.emoji_sd.recipe import FULL

STEPS, FEW = 20, 4
Draw = Callable[[Sequence[str], int], Tensor]


def drawer(pipe: Any, size: int, guidance: float, seed: int = 1000, batch: int = 32) -> Draw:
    """Return a function that draws prompts in a number of steps, as pictures in [-1, 1]."""

    def draw(prompts: Sequence[str], steps: int) -> Tensor:
        pictures = []
        for start in range(0, len(prompts), batch):
            texts = list(prompts[start : start + batch])
            generators = [torch.Generator("cpu").manual_seed(seed + start + i) for i in range(len(texts))]
            images = pipe(
                texts, height=size, width=size, num_inference_steps=steps, guidance_scale=guidance,
                generator=generators, output_type="pt",
            ).images  # fmt: skip
            pictures.append(images.float().cpu() * 2 - 1)
        return torch.cat(pictures)

    return draw


@torch.no_grad()
def accept(
    draw: Draw, base: Draw, judge: score.Judge, world: World, *, count: int, by_eye: float | None, packed: int | None
) -> dict[str, Any]:
    """Return the acceptance table and what is told beside it."""
    sets = heldout.build(world, seed=0, device="cpu", size=count)
    seen = sets["seen"]
    points = {
        name: 100 * score.cosine(judge, seen.plain, drawn(seen.plain, steps))
        for name, drawn, steps in (("sd", draw, STEPS), ("sd few", draw, FEW), ("flux", base, STEPS))
    }
    rows = [_row("judge's score, points below emoji-flux", "<= 4", points["flux"] - points["sd"],
                 points["flux"] - points["sd"] <= 4)]  # fmt: skip
    for name, check in (("colour", score.colours_obeyed), ("count", score.counts_obeyed)):
        scenes = sets[name]
        valid = check(scenes, scenes.images(torch.arange(len(scenes)), 128).cpu())
        share = float(check(scenes, draw(scenes.plain, STEPS))[valid].float().mean())
        rows.append(_row(f"{name} word, unseen combinations", ">= 0.95", share, share >= 0.95))
    rows.append(
        _row("recognisable by eye in the grid, of 24", ">= 18", by_eye, None if by_eye is None else by_eye >= 18)
    )
    if packed is not None:
        rows.append(_row("packed megabytes", "<= 8", packed / 1e6, packed <= LARGEST))
    told = {"judge's score": {key: round(value, 2) for key, value in points.items()}, "pictures": len(seen)}
    return {"acceptance": rows, "quality": told}


def _row(check: str, target: str, value: float | None, passed: bool | None) -> dict[str, Any]:
    return {"check": check, "target": target, "value": None if value is None else round(value, 3), "passed": passed}


def grid(draw: Draw, path: Path) -> None:
    """Save the 24 fixed prompts of emoji-flux's grid, six a row."""
    from PIL import Image, ImageDraw

    cell, text = 128, 30
    sheet = Image.new("RGB", (6 * cell, 4 * (cell + text)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, picture in enumerate(draw(score.GRID, STEPS)):
        array = ((picture + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
        x, y = i % 6 * cell, i // 6 * (cell + text)
        sheet.paste(Image.fromarray(array).resize((cell, cell), Image.Resampling.NEAREST), (x, y))
        words = score.GRID[i].split(", ")
        pen.text((x + 3, y + cell), "\n".join([words[0][:21], words[1]]), fill="black")
    sheet.save(path)


def flux_drawer(device: str) -> Draw:
    """Return a function that draws with the shipped emoji-flux."""
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(zoo.path(BASE), dtype=torch.float32).to(device)
    pipe.set_progress_bar_config(disable=True)
    settings = {"size": 128, "guidance": 3.0, "seed": 1000, "batch": 32}
    return lambda prompts, steps: score.draw(pipe, prompts, steps=steps, **settings)


def measure(
    model: Path, data: Path, out: Path, *, count: int, by_eye: float | None = None, guidance: float = FULL.guidance
) -> dict[str, Any]:
    """Measure a plain or packed model, write ``report.json`` and ``grid.png``, and print the table."""
    import tempfile

    from diffusers import StableDiffusionPipeline

    device = "cuda" if torch.cuda.is_available() else "cpu"
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        packed = None
        if (model / packing.MANIFEST).is_file():
            packed = sum(entry["size"] for entry in packing.read_manifest(model)["packed"].values())
            base = Path(zoo.__file__).parent / BASE
            model = packing.unpack(model, Path(scratch) / "plain", base=base)
        pipe = StableDiffusionPipeline.from_pretrained(model, dtype=torch.float32).to(device)
        pipe.set_progress_bar_config(disable=True)
        size = pipe.unet.config.sample_size * pipe.vae_scale_factor
        draw = drawer(pipe, size, guidance)
        grid(draw, out / "grid.png")
        judge = score.Judge(zoo.path("emoji-clip-judge"), device)
        report = accept(draw, flux_drawer(device), judge, load(data), count=count, by_eye=by_eye, packed=packed)
    report["quality"]["guidance"] = guidance
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    for row in report["acceptance"]:
        print(" | ".join(str(part) for part in row.values()), flush=True)
    print(json.dumps(report["quality"]), flush=True)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path("data/emoji"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=128, help="pictures a check, at most")
    parser.add_argument("--by-eye", type=float, help="recognisable pictures of the grid, where somebody counted them")
    options = parser.parse_args()
    measure(options.model, options.data, options.out, count=options.count, by_eye=options.by_eye)


if __name__ == "__main__":
    main()
