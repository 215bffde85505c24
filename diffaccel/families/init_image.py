"""The initial image of an image-to-image call: its size, and resizing it."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from diffaccel.errors import DiffAccelError


def source_size(pipe: Any, arguments: dict[str, Any]) -> tuple[int, int]:
    """Return height and width in pixels of a call whose picture has the size of its ``image`` (pixels or latents)."""
    height, width = pipe.image_processor.preprocess(arguments["image"]).shape[-2:]
    scale = pipe.vae_scale_factor if is_latent(arguments["image"]) else 1
    return height * scale, width * scale


def resized_source(arguments: dict[str, Any], height: int, width: int) -> Tensor:
    """Resize the call's image to ``(B, 3, H, W)`` in [0, 1], as pipelines resize images themselves."""
    from diffusers.image_processor import VaeImageProcessor

    check_resizable(arguments)
    return VaeImageProcessor(vae_scale_factor=1, do_normalize=False).preprocess(
        arguments["image"], height=height, width=width
    )


def check_resizable(arguments: dict[str, Any]) -> None:
    """Raise for an image that was given as latents, which cannot be resized like pixels."""
    if is_latent(arguments.get("image")):
        raise DiffAccelError(
            "The call's `image` is latents, which fit one resolution; the sampler also works at another. "
            "Pass the image itself (PIL, array or tensor of 3 channels)."
        )


def is_latent(image: Any) -> bool:
    """Return whether an image argument is latents, alone or in a list: pictures have at most three channels."""
    first = image[0] if isinstance(image, list | tuple) and image else image
    return isinstance(first, Tensor) and first.ndim >= 3 and first.shape[-3] > 3


def strength_problem(arguments: dict[str, Any]) -> str | None:
    """Return why ``strength`` leaves no step and what to ask for, or None; its share of the steps is rounded down."""
    strength, steps = arguments.get("strength"), arguments.get("num_inference_steps")
    custom = next((arguments[k] for k in ("timesteps", "sigmas") if arguments.get(k) is not None), None)
    steps = steps if custom is None else len(custom)
    if strength is None or not isinstance(steps, int) or steps < 1 or int(steps * strength) > 0:
        return None
    if strength <= 0:
        return f"strength is {strength}. Use one above 0 and up to 1."
    enough = math.ceil(1 / strength)
    enough += int(enough * strength) == 0  # by rounding
    return (
        f"of num_inference_steps={steps} strength={strength} leaves int({steps} * {strength}) = 0. Ask for "
        f"num_inference_steps={enough} or more, or use a strength of at least {math.ceil(1000 / steps) / 1000}."
    )
