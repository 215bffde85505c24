"""Runs of pictures and videos for tests, in folders as diffaccel writes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffaccel.eval.sets.run import Picture, Run
from diffaccel.files import Clip, write_mp4


def blocks(seed: int, size: int = 32) -> Tensor:
    """Draw blocks of colour: uint8 (3, size, size)."""
    small = torch.randint(0, 256, (3, 4, 4), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return small.repeat_interleave(size // 4, 1).repeat_interleave(size // 4, 2)


def of_images(
    folder: Path, images: Sequence[Tensor], prompts: Sequence[str], made: dict[str, Any] | None = None, *,
    first_seed: int = 0,
) -> Run:  # fmt: skip
    """Save a run of pictures (3, H, W), the i-th of the i-th prompt and of seed ``first_seed + i``."""
    folder.mkdir(parents=True)
    pictures = []
    for seed, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
        file = folder / f"{seed:05d}.png"
        Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(file)
        pictures.append(Picture(file.stem, file, prompt, first_seed + seed))
    return Run(folder.name, folder, tuple(pictures), made or {})


def of_videos(folder: Path, videos: Sequence[Tensor], prompts: Sequence[str], *, first_seed: int = 0) -> Run:
    """Save a run of videos (T, 3, H, W), with the encoder's loss."""
    folder.mkdir(parents=True)
    pictures = []
    for seed, (video, prompt) in enumerate(zip(videos, prompts, strict=True)):
        file = folder / f"{seed:05d}.mp4"
        frames = [Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy()) for frame in video]
        write_mp4(file, Clip(frames, 8.0))
        pictures.append(Picture(file.stem, file, prompt, first_seed + seed))
    return Run(folder.name, folder, tuple(pictures))
