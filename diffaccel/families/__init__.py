"""Pipeline families, found by the pipeline's class or one of its bases."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffaccel.families.base import Family

# diffusers class name -> module and class here
FAMILIES = {
    "FluxPipeline": "flux:Flux",
    "FluxImg2ImgPipeline": "flux:Flux",
    "StableDiffusion3Pipeline": "sd3:SD3",
    "StableDiffusion3Img2ImgPipeline": "sd3:SD3",
    "StableDiffusionXLPipeline": "sdxl:SDXL",
    "StableDiffusionXLImg2ImgPipeline": "sdxl:SDXLImg2Img",
    "StableDiffusionPipeline": "sd:SD",
    "StableDiffusionImg2ImgPipeline": "sd:SDImg2Img",
    "WanPipeline": "wan:Wan",
    "HunyuanVideoPipeline": "hunyuan_video:HunyuanVideo",
    "CogVideoXPipeline": "cogvideox:CogVideoX",
    "PixArtSigmaPipeline": "pixart:PixArt",
    "PixArtAlphaPipeline": "pixart:PixArt",
    "DiTPipeline": "dit:DiT",
    "DDPMPipeline": "pixels:Pixels",
    "DDIMPipeline": "pixels:Pixels",
}


def find(pipe: Any) -> Family | None:
    """The family of a pipeline, or None. A subclass belongs to the family of its nearest listed base."""
    for cls in type(pipe).__mro__:
        if cls.__name__ in FAMILIES:
            module, _, name = FAMILIES[cls.__name__].partition(":")
            return getattr(import_module(f"diffaccel.families.{module}"), name)()
    return None


def networks(pipe: Any) -> list[Any]:
    """The network that a pipeline evaluates at every step, first; then others that take its place at some steps."""
    if (family := find(pipe)) is not None:
        return list(family.networks(pipe).values())
    found = [module for name in ("transformer", "unet") if (module := getattr(pipe, name, None)) is not None]
    return found[:1]


def network(pipe: Any) -> Any:
    """The first of :func:`networks`, or None."""
    return next(iter(networks(pipe)), None)
