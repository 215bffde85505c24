"""Floating point operations of one forward pass, in closed form from a network's config and its input size.

Counted are matrix products, attention and convolutions, at two operations per multiply-add, as profilers do that
include attention. Norms, activations and rotary embeddings are not counted, nor are adapters and ControlNets; for
guidance pass the number of rows that run. A quantized, pruned or compiled network counts as the one that its config
describes. A transformer block of width d on L tokens costs ``24 d^2 L + 4 d L^2``: 12 d^2 weights a token, and the two
products of attention. Every row has one time: where a pipeline passes one per token (Wan 2.2 5B), its embedding costs
up to one percent more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffaccel.errors import DiffAccelError
from diffaccel.families.facts import facts_of
from diffaccel.families.flops import transformers, unets
from diffaccel.families.flops.shared import Config
from diffaccel.modules.stand_in import uncompiled

# multiply-adds of one row, by the class of the network
TRANSFORMERS: dict[str, Callable[[Config, int, int], int]] = {
    "FluxTransformer2DModel": transformers.flux,
    "SD3Transformer2DModel": transformers.sd3,
    "WanTransformer3DModel": transformers.wan,
    "HunyuanVideoTransformer3DModel": transformers.hunyuan,
    "CogVideoXTransformer3DModel": transformers.cogvideox,
    "PixArtTransformer2DModel": transformers.pixart,
    "DiTTransformer2DModel": transformers.dit,
}
UNETS: dict[str, Callable[[Config, int, int, int], int]] = {
    "UNet2DConditionModel": unets.unet_condition,
    "UNet2DModel": unets.unet,
}


def flops(network: Any, *, batch: int, height: int, width: int, frames: int = 1, text: int | None = None) -> int:
    """Count the FLOPs of one forward pass of ``network``.

    Args:
        network: a denoiser of a class with known facts, compiled or not.
        batch: rows in the call; with both guidance branches in one call, twice the samples.
        height, width, frames: size of the latents in latent pixels and latent frames.
        text: number of text tokens; None for that of the stock pipeline. Networks without text ignore it.

    Returns:
        Operations, two per multiply-add.

    Raises:
        DiffAccelError: for an unknown class or unsupported config, a size without tokens, or no text length where
            checkpoints differ.
    """
    network = uncompiled(network)
    facts, config = facts_of(network), network.config
    text = facts.text_tokens if text is None else text
    if text is None:
        raise DiffAccelError(
            f"Checkpoints of {type(network).__name__} differ in their text length and none was given. "
            "Pass text=, for PixArt 120 (Alpha) or 300 (Sigma)."
        )
    if batch < 1 or text < 0:
        raise DiffAccelError(f"FLOPs need batch >= 1 and text >= 0, got batch={batch} and text={text}.")
    tokens = facts.latent_tokens(config, height, width, frames)
    name = next(base.__name__ for base in type(network).__mro__ if base.__name__ in (TRANSFORMERS | UNETS))
    if name in UNETS:
        return 2 * batch * UNETS[name](config, height, width, text)
    return 2 * batch * TRANSFORMERS[name](config, tokens, text)
