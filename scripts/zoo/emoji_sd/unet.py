"""The UNet of emoji-sd: v-prediction on the latents of emoji-flux's autoencoder, under its CLIP text states.

    x_t = a_t x0 + s_t eps,   v = a_t eps - s_t x0,   loss = w_t mean |unet(x_t, t, text) - v|^2

with ``a_t^2 = alpha_bar_t`` of a scaled-linear schedule whose last step is pure noise (arXiv 2305.08891), and
``w_t = min(SNR_t, gamma) / (SNR_t + 1)`` (arXiv 2303.09556). The text encoder is frozen: it is emoji-flux's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor

from diffaccel.training.loop import Deadline, TrainingRun
from diffaccel.training.steps import computing
from scripts.zoo.emoji.vae import Images, encode
from scripts.zoo.emoji_sd.recipe import UNetRecipe

NAME = "unet"  # of the checkpoint


@dataclass
class Table:
    """The training data, on one device."""

    latents: Tensor  # (N, 16, 16, 16) fp16, as the pipeline scales them
    prompt: Tensor  # (N, 2) rows of ``tokens``
    tokens: Tensor  # (P, 32); row 0 is the empty prompt


def build(recipe: UNetRecipe, vae: AutoencoderKL, text_width: int) -> UNet2DConditionModel:
    """Build the UNet with random weights: cross-attention at every level."""
    levels = len(recipe.channels)
    channels = vae.config.latent_channels
    return UNet2DConditionModel(
        sample_size=recipe.size // 2 ** (len(vae.config.block_out_channels) - 1),
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=recipe.channels,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        cross_attention_dim=text_width,
        attention_head_dim=tuple(width // recipe.head for width in recipe.channels),
        norm_num_groups=recipe.groups,
        use_linear_projection=True,
    )


def scheduler() -> DDIMScheduler:
    """Return the pipeline's scheduler."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        timestep_spacing="trailing", rescale_betas_zero_snr=True, clip_sample=False, set_alpha_to_one=True,
    )  # fmt: skip


def shift_of(vae: AutoencoderKL) -> float:
    """Return the shift of the latents, rounded to bfloat16, in which it is exported as a bias."""
    return float(torch.tensor(vae.config.shift_factor or 0.0).bfloat16())


@torch.no_grad()
def tabulate(
    images: Images, captions: Sequence[Sequence[str]], vae: AutoencoderKL, tokenizer: Any, size: int, device: str
) -> Table:
    """Encode all scenes, and tokenize all captions."""
    shift, scale = shift_of(vae), vae.config.scaling_factor
    latents = []
    with computing(torch.device(device), torch.bfloat16):
        for index in torch.arange(len(captions[0]), device=device).split(256):
            latents.append(((encode(vae, images(index, size))[0] - shift) * scale).half())
    rows: dict[str, int] = {"": 0}
    prompt = torch.tensor(
        [[rows.setdefault(text, len(rows)) for text in pair] for pair in zip(captions[0], captions[1], strict=True)]
    )
    tokens = tokenizer(
        list(rows), padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
    ).input_ids
    return Table(torch.cat(latents), prompt.to(device), tokens.to(device))


def loss_of(unet: Any, x0: Tensor, text: Tensor, alphas: Tensor, gamma: float, generator: torch.Generator) -> Tensor:
    """Return the weighted error of v at random steps."""
    t = torch.randint(0, len(alphas), (len(x0),), generator=generator, device=x0.device)
    alpha = alphas[t].view(-1, 1, 1, 1)
    eps = torch.randn(x0.shape, generator=generator, device=x0.device)
    x, v = alpha.sqrt() * x0 + (1 - alpha).sqrt() * eps, alpha.sqrt() * eps - (1 - alpha).sqrt() * x0
    prediction = unet(x, t, encoder_hidden_states=text, return_dict=False)[0]
    snr = alphas[t] / (1 - alphas[t]).clamp_min(1e-8)
    weight = snr.clamp_max(gamma) / (snr + 1)
    weight = torch.where(snr == 0, torch.ones_like(weight), weight)  # pure noise, from which every call begins
    errors = F.mse_loss(prediction.float(), v, reduction="none").mean(dim=(1, 2, 3))
    return (weight * errors).mean()


def train(
    table: Table, weights: Tensor, work: Path, recipe: UNetRecipe, unet: Any, text_encoder: Any, *,
    deadline: Deadline, device: str, seed: int = 0,
) -> TrainingRun:  # fmt: skip
    """Train, or resume, ``work/unet.safetensors``, drawing scenes with ``weights`` (N,)."""
    run = TrainingRun(
        work, NAME, {"unet": unet.to(device)}, recipe.plan, seed=seed + 1, deadline=deadline, device=device,
        tell=partial(print, flush=True),
    )  # fmt: skip
    alphas = scheduler().alphas_cumprod.to(device)
    text_encoder.to(device).eval().requires_grad_(False)
    network = run.module["unet"]
    if recipe.compiled and run.device.type == "cuda":
        network.compile(dynamic=False)
    for _ in run:
        index = torch.multinomial(weights, recipe.batch, replacement=True, generator=run.generator)
        caption = torch.randint(0, 2, (recipe.batch,), generator=run.generator, device=device)
        row = table.prompt[index, caption]
        is_empty = torch.rand(recipe.batch, generator=run.generator, device=device) < recipe.empty
        with computing(run.device, torch.bfloat16):
            with torch.no_grad():
                text = text_encoder(table.tokens[torch.where(is_empty, 0, row)])[0]
            loss = loss_of(network, table.latents[index].float(), text, alphas, recipe.gamma, run.generator)
        run.update(loss, recipe.batch)
    return run


def load(unet: UNet2DConditionModel, work: Path) -> UNet2DConditionModel:
    """Fill a UNet with the averaged weights of a work folder."""
    state = load_file(work / f"{NAME}.safetensors")
    averaged = {k.removeprefix("ema.unet."): v for k, v in state.items() if k.startswith("ema.unet.")}
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            parameter.copy_(averaged[name])
    return unet.eval()
