"""Clean latents as searches meet them, ``x0`` predicted at every noise level, with the full decoder's pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import diffaccel
from diffaccel.samplers import SMC
from diffaccel.training.checkpoint import save_tensors

STEPS, GUIDANCE, TEXT_LENGTH = 8, 3.0, 32


class Collector:
    """A reward that scores nothing and keeps the latents that it was shown, one entry a noise level."""

    input, batch_size, identity = "latents", 4096, "collector"

    def __init__(self) -> None:
        self.levels: list[Tensor] = []
        self.prompts: list[list[str]] = []

    def __call__(self, x0: Tensor, prompts: list[str]) -> Tensor:
        """Keep ``x0`` (R, C, h, w)."""
        self.levels.append(x0.float().cpu())
        self.prompts.append(list(prompts))
        return torch.zeros(len(x0), dtype=torch.float64, device="cpu").add_(torch.arange(len(x0), device="cpu") % 2)


def predicted(pipe: Any, prompts: Sequence[str], size: int, particles: int, seed: int) -> Collector:
    """Return ``particles`` independent ways of every prompt from noise to sample: predictions of 8 levels, samples."""
    collector = Collector()
    diffaccel.accelerate(pipe, SMC(reward=collector, budget=particles * STEPS, resample=0.0))
    try:
        pipe(
            list(prompts), negative_prompt=[""] * len(prompts), true_cfg_scale=GUIDANCE, height=size, width=size,
            num_inference_steps=STEPS, max_sequence_length=TEXT_LENGTH, output_type="latent",
            generator=[torch.Generator("cpu").manual_seed(seed + i) for i in range(len(prompts))],
        )  # fmt: skip
    finally:
        diffaccel.remove(pipe)
    return collector


@torch.no_grad()
def full(vae: Any, x0: Tensor, batch: int = 16) -> Tensor:
    """Decode latents as the network has them (R, C, h, w) to pictures (R, 3, 8 h, 8 w) in [-1, 1]."""
    z = x0 / vae.config.scaling_factor + vae.config.shift_factor
    return torch.cat([vae.decode(part.to(vae.device, vae.dtype)).sample.float().cpu() for part in z.split(batch)])


def draw(pipe: Any, prompts: Sequence[str], folder: Path, *, size: int, keep: int, batch: int = 20) -> list[Path]:
    """Draw two ways of every prompt and keep that many latents of each, one file a batch; files that exist stay."""
    files = []
    for number, begin in enumerate(range(0, len(prompts), batch)):
        file = folder / f"{size}-{number:03d}.safetensors"
        files.append(file)
        if file.is_file():
            continue
        texts = prompts[begin : begin + batch]
        levels = torch.stack(predicted(pipe, texts, size, 2, 1_000_000 * size + begin).levels)  # (L, R, C, h, w)
        every = levels.transpose(0, 1).flatten(0, 1)
        generator = torch.Generator("cpu").manual_seed(begin)
        chosen = every[torch.randperm(len(every), generator=generator)[: keep * len(texts)]]
        pictures = full(pipe.vae, chosen).clamp(-1, 1)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_tensors({"latents": chosen, "pictures": pictures.half()}, file, {})
        print(f"{file.name}: {len(chosen)} latents of {len(texts)} prompts", flush=True)
    return files


def read(files: Sequence[Path]) -> tuple[Tensor, Tensor]:
    """Return all latents, and their pictures in half precision."""
    parts = [load_file(file) for file in files]
    return torch.cat([part["latents"] for part in parts]), torch.cat([part["pictures"] for part in parts])
