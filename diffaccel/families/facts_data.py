"""The facts about each class of denoisers, by its name in diffusers, and the meaning of each field."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from diffaccel.errors import DiffAccelError, size_text
from diffaccel.modules.stand_in import uncompiled

Patch = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Facts about one class of denoisers.

    Attributes:
        blocks: attribute paths of the repeated blocks in execution order, each a list of blocks or one block.
        hidden_output: position of the image tokens in what a block returns, where that is a tuple.
        attention: regex that fully matches the names of the attention modules inside the blocks.
        modulation: regex that fully matches the linears that turn the time embedding into shifts, scales and gates:
            they run once per sample and their output does not depend on the sample.
        never_quantize: regexes of modules that stay in high precision; each covers the modules that it matches and all
            modules inside them.
        patch: function of the network's config: the (frames, rows, columns) of latent pixels in one token.
        vae_scale: pixels per latent pixel along height and width, with the pipeline's usual VAE.
        vae_frames: frames of video per latent frame after the first.
        text_tokens: number of text tokens in the stock pipeline; 0 without text, None where checkpoints differ.
        timestep_range: the network's time argument for clean data and for pure noise.
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
    hidden_output: int = 0

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
        """Return the image or video tokens of one sample of ``height x width`` pixels and ``frames`` frames.

        A video of F frames has ``(F - 1) // vae_frames + 1`` latent frames. A UNet counts its latent pixels.

        Raises:
            DiffAccelError: the size holds no token.
        """
        scale, stride = vae_scale or self.vae_scale, vae_frames or self.vae_frames
        return self.latent_tokens(config, height // scale, width // scale, (frames - 1) // stride + 1)

    def latent_tokens(self, config: Mapping[str, Any], height: int, width: int, frames: int = 1) -> int:
        """Return :meth:`tokens` from the size in latent pixels and latent frames."""
        t, h, w = self.patch(config)
        count = -(-frames // t) * (height // h) * (width // w)  # pipelines fill the last patch of frames, never a side
        if min(height, width, frames) <= 0 or count <= 0:
            raise DiffAccelError(
                f"{frames} latent frames of {size_text(height, width)} hold no token: sides must be at least "
                f"{size_text(h, w)} latent pixels, with one frame or more. Ask for a larger size."
            )
        return count

    def keeps(self, name: str) -> bool:
        """Return whether the module called ``name`` must stay in high precision."""
        return any(re.match(rf"(?:{pattern})(?:\.|$)", name) for pattern in self.never_quantize)

    def block_names(self, network: nn.Module) -> list[str]:
        """Return the names of the network's blocks, in execution order."""
        names: list[str] = []
        for path in self.blocks:
            module = getattr(uncompiled(network), path, None)
            if isinstance(module, nn.ModuleList):
                names += [f"{path}.{i}" for i in range(len(module))]
            elif module is not None:  # a UNet may have no middle block
                names.append(path)
        return names


# Never quantized in any network: the embedders and the first and last layer, a small share of the work through which
# the whole signal passes (conv_out and conv_in are the most sensitive layers of SDXL-turbo, arXiv 2405.17873), and the
# following.
#
# Norms have no product to quantize. The adaptive ones hold the modulation linears, which run once per sample, where a
# quantized product gains no time, and whose errors shift every feature of a timestep (arXiv 2311.16503).
NORMS = r"(?:.*\.)?(?:\w+_)?norm\w*"
TIME_IN_RESNETS = r".*\.time_emb_proj"  # a UNet's modulation linears


def _square(config: Mapping[str, Any]) -> Patch:
    return 1, config["patch_size"], config["patch_size"]


def _cube(config: Mapping[str, Any]) -> Patch:
    return config.get("patch_size_t") or 1, config["patch_size"], config["patch_size"]


def _as_listed(config: Mapping[str, Any]) -> Patch:
    t, h, w = config["patch_size"]
    return t, h, w


def _packed(config: Mapping[str, Any]) -> Patch:
    return 1, 2, 2  # the pipeline packs 2x2 latent pixels into a token; the network's own patch size is 1


def _pixels(config: Mapping[str, Any]) -> Patch:
    return 1, 1, 1


FACTS: dict[str, Facts] = {
    "FluxTransformer2DModel": Facts(
        blocks=("transformer_blocks", "single_transformer_blocks"),
        attention=r"(?:single_)?transformer_blocks\.\d+\.attn",
        modulation=r"transformer_blocks\.\d+\.norm1(?:_context)?\.linear|single_transformer_blocks\.\d+\.norm\.linear"
        r"|norm_out\.linear",
        never_quantize=("x_embedder", "context_embedder", "time_text_embed", NORMS, "proj_out"),
        patch=_packed,
        text_tokens=512,
        hidden_output=1,  # after the text's
        timestep_range=(0.0, 1.0),  # sigma itself: the network multiplies by 1000
    ),
    "SD3Transformer2DModel": Facts(
        blocks=("transformer_blocks",),
        attention=r"transformer_blocks\.\d+\.attn2?",  # attn2: the image-only attention of SD3.5-medium
        modulation=r"transformer_blocks\.\d+\.norm1(?:_context)?\.linear|norm_out\.linear",
        never_quantize=("pos_embed", "context_embedder", "time_text_embed", NORMS, "proj_out"),
        patch=_square,
        hidden_output=1,  # after the text's
        text_tokens=333,  # 77 of CLIP, 256 of T5
    ),
    "UNet2DConditionModel": Facts(
        blocks=("down_blocks", "mid_block", "up_blocks"),
        attention=r".*\.transformer_blocks\.\d+\.attn[12]",
        modulation=TIME_IN_RESNETS,
        # add_embedding is SDXL's, of pooled text and picture sizes
        never_quantize=("conv_in", "(?:time|add|class)_embedding|encoder_hid_proj", TIME_IN_RESNETS, NORMS, "conv_out"),
        patch=_pixels,
        text_tokens=77,
    ),
    "WanTransformer3DModel": Facts(
        blocks=("blocks",),
        attention=r"blocks\.\d+\.attn[12]",
        modulation=r"condition_embedder\.time_proj",  # shared by all blocks, which only add tables of their own
        never_quantize=("patch_embedding", "condition_embedder", NORMS, "proj_out"),
        patch=_as_listed,
        vae_frames=4,
        text_tokens=512,
    ),
    "HunyuanVideoTransformer3DModel": Facts(
        blocks=("transformer_blocks", "single_transformer_blocks"),
        attention=r"(?:single_)?transformer_blocks\.\d+\.attn",
        modulation=r"transformer_blocks\.\d+\.norm1(?:_context)?\.linear|single_transformer_blocks\.\d+\.norm\.linear"
        r"|context_embedder\.token_refiner\.refiner_blocks\.\d+\.norm_out\.linear|norm_out\.linear",
        # context_embedder counts as an embedder, although it has two small attention blocks over the text
        never_quantize=("x_embedder", "context_embedder", "time_text_embed", NORMS, "proj_out"),
        patch=_cube,
        vae_frames=4,
        text_tokens=256,
    ),
    "CogVideoXTransformer3DModel": Facts(
        blocks=("transformer_blocks",),
        attention=r"transformer_blocks\.\d+\.attn1",
        modulation=r"transformer_blocks\.\d+\.norm[12]\.linear|norm_out\.linear",
        never_quantize=("patch_embed", "(?:time|ofs)_embedding", NORMS, "proj_out"),  # ofs: 1.5, image to video
        patch=_cube,
        vae_frames=4,
        text_tokens=226,
    ),
    "PixArtTransformer2DModel": Facts(
        blocks=("transformer_blocks",),
        attention=r"transformer_blocks\.\d+\.attn[12]",
        modulation=r"adaln_single\.linear",  # shared by all blocks, which only add tables of their own
        never_quantize=("pos_embed", "adaln_single", "caption_projection", NORMS, "proj_out"),
        patch=_square,
        text_tokens=None,  # 120 for Alpha, 300 for Sigma
    ),
    "DiTTransformer2DModel": Facts(
        blocks=("transformer_blocks",),
        attention=r"transformer_blocks\.\d+\.attn1",
        modulation=r"transformer_blocks\.\d+\.norm1\.linear|proj_out_1",
        # every norm1 also holds a time and class embedder; proj_out_1 is the modulation before the last layer
        never_quantize=("pos_embed", NORMS, "proj_out_[12]"),
        patch=_square,
        text_tokens=0,
    ),
    "UNet2DModel": Facts(
        blocks=("down_blocks", "mid_block", "up_blocks"),
        attention=r".*\.attentions\.\d+",
        modulation=TIME_IN_RESNETS,
        never_quantize=("conv_in", "(?:time|class)_embedding", TIME_IN_RESNETS, NORMS, "conv_out"),
        patch=_pixels,
        vae_scale=1,  # works on pixels
        text_tokens=0,
    ),
}
