"""Cheap decoders for scores on the way: a tiny autoencoder, or a linear map from latents to colours."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffaccel.errors import DiffAccelError, first_line
from diffaccel.eval.uncertainty.intervals import spearman
from diffaccel.session import Session

Decoder = Callable[[Tensor], Tensor]  # from clean latents (R, C, H, W) to pixels (R, 3, H', W') in [-1, 1]
PICTURES, RIDGE = 64, 1e-4  # pictures that the linear map is fitted on, and its penalty
AGREES, ROWS = 0.95, 8  # least rank correlation with the full decoder's rewards, over at least so many

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Preview:
    """A cheap decoder, and whether its rewards were compared with the full decoder's."""

    decode: Decoder
    checked: bool = False


def preview_decoder(preview: Any, session: Session, device: torch.device) -> Preview | None:
    """Return the decoder that an option names; None for the pipeline's own.

    Args:
        preview: None or "" for none; "full" for the pipeline's own by this way; "linear" for a linear map fitted to the
            pipeline's VAE; a folder of a diffusers ``AutoencoderTiny``; or a callable or module from latents to pixels
            in [-1, 1].
        device: where it decodes.

    Raises:
        DiffAccelError: for videos, a folder that holds no such model, and a VAE that the map cannot be fitted to.
    """
    if preview is None or preview == "":
        return None
    if session.x.ndim != 4:
        raise DiffAccelError("A preview decodes pictures; this call makes videos. Leave preview out.")
    if preview == "full":
        return Preview(session.decoder(device), checked=True)
    if preview == "linear":
        return Preview(fit_linear(session, device))
    if isinstance(preview, str):
        return Preview(_tiny(Path(preview), session, device))
    if isinstance(preview, nn.Module):
        return Preview(_of_module(preview, session, device))
    if callable(preview):
        return Preview(preview)
    raise DiffAccelError(
        f"preview is {type(preview).__name__}; it must be 'linear', 'full', a folder of an AutoencoderTiny, or "
        "a function from latents to pixels in [-1, 1]."
    )


def model_name(pipe: Any) -> str:
    """Return the name or folder that a pipeline was loaded from; "" where it does not say."""
    return str(getattr(pipe.config, "_name_or_path", "") or getattr(pipe, "name_or_path", ""))


def _tiny(folder: Path, session: Session, device: torch.device) -> Decoder:
    from diffusers import AutoencoderTiny

    if not (folder / "config.json").is_file():
        raise DiffAccelError(
            f"preview is '{folder}', which is no folder of a diffusers AutoencoderTiny (it has no config.json), nor "
            "'linear' or 'full'."
        )
    try:
        model = AutoencoderTiny.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise DiffAccelError(f"The preview '{folder}' cannot be loaded: {first_line(error, 300)}") from error
    return _of_module(model.to(device).eval().requires_grad_(False), session, device)


def _of_module(module: nn.Module, session: Session, device: torch.device) -> Decoder:
    """Return the decoder of a module: its ``decode`` where it has one, on latents as the network has them."""
    dtype = next((p.dtype for p in module.parameters()), torch.float32)
    decode: Any = getattr(module, "decode", module)
    channels = getattr(getattr(module, "config", None), "latent_channels", None)
    if channels is not None and channels != session.x.shape[1]:
        raise DiffAccelError(
            f"The preview takes latents of {channels} channels, and those of {type(session.pipe).__name__} have "
            f"{session.x.shape[1]}. Take the one of its own VAE."
        )

    @torch.no_grad()
    def decoder(x0: Tensor) -> Tensor:
        pixels = decode(x0.to(device, dtype))
        return pixels if isinstance(pixels, Tensor) else pixels[0]

    return decoder


@torch.no_grad()
def fit_linear(session: Session, device: torch.device) -> Decoder:
    """Fit ``rgb = W latents + b`` at every place of the latents, by least squares on pictures through the VAE.

    The pictures are smooth random fields, the same at every call; a latent's colour is the mean of its pixels.
    """
    family, pipe, size = session.family, session.pipe, session.x.shape[-2:]
    pictures = random_fields(PICTURES, (session.height, session.width)).to(session.device)
    parts = [family.encode(pipe, part).float() for part in pictures.split(8)]
    latents = torch.cat(parts).movedim(1, -1).flatten(0, 2).double().cpu()  # (n h w, C)
    colours = functional.adaptive_avg_pool2d(pictures, (size[0], size[1])).movedim(1, -1).flatten(0, 2).double().cpu()
    inputs = torch.cat([latents, torch.ones_like(latents[:, :1])], 1)
    gram = inputs.T @ inputs
    penalty = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device="cpu")
    weights = torch.linalg.solve(gram + penalty, inputs.T @ colours).float().to(device)  # (C + 1, 3)
    height, width = session.height, session.width

    def decoder(x0: Tensor) -> Tensor:
        x0 = x0.to(device, torch.float32)
        colour = torch.einsum("rchw,cd->rdhw", x0, weights[:-1]) + weights[-1].reshape(1, 3, 1, 1)
        return functional.interpolate(colour, size=(height, width), mode="bilinear", align_corners=False).clamp(-1, 1)

    return decoder


def random_fields(count: int, size: tuple[int, int]) -> Tensor:
    """Return smooth random pictures ``(count, 3, H, W)`` in [-1, 1], with grains of many sizes."""
    generator = torch.Generator("cpu").manual_seed(0)
    total = torch.zeros(count, 3, *size, dtype=torch.float32, device="cpu")
    for grid in (1, 2, 4, 8, 16):
        field = torch.randn(count, 3, grid, grid, generator=generator, dtype=torch.float32, device="cpu")
        total += functional.interpolate(field, size=size, mode="bicubic", align_corners=False) / grid**0.5
    return total.clamp(-1, 1)


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Return Spearman's correlation of two lists of rewards, which may be infinite; 1 where one of them is constant."""
    rewards = [torch.tensor(values, dtype=torch.float64, device="cpu").nan_to_num() for values in (a, b)]
    is_constant = any(len(values.unique()) < 2 for values in rewards)
    return 1.0 if is_constant else spearman(*rewards)


def warn_of_disagreement(cheap: list[float], full: list[float]) -> None:
    """Log where a preview ranks pictures otherwise than the full decoder does."""
    correlation = rank_correlation(cheap, full)
    if correlation < AGREES:
        logger.warning(
            "The preview ranks %d pictures otherwise than the full decoder: rank correlation %.2f, below %.2f. Take "
            "a better preview, or none.", len(cheap), correlation, AGREES,
        )  # fmt: skip
