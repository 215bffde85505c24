"""Sets of pictures that the network was not trained on, with the mode (family, group) of each."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from diffaccel.files import atomic
from scripts.features.held_out import HELD_OUT
from scripts.features.textures import sample

STYLES = ("noto", "twemoji", "fluent 3d")
PROMPTS = {
    mode: labels.split(", ")
    for mode, labels in {
        "animal": "cat, dog, lion, tiger, zebra, cow, fox, monkey, deer, horse",
        "food": "banana, red apple, watermelon, strawberry, carrot, eggplant, lemon, tomato, pear, peach",
        "transport": "train, bus, taxi, automobile, tractor, bicycle, motorcycle, tram, fire engine, minibus",
        "face": "grinning face, winking face, melting face, smiling face, star-struck, kissing face, zany face, "
        "face with tongue, upside-down face, smiling face with halo",
        "plant": "rose, tulip, cactus, palm tree, sunflower, maple leaf, shamrock, seedling, hibiscus, bouquet",
        "place": "house, volcano, hospital, bank, hotel, school, stadium, desert, mountain, hut",
        "tool": "hammer, axe, pick, wrench, screwdriver, gear, magnet, shield, toolbox, dagger",
        "clothing": "glasses, necktie, jeans, scarf, gloves, coat, socks, dress, handbag, backpack",
    }.items()
}


@dataclass(frozen=True)
class PictureSet:
    """Pictures uint8 (N, 3, S, S) in random order, and the names of their modes."""

    images: Tensor
    mode: list[str]

    def shuffled(self, seed: int = 0) -> PictureSet:
        """Return the set in a random order."""
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(seed))
        return PictureSet(self.images[order], [self.mode[i] for i in order.tolist()])


def to_uint8(x: Tensor) -> Tensor:
    """Convert floats in [0, 1] to uint8, rounded."""
    return (x.clamp(0, 1) * 255).round().to(torch.uint8)


def held_out(count: int, seed: int) -> PictureSet:
    """Draw the families unseen in training; a mode is a family in warm or in cool colours."""
    pictures = sample(HELD_OUT, count=count, generator=torch.Generator().manual_seed(seed))
    warm = (pictures.images[:, 0] > pictures.images[:, 2]).float().mean((1, 2)) > 0.5
    names = list(HELD_OUT)
    mode = [f"{names[i]}, {'warm' if w else 'cool'}" for i, w in zip(pictures.family, warm, strict=True)]
    return PictureSet(to_uint8(pictures.images), mode).shuffled()


def drawn(rounds: int, seed: int, folder: Path) -> PictureSet:
    """Sample ``emoji-flux`` at 64 pixels, 4 steps, guidance 3, 240 prompts ``rounds`` times; cached in ``folder``."""
    import diffaccel
    from scripts.zoo.emoji.score import draw

    labels = [(mode, label) for mode, names in PROMPTS.items() for label in names]
    table = [(mode, f"{label}, {style}") for (mode, label), style in product(labels, STYLES)] * rounds
    file = folder / f"emoji-flux-{len(table)}-{seed}.safetensors"
    if not file.exists():
        pipe = diffaccel.load("emoji-flux")
        pipe.set_progress_bar_config(disable=True)
        prompts = [prompt for _, prompt in table]
        images = to_uint8((draw(pipe, prompts, size=64, steps=4, guidance=3.0, seed=seed, batch=48) + 1) / 2)
        with atomic(file) as out:
            out.write(save({"images": images.contiguous()}))
    return PictureSet(load(file.read_bytes())["images"], [mode for mode, _ in table]).shuffled()


def icons(folder: Path, count: int) -> PictureSet:
    """Render the training art of ``emoji-flux``, filling 128 pixels on white; a mode is a group of labels."""
    from scripts.zoo.emoji.scenes import FILLED, Row, Scenes
    from scripts.zoo.emoji.world import load as load_world

    world = load_world(folder)
    group = [world.group[int(label)].partition("-")[0] for label in world.icon_label]
    frequent = [i for i, name in enumerate(group) if group.count(name) >= 60]
    order = torch.randperm(len(frequent), generator=torch.Generator().manual_seed(0))[:count]
    chosen = torch.tensor(frequent)[order].tolist()
    scenes = Scenes(world, [Row("single", (i,), (-1,), FILLED) for i in chosen], seed=0, device="cpu")
    images = torch.cat([scenes.images(part, 128) for part in torch.arange(len(chosen)).split(256)])
    return PictureSet(to_uint8((images + 1) / 2), [group[i] for i in chosen])


def folder(path: Path, count: int) -> PictureSet:
    """Read a folder of pictures as RGB of 128 pixels (Pillow, bicubic); a mode is the folder that holds a picture."""
    import numpy as np
    from PIL import Image

    suffixes = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in suffixes)
    if len(files) < 4:
        known = ", ".join(sorted(suffixes))
        raise SystemExit(f"'{path}' holds {len(files)} pictures ({known}); at least 4 are needed.")
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0))[:count].tolist()
    images = []
    for i in order:
        with Image.open(files[i]) as image:
            images.append(np.asarray(image.convert("RGB").resize((128, 128), Image.Resampling.BICUBIC)))
    return PictureSet(
        torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), [files[i].parent.name for i in order]
    )
