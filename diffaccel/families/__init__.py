"""Families of pipelines, looked up by the pipeline's class or one of its bases."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffaccel.families.base import Family

# class name in diffusers: module and class in this package
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

# those that searches follow; other samplers run in the own loop of the pipeline, or are told by watching it
INPAINTING = {
    "StableDiffusionInpaintPipeline": "inpaint:SDInpaint",
    "StableDiffusionXLInpaintPipeline": "inpaint:SDXLInpaint",
    "StableDiffusion3InpaintPipeline": "inpaint:SD3Inpaint",
    "FluxInpaintPipeline": "inpaint:FluxInpaint",
    "FluxFillPipeline": "inpaint:FluxFill",
}


def find(pipe: Any) -> Family | None:
    """Return the family of a pipeline or None; a subclass belongs to the family of its nearest listed base."""
    return _listed(pipe, FAMILIES)


def find_for_search(pipe: Any) -> Family | None:
    """Return the family by which a search follows a pipeline or None: :func:`find`, or one of inpainting."""
    return _listed(pipe, FAMILIES) or _listed(pipe, INPAINTING)


def _listed(pipe: Any, families: dict[str, str]) -> Family | None:
    for cls in type(pipe).__mro__:
        if cls.__name__ in families:
            module, _, name = families[cls.__name__].partition(":")
            return getattr(import_module(f"diffaccel.families.{module}"), name)()
    return None


def networks(pipe: Any) -> list[Any]:
    """Return the networks that a pipeline evaluates: the one of the first step, then those that replace it later."""
    if (family := find(pipe)) is not None:
        return list(family.networks(pipe).values())
    modules = [getattr(pipe, name, None) for name in ("transformer", "unet")]
    return [module for module in modules if module is not None][:1]


def network(pipe: Any) -> Any:
    """Return the first of :func:`networks`, or None."""
    return next(iter(networks(pipe)), None)
