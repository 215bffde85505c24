"""The autoencoder: pictures of 64 and 128 px to latents of 1/8 their size, and back.

Besides plain reconstruction it learns to decode resized latents: samplers that work at a lower resolution first pool
or interpolate latents, and the decoder should then show the resized picture.

    full    decode(z(x))            ~ x               at 128 px
    half    decode(z(x))            ~ x               at 64 px
    crop    decode(z(c))            ~ c               c: 64 px pieces of 128 px pictures
    pooled  decode(pool2(z(x)))     ~ pool2(x)
    up      decode(up2(z(down2 x))) ~ up2(down2 x)    bilinear and nearest in turn
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from diffaccel.training.loop import Deadline, TrainingRun
from diffaccel.training.steps import computing
from scripts.zoo.emoji.recipe_flow import VAERecipe

SIZE = 128
HELD_OUT = 64  # every 64th scene is never trained on
Images = Callable[[Tensor, int], Tensor]  # scene indices (B,), size -> pictures (B, 3, size, size) in [-1, 1]


def build(recipe: VAERecipe) -> AutoencoderKL:
    """Build the autoencoder with random weights."""
    return AutoencoderKL(
        sample_size=SIZE,
        block_out_channels=recipe.channels,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=recipe.layers,
        latent_channels=recipe.latent_channels,
        norm_num_groups=recipe.groups,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
    )


def reconstruction(decoded: Tensor, target: Tensor) -> Tensor:
    """Return mean |d| + mean |pool4 d| + 0.5 mean |grad d| + 0.5 mean d^2, with d = decoded - target (B, 3, H, W).

    The pooled term is for flat colours, the gradient term (one-pixel differences in x and in y) for edges.
    """
    d = (decoded - target).float()
    gradient = (d[..., 1:] - d[..., :-1]).abs().mean() + (d[..., 1:, :] - d[..., :-1, :]).abs().mean()
    return d.abs().mean() + F.avg_pool2d(d, 4).abs().mean() + 0.5 * gradient + 0.5 * d.square().mean()


def divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """Return KL(N(mean, exp(logvar)) || N(0, 1)), averaged over elements, in nats."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).float().mean()


def encode(vae: AutoencoderKL, x: Tensor) -> tuple[Tensor, Tensor]:
    """Encode to mean and log-variance of q(z | x), each (B, C, H/8, W/8)."""
    mean, logvar = vae.encoder(x).float().chunk(2, dim=1)
    return mean, logvar.clamp(-30, 20)


STEPS = ("full", "half", "crop", "pooled", "up")


def _halve(y: Tensor) -> Tensor:
    return F.avg_pool2d(y, 2)


def _resizer(kind: str, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
    """Return the resizing of latents and target picture in a step of this kind."""
    if kind == "pooled":
        return _halve
    if kind == "up":
        smooth = bool(torch.rand((), generator=generator) < 0.5)
        mode = {"mode": "bilinear", "align_corners": False} if smooth else {"mode": "nearest"}
        return lambda y: F.interpolate(y, scale_factor=2, **mode)
    return lambda y: y


def step_pair(
    kind: str, images: Images, index: Tensor, noise: Callable[[Tensor], Tensor], vae: AutoencoderKL, generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run one step of a kind.

    Returns:
        The decoded pictures, their targets, and mean and log-variance of the latents.
    """
    x = images(index, SIZE // 2 if kind == "half" else SIZE)
    if kind == "crop":
        top, left = torch.randint(0, SIZE // 2 + 1, (2,), generator=generator).tolist()
        x = x[:, :, top : top + SIZE // 2, left : left + SIZE // 2]
    if kind == "up":
        x = _halve(x)
    resize = _resizer(kind, generator)
    target = resize(x)
    mean, logvar = encode(vae, x)
    z = mean + noise(mean) * (0.5 * logvar).exp()
    return vae.decoder(resize(z)), target, mean, logvar


def loss(
    vae: AutoencoderKL,
    recipe: VAERecipe,
    kind: str,
    images: Images,
    index: Tensor,
    generator: torch.Generator,
    host: torch.Generator,
) -> Tensor:
    """Return the training loss of one step; ``generator`` draws noise on the device, ``host`` decides shapes."""

    def noise(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, device=like.device)

    decoded, target, mean, logvar = step_pair(kind, images, index, noise, vae, host)
    return reconstruction(decoded, target) + recipe.kl * divergence(mean, logvar)


def train(
    images: Images, count: int, work: Path, recipe: VAERecipe, *, deadline: Deadline, device: str, seed: int = 0
) -> AutoencoderKL | None:
    """Train, or resume, and save to ``work/vae``; return None while the run is not finished."""
    torch.manual_seed(seed)
    vae = build(recipe).to(device)
    report = partial(print, flush=True)
    run = TrainingRun(work, "vae", {"vae": vae}, recipe.plan, seed=seed, deadline=deadline, device=device, tell=report)
    # Reading a crop's place from the device would synchronise with it in every step.
    host = torch.Generator()
    for step in run:
        host.manual_seed(seed + step)
        kind = recipe.cycle[step % len(recipe.cycle)]
        index = torch.randint(0, count, (recipe.batch[kind],), generator=run.generator, device=run.device)
        index = torch.where(index % HELD_OUT == 0, (index + 1) % count, index)
        with computing(run.device, torch.bfloat16):
            value = loss(vae, recipe, kind, images, index, run.generator, host)
        run.update(value, len(index), **{kind: value.detach()})
    if not run.finished:
        return None
    with run.ema:
        vae.eval()
        set_latent_scale(vae, images, count, device)
        vae.save_pretrained(work / "vae")
    return load(work, device)


def load(work: Path, device: str) -> AutoencoderKL | None:
    """Load the finished autoencoder of a work folder; None where there is none."""
    if not (work / "vae" / "config.json").is_file():
        return None
    return AutoencoderKL.from_pretrained(work / "vae").to(device).eval().requires_grad_(False)


@torch.no_grad()
def set_latent_scale(vae: AutoencoderKL, images: Images, count: int, device: str, sample: int = 512) -> None:
    """Set shift = mean and scale = 1 / std of the latents: FLUX's transformer receives (z - shift) * scale."""
    index = torch.linspace(0, count - 1, min(sample, count)).long().to(device)
    latents = torch.cat([encode(vae, images(part, SIZE))[0] for part in index.split(64)])
    vae.register_to_config(
        shift_factor=round(latents.mean().item(), 5), scaling_factor=round(1 / latents.std().item(), 5)
    )


@torch.no_grad()
def quality(vae: AutoencoderKL, images: Images, count: int, device: str, limit: int = 128) -> dict[str, float]:
    """Measure PSNR in dB on held-out scenes, for each kind of step but crops; peak-to-peak range 2."""
    index = torch.arange(0, count, HELD_OUT, device=device)[:limit]
    generator = torch.Generator().manual_seed(0)
    result = {}
    for kind in ("full", "half", "pooled", "up"):
        errors = []
        for part in index.split(32):
            decoded, target, _, _ = step_pair(kind, images, part, torch.zeros_like, vae, generator)
            errors.append((decoded.clamp(-1, 1) - target).square().mean((1, 2, 3)))
        result[kind] = round((10 * (math.log10(4) - torch.cat(errors).log10())).mean().item(), 2)
    return result
