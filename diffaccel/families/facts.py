"""What every method must know of a denoising network, as data: blocks, layers to keep, tokens, time convention.

Quantizers, caches, samplers and the evaluation read it here and nowhere else. Names are dotted module names inside the
network, without the ``_orig_mod.`` that ``torch.compile`` puts before them. Every entry is tested against a network
of its class and against what the stock pipeline passes to it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from diffaccel.errors import DiffAccelError, unknown


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Facts about one class of denoisers.

    Attributes:
        blocks: attribute paths of the repeated blocks in execution order, each a list of blocks or one block.
        attention: regex that fully matches the names of the attention modules inside the blocks.
        modulation: regex that fully matches the linears that turn the time embedding into shifts, scales and gates:
            they run at one row a sample and their output does not depend on the sample.
        never_quantize: regexes of what stays in high precision; each covers the modules it matches and all inside.
        patch: from the network's config, how many (frames, rows, columns) of latent pixels make one token.
        vae_scale: pixels to a latent pixel along height and width, where the pipeline's VAE is the usual one.
        vae_frames: frames of video to a latent frame after the first.
        text_tokens: text tokens the stock pipeline always passes; 0 without text, None where checkpoints differ.
        timestep_range: smallest and largest time the network is told, for clean and for pure noise.
    """

    blocks: tuple[str, ...]
    attention: str
    modulation: str
    never_quantize: tuple[str, ...]
    patch: Callable[[Mapping[str, Any]], tuple[int, int, int]]
    vae_scale: int = 8
    vae_frames: int = 1
    text_tokens: int | None = None
    timestep_range: tuple[float, float] = (0.0, 1000.0)

    def tokens(
        self,
        config: Mapping[str, Any],
        height: int,
        width: int,
        frames: int = 1,
        *,
        vae_scale: int | None = None,
        vae_frames: int | None = None,
    ) -> int:
        """Image or video tokens of one sample of ``height x width`` pixels and ``frames`` frames.

        A video of F frames has ``(F - 1) // vae_frames + 1`` latent frames. A UNet counts its latent pixels.

        Raises:
            DiffAccelError: the size holds no token.
        """
        scale, stride = vae_scale or self.vae_scale, vae_frames or self.vae_frames
        return self.latent_tokens(config, height // scale, width // scale, (frames - 1) // stride + 1)

    def latent_tokens(self, config: Mapping[str, Any], height: int, width: int, frames: int = 1) -> int:
        """The same from the size in latent pixels and latent frames."""
        t, h, w = self.patch(config)
        count = -(-frames // t) * (height // h) * (width // w)  # pipelines fill the last patch of frames, never a side
        if min(height, width, frames) <= 0 or count <= 0:
            raise DiffAccelError(
                f"{frames} latent frames of {height}x{width} hold no token: sides must be at least {h}x{w} latent "
                "pixels, with one frame or more. Ask for a larger size."
            )
        return count

    def keeps(self, name: str) -> bool:
        """Whether the module called ``name`` must stay in high precision."""
        return any(re.match(rf"(?:{pattern})(?:\.|$)", name) for pattern in self.never_quantize)

    def block_names(self, network: nn.Module) -> list[str]:
        """Names of the network's blocks, in execution order."""
        names: list[str] = []
        for path in self.blocks:
            found = getattr(unwrap(network), path, None)
            if isinstance(found, nn.ModuleList):
                names += [f"{path}.{i}" for i in range(len(found))]
            elif found is not None:  # a UNet may lack its middle
                names.append(path)
        return names


def unwrap(network: Any) -> Any:
    """The network itself, seen through ``torch.compile``."""
    return getattr(network, "_orig_mod", network)


def facts_of(network: Any) -> Facts:
    """The facts of a network, by its class or the nearest listed base.

    Raises:
        DiffAccelError: no base of the class is listed; names the nearest and all known classes.
    """
    from diffaccel.families.facts_data import FACTS

    cls = type(unwrap(network))
    for base in cls.__mro__:
        if base.__name__ in FACTS:
            return FACTS[base.__name__]
    raise unknown("denoiser class", cls.__name__, FACTS)
