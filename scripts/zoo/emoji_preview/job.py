"""Train a preview decoder of emoji-flux: latents to pictures, some twenty times cheaper than its VAE.

    python -m scripts.zoo.emoji_preview.job --work out/preview [--minutes 12]

It draws latents of emoji-flux by captions that no evaluation has, decodes them in full, and trains a diffusers
``AutoencoderTiny`` on these pairs: the decoder to the pictures, the encoder back to the latents. No data and no network
are used. The same command goes on where it was killed, and saves ``WORK/emoji-preview`` at the end, for ``preview=``.
"""

from __future__ import annotations

import argparse
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, FluxPipeline
from torch import Tensor

from diffaccel import zoo
from diffaccel.eval.sets import prompts as prompt_sets
from diffaccel.files import write_json
from diffaccel.training.loop import Deadline, TrainingPlan, TrainingRun
from scripts.zoo.emoji import card
from scripts.zoo.emoji.vae import reconstruction
from scripts.zoo.emoji_1step.prompts import build
from scripts.zoo.emoji_preview import latents

BASE, NAME = "emoji-flux", "emoji-preview"
WIDTH, BLOCKS, ENCODER_BLOCKS = 16, (3, 3, 1, 0), (0, 0, 1, 1)
LIMIT = 300_000  # bytes
BATCH, SHARE_OF_SMALL = {128: 8, 64: 16}, 4  # every so many steps one of 64 px
OF_ENCODER = 0.1  # its part of the loss


def tiny(channels: int) -> AutoencoderTiny:
    """Build the model with random weights."""
    return AutoencoderTiny(
        latent_channels=channels, encoder_block_out_channels=(WIDTH,) * 4, decoder_block_out_channels=(WIDTH,) * 4,
        num_encoder_blocks=ENCODER_BLOCKS, num_decoder_blocks=BLOCKS, upsample_fn="nearest",
    )  # fmt: skip


def loss(model: Any, z: Tensor, pictures: Tensor) -> Tensor:
    """Return the distance of the decoded pictures, and of the encoded ones to their latents."""
    decoded = model.decode(z).sample
    return reconstruction(decoded, pictures) + OF_ENCODER * F.mse_loss(model.encode(pictures).latents, z)


def train(options: argparse.Namespace, pairs: dict[int, tuple[Tensor, Tensor]]) -> AutoencoderTiny | None:
    """Train, or resume; return the averaged model, None while the run is not finished."""
    torch.manual_seed(0)
    model = tiny(pairs[128][0].shape[1]).to(memory_format=torch.channels_last)
    plan = TrainingPlan(lr=3e-3, seconds=60 * options.minutes, warmup=50, flat=0.4, ema=0.995, save_seconds=30)
    run = TrainingRun(
        options.work, "preview", {"preview": model}, plan, deadline=Deadline(60 * options.call_minutes),
        tell=partial(print, flush=True),
    )  # fmt: skip
    for step in run:
        size = 64 if step % SHARE_OF_SMALL == 0 else 128
        z, pictures = pairs[size]
        index = torch.randint(len(z), (BATCH[size],), generator=run.generator, device="cpu")
        value = loss(model, z[index], pictures[index].float())
        run.update(value, len(index))
    if not run.finished:
        return None
    with run.ema:
        return tiny_copy(model)


def tiny_copy(model: AutoencoderTiny) -> AutoencoderTiny:
    """Return the model with its present weights, in bfloat16."""
    copy = tiny(model.config.latent_channels)
    copy.load_state_dict(model.state_dict())
    return copy.bfloat16().eval().requires_grad_(False)


def save(model: AutoencoderTiny, folder: Path, facts: dict[str, Any]) -> int:
    """Save the model as diffusers reads it, with facts and licence texts of the art; return the bytes of its file."""
    model.save_pretrained(folder)
    without_derived(folder / "config.json")
    card.legal(folder)
    write_json(folder / "facts.json", facts)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def count(module: torch.nn.Module) -> int:
    """Return the number of parameters."""
    return sum(p.numel() for p in module.parameters())


def without_derived(config: Path) -> None:
    """Leave out what the model derives from its other options: diffusers warns of it whenever it loads the folder."""
    options = json.loads(config.read_text())
    options.pop("block_out_channels", None)
    write_json(config, options)


@torch.no_grad()
def psnr(model: AutoencoderTiny, z: Tensor, pictures: Tensor) -> float:
    """Return the mean PSNR in dB to the full decoder's pictures, in a range of 2."""
    decoded = torch.cat([model.float().decode(part).sample.clamp(-1, 1) for part in z.split(16)])
    errors = (decoded - pictures.float()).square().mean((1, 2, 3))
    return round(float(10 * (math.log10(4) - errors.log10()).mean()), 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=12.0, help="of training, over all calls")
    parser.add_argument("--call-minutes", type=float, default=60.0, help="of this call")
    parser.add_argument("--prompts", type=int, default=90)
    options = parser.parse_args()
    pipe = FluxPipeline.from_pretrained(zoo.path(BASE), dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    vocabulary: Any = zoo.vocabulary_of(BASE)
    texts = build(vocabulary, options.prompts, prompt_sets.read("emoji-1000").texts, seed=22)
    third = len(texts) // 3
    pairs = {
        64: latents.read(latents.draw(pipe, texts[:third], options.work / "latents", size=64, keep=8)),
        128: latents.read(latents.draw(pipe, texts[third:], options.work / "latents", size=128, keep=8)),
    }
    del pipe
    model = train(options, pairs)
    if model is None:
        print("not finished: give the same command again")
        return
    facts = {
        "parameters": {part: count(getattr(model, part)) for part in ("encoder", "decoder")},
        "training": {"latents": sum(len(z) for z, _ in pairs.values()), "minutes": options.minutes},
        "psnr in training": psnr(model, *(tensor[:64] for tensor in pairs[128])),
    }  # fmt: skip
    size = save(model.bfloat16(), options.work / NAME, facts)
    print(f"{options.work / NAME}: {size} bytes", *(f"{key}: {value}" for key, value in facts.items()), sep="\n")
    if size > LIMIT:
        raise SystemExit(f"error: {size} bytes are more than {LIMIT}; make WIDTH or BLOCKS smaller.")


if __name__ == "__main__":
    main()
