"""Tiny random pipelines that start from an image, fill a hole, follow a ControlNet or look at a picture."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import tiny
import torch
from diffusers import (
    ControlNetModel,
    FluxControlNetModel,
    FluxTransformer2DModel,
    SD3ControlNetModel,
    SD3Transformer2DModel,
)
from made_once import made_once
from torch import Tensor

IMG2IMG = {
    "flux": "FluxImg2ImgPipeline", "sd3": "StableDiffusion3Img2ImgPipeline",
    "sdxl": "StableDiffusionXLImg2ImgPipeline", "sd": "StableDiffusionImg2ImgPipeline",
}  # fmt: skip
INPAINT = {
    "flux": "FluxInpaintPipeline", "sd3": "StableDiffusion3InpaintPipeline",
    "sdxl": "StableDiffusionXLInpaintPipeline", "sdxl9": "StableDiffusionXLInpaintPipeline",
    "fill": "FluxFillPipeline",
}  # fmt: skip
CONTROLNET = {
    "flux": "FluxControlNetPipeline", "sd3": "StableDiffusion3ControlNetPipeline",
    "sdxl": "StableDiffusionXLControlNetPipeline",
}  # fmt: skip
IP_ADAPTER = ("flux", "sdxl", "sd3")
MIXTURES = {
    "FluxControlNetImg2ImgPipeline": "flux", "FluxControlNetInpaintPipeline": "flux",
    "StableDiffusionXLControlNetImg2ImgPipeline": "sdxl", "StableDiffusionXLControlNetInpaintPipeline": "sdxl",
    "StableDiffusionInpaintPipeline": "sd",
}  # fmt: skip


def family_of(case: str) -> str:
    return {"fill": "flux", "sdxl9": "sdxl"}.get(case, case)


def _flux_network(**changes: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    values = dict(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return tiny._stir(FluxTransformer2DModel(**{**values, **changes}))


_SD3 = dict(
    sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
    joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=64, out_channels=4, pos_embed_max_size=16,
)  # fmt: skip
_SDXL = dict(
    addition_embed_type="text_time", addition_time_embed_dim=8, cross_attention_dim=64,
    transformer_layers_per_block=(1, 1), projection_class_embeddings_input_dim=32 + 6 * 8, use_linear_projection=True,
)  # fmt: skip


def _pipeline(name: str, parts: dict[str, Any], **options: Any) -> Any:
    if name.startswith("StableDiffusionXL"):
        options["add_watermarker"] = False
    if name in ("StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline"):
        options["requires_safety_checker"] = False
    accepted = inspect.signature(getattr(diffusers, name).__init__).parameters
    parts = {k: v for k, v in parts.items() if k in accepted}
    pipe = getattr(diffusers, name)(**parts, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def img2img(family: str, **kwargs: Any) -> Any:
    parts = tiny.make(family, **kwargs).components
    return _pipeline(IMG2IMG[family], parts)


@made_once
def inpaint(case: str, **kwargs: Any) -> Any:
    """``sdxl9`` has the mask among its network's channels, ``fill`` too; SD 3 insists on 16 channels."""
    parts = tiny.make(family_of(case), **kwargs).components
    if case == "sdxl9":
        torch.manual_seed(0)
        parts["unet"] = tiny._unet(**_SDXL, in_channels=9)
    if case == "fill":
        parts["transformer"] = _flux_network(in_channels=16 + 16 + 256, out_channels=16)
    if case == "sd3":
        torch.manual_seed(0)
        parts["transformer"] = tiny._stir(SD3Transformer2DModel(**{**_SD3, "in_channels": 16, "out_channels": 16}))
        parts["vae"] = tiny._stir(tiny._vae(16, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1))
    return _pipeline(INPAINT[case], parts)


@made_once
def controlnet(family: str) -> Any:
    parts = tiny.make(family).components
    torch.manual_seed(2)
    if family == "flux":
        net: Any = FluxControlNetModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
        )  # fmt: skip
    elif family == "sd3":
        net = SD3ControlNetModel(**{**_SD3, "num_layers": 1}, force_zeros_for_pooled_projection=False)
    else:
        net = ControlNetModel(
            block_out_channels=(8, 16), layers_per_block=1, in_channels=4, attention_head_dim=2, norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), conditioning_embedding_out_channels=(4, 4, 8, 8),
            **_SDXL,
        )  # fmt: skip
    # a ControlNet starts at zero and would change nothing
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=draw))
    return _pipeline(CONTROLNET[family], parts, controlnet=net.eval())


def mixture(name: str) -> Any:
    """Pipelines that do two of these things at once, and the oldest of all."""
    family = MIXTURES[name]
    return _pipeline(name, (tiny.make("sd") if family == "sd" else controlnet(family)).components)


@made_once
def with_ip_adapter(family: str) -> Any:
    """Make a text-to-image pipeline with one random adapter, attached as ``load_ip_adapter`` attaches it."""
    pipe = tiny.make(family)
    draw = torch.Generator().manual_seed(4)

    def random(*shape: int) -> Tensor:
        return 0.3 * torch.randn(shape, generator=draw)

    if family == "sd3":
        _attach_to_sd3(pipe.transformer, random)
        return pipe
    network = pipe.transformer if family == "flux" else pipe.unet
    width = 32 if family == "flux" else 64  # of the text
    state: dict[str, Any] = {
        "image_proj": {
            "proj.weight": random(4 * width, 32), "proj.bias": random(4 * width), "norm.weight": random(width) + 1,
            "norm.bias": random(width),
        },
        "ip_adapter": {},
    }  # fmt: skip
    if family == "flux":
        for part in ("to_k_ip", "to_v_ip"):
            state["ip_adapter"] |= {f"0.{part}.weight": random(32, width), f"0.{part}.bias": random(32)}
    else:
        crossing = [name for name in network.attn_processors if name.endswith("attn2.processor")]
        for key, name in enumerate(crossing):
            hidden = network.get_submodule(name.removesuffix(".processor")).to_k.weight.shape[0]
            for part in ("to_k_ip", "to_v_ip"):
                state["ip_adapter"][f"{2 * key + 1}.{part}.weight"] = random(hidden, width)
    network._load_ip_adapter_weights([state], low_cpu_mem_usage=False)
    network.eval()
    return pipe


def _attach_to_sd3(network: Any, random: Any) -> None:
    from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
    from diffusers.models.embeddings import IPAdapterTimeImageProjection

    projection = IPAdapterTimeImageProjection(
        embed_dim=32, output_dim=32, hidden_dim=64, depth=1, dim_head=64, heads=1, num_queries=4, timestep_in_dim=16
    )
    processors = {
        name: SD3IPAdapterJointAttnProcessor2_0(
            hidden_size=32, ip_hidden_states_dim=32, head_dim=8, timesteps_emb_dim=64
        )
        for name in network.attn_processors
    }
    with torch.no_grad():
        for module in (projection, *processors.values()):
            for p in module.parameters():
                p.copy_(random(*p.shape))
    network.set_attn_processor(processors)
    network.image_proj = projection.eval()


def picture(size: int, batch: int = 2, seed: int = 11, width: int | None = None) -> Tensor:
    """Pixels in [0, 1]."""
    return torch.rand(batch, 3, size, width or size, generator=torch.Generator().manual_seed(seed))


def hole(size: int, batch: int = 2) -> Tensor:
    mask = torch.zeros(batch, 1, size, size)
    mask[..., size // 4 : 3 * size // 4, : size // 2] = 1
    return mask


def img2img_kwargs(family: str, size: int = 32, strength: float = 0.6, **kwargs: Any) -> dict[str, Any]:
    arguments = tiny.call_kwargs(family, size, **kwargs)
    arguments |= {"image": picture(size, len(arguments["prompt"])), "strength": strength}
    if family in tiny.UNET:
        del arguments["height"], arguments["width"]
    return arguments


def inpaint_kwargs(case: str, size: int = 32, strength: float = 0.6, **kwargs: Any) -> dict[str, Any]:
    arguments = tiny.call_kwargs(family_of(case), size, **kwargs)
    batch = len(arguments["prompt"])
    arguments |= {"image": picture(size, batch), "mask_image": hole(size, batch), "strength": strength}
    if case == "fill":
        arguments.pop("true_cfg_scale")
        arguments.pop("negative_prompt", None)
    return arguments


def controlnet_kwargs(family: str, size: int = 32, **kwargs: Any) -> dict[str, Any]:
    arguments = tiny.call_kwargs(family, size, **kwargs)
    arguments["image" if family == "sdxl" else "control_image"] = picture(size, len(arguments["prompt"]))
    return arguments


def mixture_kwargs(name: str, strength: float = 0.6, **kwargs: Any) -> dict[str, Any]:
    # Flux's take no negative prompt, nor does Fill
    arguments = inpaint_kwargs("fill" if MIXTURES[name] == "flux" else MIXTURES[name], strength=strength, **kwargs)
    if "ControlNet" in name:
        arguments["control_image"] = picture(32, len(arguments["prompt"]), seed=12)
    if "Img2Img" in name:
        del arguments["mask_image"]
    return arguments


def ip_adapter_kwargs(family: str, size: int = 32, guided: bool = True, **kwargs: Any) -> dict[str, Any]:
    """Image embeddings instead of an image, so that no image encoder is needed."""
    arguments = tiny.call_kwargs(family, size, guided, **kwargs)
    draw = torch.Generator().manual_seed(5)
    positive, negative = torch.randn(1, 1, 32, generator=draw), torch.randn(1, 1, 32, generator=draw)
    if family == "flux":
        arguments |= {"ip_adapter_image_embeds": [positive], "negative_ip_adapter_image_embeds": [negative]}
    else:
        both = torch.cat([negative, positive]) if guided else positive
        arguments["ip_adapter_image_embeds"] = both if family == "sd3" else [both]
    return arguments
