"""Measure the pipeline: the acceptance table, a grid of 24 fixed prompts, and CPU latency.

    python -m scripts.zoo.emoji.score --data data/emoji --out OUT [--count 128]    # of the shipped models, judge too
    python -m scripts.zoo.emoji.score --data data/emoji --out OUT --judge-only     # minutes on one core

Pictures are measured by the judge, a CLIP that the pipeline does not use, and by pixel checks, beside real pictures and
real pictures that went through the autoencoder. ``grid.png`` includes failures.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffaccel.eval.metrics.frechet import distance_of_features as frechet
from diffaccel.files import write_json
from diffaccel.record import describe_device
from scripts.zoo.emoji import checks, clip_eval, heldout, recipe_flow, vae
from scripts.zoo.emoji import recipe as data_recipe
from scripts.zoo.emoji.data import restrict
from scripts.zoo.emoji.scenes import FILLED, Row, Scenes
from scripts.zoo.emoji.world import World, load

LOSS, BY_EYE = "training loss at 128 px", "recognisable by eye in the grid, of 24"
GRID = (
    "red apple, noto",
    "cat face, twemoji",
    "dog face, fluent 3d",
    "grinning face, noto",
    "crying face, fluent 3d",
    "smiling face with sunglasses, twemoji",
    "automobile, fluent 3d",
    "rocket, noto",
    "sailboat, twemoji",
    "pizza, noto",
    "birthday cake, fluent 3d",
    "banana, twemoji",
    "sunflower, noto",
    "cactus, fluent 3d",
    "snowman, twemoji",
    "house, fluent 3d",
    "guitar, noto",
    "key, twemoji",
    "blue heart, noto",
    "green cat face, noto",
    "purple fish, fluent 3d",
    "three bananas, twemoji",
    "four rockets, noto",
    "red fish left of blue balloon, noto",
)


class Judge:
    """Features of pictures (B, 3, s, s) in [-1, 1] and of texts, by the CLIP of an open_clip folder."""

    def __init__(self, folder: Path, device: str) -> None:
        import open_clip

        name = f"local-dir:{folder}"
        self.model, _, _ = open_clip.create_model_and_transforms(name, require_pretrained=True)
        self.model.to(device).eval().requires_grad_(False)
        self.tokenizer, self.device = open_clip.get_tokenizer(name), device
        size = self.model.visual.image_size
        self.size = size if isinstance(size, int) else size[0]

    def images(self, pictures: Tensor) -> Tensor:
        """Return the features of pictures before normalisation, (B, D)."""
        features = []
        for batch in pictures.split(128):
            x = batch.to(self.device)
            if x.shape[-1] != self.size:
                mode = {"mode": "area"} if x.shape[-1] > self.size else {"mode": "bilinear", "antialias": True}
                x = F.interpolate(x, self.size, **mode)
            features.append(self.model.encode_image(x).float().cpu())
        return torch.cat(features)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Return the normalised features of texts, (B, D)."""
        features = [
            self.model.encode_text(self.tokenizer(list(texts[i : i + 256])).to(self.device)).float().cpu()
            for i in range(0, len(texts), 256)
        ]
        return F.normalize(torch.cat(features), dim=1)


def draw(pipe: Any, prompts: Sequence[str], *, size: int, steps: int, guidance: float, seed: int, batch: int) -> Tensor:
    """Draw pictures (N, 3, size, size) in [-1, 1]; picture i depends on prompt i and seed + i alone."""
    pictures = []
    for start in range(0, len(prompts), batch):
        texts = list(prompts[start : start + batch])
        generators = [torch.Generator("cpu").manual_seed(seed + start + i) for i in range(len(texts))]
        images = pipe(
            texts,
            negative_prompt=[""] * len(texts),
            true_cfg_scale=guidance,
            height=size,
            width=size,
            num_inference_steps=steps,
            max_sequence_length=32,
            generator=generators,
            output_type="pt",
        ).images
        pictures.append(images.float().cpu() * 2 - 1)
    return torch.cat(pictures)


def zero_shot(judge: Judge, world: World, scenes: Scenes, pictures: Tensor) -> tuple[float, float]:
    """Return top-1 and top-5 accuracy of the judge on single scenes, among all labels of their style."""
    features = F.normalize(judge.images(pictures), dim=1)
    ranks = torch.empty(len(pictures), dtype=torch.long)
    style = torch.tensor([int(world.icon_style[row.icons[0]]) for row in scenes.rows])
    label = torch.tensor([int(world.icon_label[row.icons[0]]) for row in scenes.rows])
    for s, word in enumerate(world.styles):
        rows = style == s
        if rows.any():
            scores = features[rows] @ judge.texts([f"{name}, {word}" for name in world.labels]).T
            true_score = scores.gather(1, label[rows][:, None])
            ranks[rows] = (scores > true_score).sum(1)
    return (ranks < 1).float().mean().item(), (ranks < 5).float().mean().item()


def cosine(judge: Judge, prompts: Sequence[str], pictures: Tensor) -> float:
    """Return the mean cosine between pictures and their prompts."""
    return (F.normalize(judge.images(pictures), dim=1) * judge.texts(prompts)).sum(1).mean().item()


def colours_obeyed(scenes: Scenes, pictures: Tensor) -> Tensor:
    """Return whether the dominant hue is the colour word's, (B,) bool."""
    return checks.colour(pictures) == torch.tensor([scenes.facts(i).colours[0] for i in range(len(scenes))])


def counts_obeyed(scenes: Scenes, pictures: Tensor) -> Tensor:
    """Return whether there are as many separate things as the number word says, (B,) bool."""
    return checks.count(pictures) == torch.tensor([scenes.facts(i).count for i in range(len(scenes))])


def order_obeyed(scenes: Scenes, pictures: Tensor) -> Tensor:
    """Return whether each half of a pair of two colours has the colour that belongs there, (B,) bool."""
    obeyed = []
    for i, picture in enumerate(pictures):
        facts = scenes.facts(i)
        colours = checks.colours_in_order(picture[None], stacked=facts.stacked)[0].tolist()
        obeyed.append(colours == list(facts.colours))
    return torch.tensor(obeyed)


def _real(scenes: Scenes, size: int = 128) -> Tensor:
    return scenes.images(torch.arange(len(scenes)), size).cpu()


def _row(check: str, target: str, value: float | None, passed: bool | None, **extra: float) -> dict[str, Any]:
    rounded = {key: round(number, 3) for key, number in extra.items()}
    return {
        "check": check,
        "target": target,
        "value": None if value is None else round(value, 3),
        "passed": passed,
    } | rounded


def _judge_rows(metrics: dict[str, float]) -> list[dict[str, Any]]:
    """Return the rows about the judge itself, from the metrics of its training (clip_eval)."""
    floor = metrics["fd_identity"]
    return [
        _at_least("judge: FD of shuffled over FD of other real pictures", metrics["fd_shuffled"] / floor, 5.0),
        _at_least("judge: FD of four shuffled bands over that", metrics["fd_bands"] / floor, 5.0),
        _at_least("judge: FD of a box blur of 9 pixels over that", metrics["fd_blur_9"] / floor, 3.0),
        _at_least("judge: points of 100 that this blur costs", metrics["points_lost_blur_9"], 5.0),
        _at_least("judge: style of real pictures in an unseen style", metrics["style_word_unseen"], 0.80),
        _at_least("judge: order of unseen pairs", metrics["pair_order"], 0.90),
        _at_least("judge: retrieval among unseen scenes, top 1", metrics["retrieval_top1"], 0.85),
    ]


@torch.no_grad()
def measure(pipe: Any, judge: Judge, world: World, *, size: int, count: int, steps: int, guidance: float) -> dict:
    """Measure the acceptance table, and distances and cosines beside it."""
    sets = heldout.build(world, seed=0, device="cpu", size=count)

    def generate(scenes: Scenes) -> Tensor:
        settings = {"size": size, "steps": steps, "guidance": guidance, "seed": 1000, "batch": 32}
        return draw(pipe, scenes.plain, **settings)

    seen = sets["seen"]
    real, generated = _real(seen, size), generate(seen)
    decoded = _through_vae(pipe, real)
    top = zero_shot(judge, world, seen, generated)
    top_real, top_vae = zero_shot(judge, world, seen, real), zero_shot(judge, world, seen, decoded)
    icons = icon_features(judge, world, size)
    half, rest = icons[torch.randperm(len(icons), generator=torch.Generator().manual_seed(0))].chunk(2)
    distances = {
        "generated": frechet(judge.images(generated), icons),
        "real": frechet(judge.images(real), icons),
        "autoencoder": frechet(judge.images(decoded), icons),
        "real halves": frechet(half, rest),
    }
    return {
        "acceptance": [
            _at_least("label, top 1", top[0], 0.55, real=top_real[0], autoencoder=top_vae[0]),
            _at_least("label, top 5", top[1], 0.80, real=top_real[1], autoencoder=top_vae[1]),
            *_pixel_rows(sets, generate, size),
            _style_row(judge, sets["style"], generate, size),
        ],
        "quality": {
            "settings": {"size": size, "steps": steps, "guidance": guidance, "pictures": count},
            "frechet distance to the training icons": {key: round(value, 2) for key, value in distances.items()},
            "judge cosine": {
                "generated": round(cosine(judge, seen.plain, generated), 3),
                "real": round(cosine(judge, seen.plain, real), 3),
            },
        },
    }


def _pixel_rows(sets: dict[str, Scenes], generate: Callable[[Scenes], Tensor], size: int) -> list[dict[str, Any]]:
    """Check colour words, number words and order on the pixels of unseen combinations."""
    rows = []
    for name, title, check, least in (
        ("colour", "colour word", colours_obeyed, 0.95),
        ("count", "number word", counts_obeyed, 0.95),
        ("colour_pair", "order of coloured pairs", order_obeyed, 0.85),
    ):
        scenes = sets[name]
        valid = check(scenes, _real(scenes, size))  # a check that fails on the real picture is void
        value = check(scenes, generate(scenes))[valid].float().mean().item()
        rows.append(_at_least(f"{title}, unseen combinations", value, least, real=valid.float().mean().item()))
    return rows


def _style_row(judge: Judge, scenes: Scenes, generate: Callable[[Scenes], Tensor], size: int) -> dict[str, Any]:
    """Compare the judge's cosine on labels in unseen styles with that of real pictures."""
    generated = cosine(judge, scenes.plain, generate(scenes))
    real = cosine(judge, scenes.plain, _real(scenes, size))
    passed = generated >= real - 0.03
    return _row("unseen label and style: judge cosine", ">= real - 0.03", generated, passed, real=real)


def _at_least(check: str, value: float, least: float, **extra: float) -> dict[str, Any]:
    return _row(check, f">= {least}", value, value >= least, **extra)


def icon_features(judge: Judge, world: World, size: int) -> Tensor:
    """Return the judge's features of every training icon, filling a canvas of ``size`` pixels."""
    icons = world.training.nonzero().flatten().tolist()
    scenes = Scenes(world, [Row("single", (i,), (-1,), FILLED) for i in icons], seed=0, device="cpu")
    return torch.cat([judge.images(scenes.images(part, size)) for part in torch.arange(len(icons)).split(256)])


def _through_vae(pipe: Any, pictures: Tensor) -> Tensor:
    """Encode and decode pictures by the pipeline's autoencoder."""
    decoded = []
    for batch in pictures.split(32):
        x = batch.to(pipe.device, pipe.vae.dtype)
        decoded.append(pipe.vae.decoder(vae.encode(pipe.vae, x)[0].to(x.dtype)).float().clamp(-1, 1).cpu())
    return torch.cat(decoded)


@torch.no_grad()
def rounding(original: Any, packed: Any, **settings: Any) -> float:
    """Measure PSNR in dB of the packed pipeline's pictures against the bf16 one's, same noise; peak-to-peak range 2."""
    reference, rounded = (draw(pipe, GRID[:8], seed=3, batch=8, **settings) for pipe in (original, packed))
    return 10 * math.log10(4 / max((reference - rounded).square().mean().item(), 1e-12))


def grid(pipe: Any, path: Path, *, size: int, steps: int, guidance: float) -> None:
    """Save 24 pictures with their prompts, six per row."""
    from PIL import Image, ImageDraw

    pictures = draw(pipe, GRID, size=size, steps=steps, guidance=guidance, seed=7, batch=24)
    cell, text = 128, 30
    sheet = Image.new("RGB", (6 * cell, 4 * (cell + text)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, picture in enumerate(pictures):
        array = ((picture + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
        image = Image.fromarray(array).resize((cell, cell), Image.Resampling.NEAREST)
        x, y = i % 6 * cell, i // 6 * (cell + text)
        sheet.paste(image, (x, y))
        words = GRID[i].split(", ")
        pen.text((x + 3, y + cell), "\n".join([words[0][:21], words[1]]), fill="black")
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def latency(pipe: Any, sizes: Sequence[int] = (64, 128)) -> list[dict[str, Any]]:
    """Measure the seconds of one whole call, batch 1, as the best of three."""
    rows = []
    for size in sizes:
        for steps, guidance in ((4, 1.0), (8, 3.0), (20, 3.0), (28, 3.0)):
            times = []
            for _ in range(3):
                start = time.perf_counter()
                draw(pipe, GRID[:1], size=size, steps=steps, guidance=guidance, seed=0, batch=1)
                times.append(time.perf_counter() - start)
            rows.append({"size": size, "steps": steps, "guidance": guidance, "seconds": round(min(times), 3)})
    return rows


def score(
    pipe: Any,
    judge_folder: Path,
    world: World,
    recipe: recipe_flow.Recipe,
    out: Path,
    *,
    judge_metrics: dict[str, float],
    count: int,
    loss: float | None,
    by_eye: float | None = None,
) -> dict[str, Any]:
    """Measure, draw the grid, write ``report.json`` and ``grid.png`` to ``out`` and print the table.

    Args:
        judge_metrics: metrics of the judge's training (clip_eval).
        count: maximum number of pictures per check.
        loss: training loss at 128 px, where it is known.
        by_eye: recognisable pictures of the grid, where somebody counted them.
    """
    device = pipe.device.type
    settings = {"size": recipe.default_size, "steps": recipe.default_steps, "guidance": recipe.default_guidance}
    grid(pipe, out / "grid.png", **settings)
    report = measure(pipe, Judge(judge_folder, device), world, count=count, **settings)
    report["acceptance"] = _judge_rows(judge_metrics) + report["acceptance"]
    if loss is not None:
        report["acceptance"].append(_row(LOSS, "<= 0.11", loss, loss <= 0.11))
    if device == "cpu":
        rows = latency(pipe)
        report["quality"]["latency"] = {**describe_device(pipe.device), "rows": rows}
        slowest = rows[-1]["seconds"]
        title = f"seconds of a 128 px picture, 28 steps, guidance, {torch.get_num_threads()} CPU threads"
        report["acceptance"].append(_row(title, "<= 2.5", slowest, slowest <= 2.5))
    report["acceptance"].append(_row(BY_EYE, ">= 20", by_eye, None if by_eye is None else by_eye >= 20))
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    for row in report["acceptance"]:
        print(" | ".join(str(part) for part in row.values()), flush=True)
    print(json.dumps(report["quality"]), flush=True)
    return report


def main() -> None:
    from diffusers import FluxPipeline

    from diffaccel import zoo

    parser = argparse.ArgumentParser(description="Score the shipped emoji-flux with the shipped judge.")
    parser.add_argument("--data", type=Path, default=Path("data/emoji"))
    parser.add_argument("--out", type=Path, required=True, help="report.json and grid.png are written here")
    parser.add_argument("--count", type=int, default=128, help="pictures a check, at most")
    parser.add_argument("--judge-only", action="store_true", help="measure the judge alone, and write judge.json")
    options = parser.parse_args()
    pipe = FluxPipeline.from_pretrained(zoo.path("emoji-flux"), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    if torch.cuda.is_available():
        pipe.to("cuda")
    recipe = recipe_flow.get(zoo.card("emoji-flux")["recipe"])
    whole_world = load(options.data)
    world = restrict(whole_world, recipe.labels) if recipe.labels else whole_world
    shared, judge = data_recipe.get(recipe.name), zoo.path("emoji-clip-judge")
    with torch.no_grad():
        model, sets = Judge(judge, pipe.device.type).model, heldout.build(whole_world, device=pipe.device)
        judge_metrics = clip_eval.evaluate(model, pipe.tokenizer, sets, shared)
    if options.judge_only:
        rows, device = _judge_rows(judge_metrics), describe_device(pipe.device)
        write_json(options.out / "judge.json", {"device": device, "acceptance": rows, "quality": judge_metrics})
        print("\n".join(f"{row['check']}: {row['value']} ({row['target']})" for row in rows))
        return
    # The training loss and the count by eye cannot be measured here: they are taken from the card.
    card = zoo.card("emoji-flux")
    recorded = {row["check"]: row["value"] for row in card["acceptance"]}
    report = score(
        pipe,
        judge,
        world,
        recipe,
        options.out,
        judge_metrics=judge_metrics,
        count=options.count,
        loss=recorded.get(LOSS),
        by_eye=recorded.get(BY_EYE),
    )
    report["quality"] = card["quality"] | report["quality"]
    write_json(options.out / "report.json", {"note": card["note"], **report})


if __name__ == "__main__":
    main()
