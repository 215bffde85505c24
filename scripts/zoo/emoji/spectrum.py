"""Fit the power spectrum of the latents that the pipeline's VAE makes of the world's pictures.

    python -m scripts.zoo.emoji.spectrum --data data/emoji [--count 256]

Prints ``A`` and ``beta`` of ``P(w) = A w^-beta`` at 128 and 64 px: a row of ``diffaccel/families/spectra.py``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from diffaccel import zoo
from diffaccel.families import spectra
from scripts.zoo.emoji.data import pictures
from scripts.zoo.emoji.heldout import build
from scripts.zoo.emoji.world import load


def main() -> None:
    """Encode pictures of single objects and fit a line."""
    from diffusers import AutoencoderKL

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--count", type=int, default=256)
    args = parser.parse_args()
    vae = AutoencoderKL.from_pretrained(zoo.path("emoji-flux") / "vae").eval()
    scenes = build(load(args.data))["seen"]
    draw, index = pictures(scenes), torch.arange(min(args.count, len(scenes)))
    for size in (128, 64):
        with torch.no_grad():
            parts = [vae.encode(draw(part, size)).latent_dist.mode() for part in index.split(32)]
        latents = (torch.cat(parts) - vae.config.shift_factor) * vae.config.scaling_factor
        scale, slope = spectra.fit(latents)
        print(f"{size} px, {len(latents)} pictures: A {scale:.4f}, beta {slope:.4f}")


if __name__ == "__main__":
    main()
