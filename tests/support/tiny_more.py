"""Tiny random pipelines of the video, transformer and pixel families, beside those of tiny.py."""

from __future__ import annotations

from functools import cache
from typing import Any

import tiny
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    UNet2DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from made_once import made_once
from transformers import CLIPTextModel, LlamaConfig, LlamaModel, LlamaTokenizerFast

VIDEO = ("wan", "wan22", "wan5b", "hunyuan", "cogvideox", "cogvideox15")
TEXT = (*VIDEO, "pixart", "pixart_alpha")
SIZELESS = ("dit", "ddpm", "ddim")
FAMILIES = TEXT + SIZELESS
OWN_EULER = ("hunyuan",)  # whose stock scheduler is Euler itself


def _wan_transformer(seed: int = 0, **changes: Any) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    values = dict(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16,
        text_dim=32, freq_dim=32, ffn_dim=32, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
        rope_max_seq_len=32,
    )  # fmt: skip
    return tiny._stir(WanTransformer3DModel(**{**values, **changes}))


@made_once
def wan(kind: str = "2.1", scheduler: Any = None) -> WanPipeline:
    """2.1, the two networks of "2.2", or "5b" with its time per token."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )
    extra: dict[str, Any] = {}
    if kind == "2.2":
        extra = {"transformer_2": _wan_transformer(1), "boundary_ratio": 0.875}
    if kind == "5b":
        extra = {"expand_timesteps": True}
    flow = dict(prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0)
    return WanPipeline(
        tokenizer=tiny.t5_tokenizer(),
        text_encoder=tiny._stir(tiny._t5()),
        vae=tiny._stir(vae),
        scheduler=scheduler or UniPCMultistepScheduler(**flow),
        transformer=_wan_transformer(),
        **extra,
    )


@cache
def llama_tokenizer() -> LlamaTokenizerFast:
    pieces = ["<unk>", "<s>", "</s>", "▁", *[chr(c) for c in range(33, 127)], "\n"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = LlamaTokenizerFast(vocab=vocab, merges=[])
    tokenizer.pad_token = "</s>"
    return tokenizer


@made_once
def hunyuan(guidance_embeds: bool = True) -> HunyuanVideoPipeline:
    torch.manual_seed(0)
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, patch_size=1, patch_size_t=1, guidance_embeds=guidance_embeds,
        text_embed_dim=16, pooled_projection_dim=32, rope_axes_dim=(2, 4, 4),
    )  # fmt: skip
    vae = AutoencoderKLHunyuanVideo(
        in_channels=3, out_channels=3, latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4, up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, act_fn="silu", norm_num_groups=4, scaling_factor=0.476986,
        spatial_compression_ratio=8, temporal_compression_ratio=4, mid_block_add_attention=True,
    )  # fmt: skip
    llama = LlamaConfig(
        vocab_size=len(llama_tokenizer()), hidden_size=16, intermediate_size=37, num_attention_heads=4,
        num_hidden_layers=3, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    return HunyuanVideoPipeline(
        text_encoder=tiny._stir(LlamaModel(llama)),
        tokenizer=llama_tokenizer(),
        transformer=tiny._stir(transformer),
        vae=tiny._stir(vae),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=tiny._stir(CLIPTextModel(tiny._clip_config(max_position_embeddings=77))),
        tokenizer_2=tiny.clip_tokenizer(),
    )


@made_once
def cogvideox(version: str = "1.0", dpm: bool = False) -> CogVideoXPipeline:
    torch.manual_seed(0)
    later = {"patch_size_t": 2, "patch_bias": False} if version == "1.5" else {}
    transformer = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=2,
        text_embed_dim=32, num_layers=1, sample_width=8, sample_height=8, sample_frames=9, patch_size=2,
        temporal_compression_ratio=4, max_text_seq_length=16, use_rotary_positional_embeddings=True, **later,
    )  # fmt: skip
    vae = AutoencoderKLCogVideoX(
        in_channels=3, out_channels=3, down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4, block_out_channels=(8, 8, 8, 8), latent_channels=4,
        layers_per_block=1, norm_num_groups=2, temporal_compression_ratio=4,
    )  # fmt: skip
    kind = CogVideoXDPMScheduler if dpm else CogVideoXDDIMScheduler
    scheduler = kind(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, prediction_type="v_prediction",
        rescale_betas_zero_snr=True, snr_shift_scale=1.0, timestep_spacing="trailing", clip_sample=False,
    )  # fmt: skip
    return CogVideoXPipeline(
        tokenizer=tiny.t5_tokenizer(),
        text_encoder=tiny._stir(tiny._t5()),
        vae=tiny._stir(vae),
        transformer=tiny._stir(transformer),
        scheduler=scheduler,
    )


@made_once
def pixart(alpha: bool = False, scheduler: Any = None) -> PixArtSigmaPipeline | PixArtAlphaPipeline:
    torch.manual_seed(0)
    transformer = PixArtTransformer2DModel(
        sample_size=128 if alpha else 8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3,
        caption_channels=32, in_channels=4, cross_attention_dim=24, out_channels=8, attention_bias=True,
        norm_elementwise_affine=False,
        norm_type="ada_norm_single", use_additional_conditions=alpha,
    )  # fmt: skip
    return (PixArtAlphaPipeline if alpha else PixArtSigmaPipeline)(
        tokenizer=tiny.t5_tokenizer(),
        text_encoder=tiny._stir(tiny._t5()),
        vae=tiny._stir(tiny._vae(4)),
        transformer=tiny._stir(transformer),
        scheduler=scheduler or DPMSolverMultistepScheduler(),
    )


@made_once
def dit(scheduler: Any = None) -> DiTPipeline:
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        sample_size=4, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=2, in_channels=4,
        out_channels=8, attention_bias=True, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero", norm_elementwise_affine=False,
    )  # fmt: skip
    return DiTPipeline(
        transformer=tiny._stir(transformer),
        vae=tiny._stir(tiny._vae(4)),
        scheduler=scheduler or DDIMScheduler(clip_sample=False),
        id2label={0: "tench", 1: "goldfish, Carassius auratus", 2: "white shark"},
    )


def _unet() -> UNet2DModel:
    torch.manual_seed(0)
    return tiny._stir(
        UNet2DModel(
            block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=4, sample_size=8, in_channels=3,
            out_channels=3, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )
    )  # fmt: skip


@made_once
def ddpm(clip_sample: bool = True) -> DDPMPipeline:
    return DDPMPipeline(unet=_unet(), scheduler=DDPMScheduler(clip_sample=clip_sample))


@made_once
def ddim_pipeline(clip_sample: bool = True) -> DDIMPipeline:
    return DDIMPipeline(unet=_unet(), scheduler=DDIMScheduler(clip_sample=clip_sample))


MAKERS = {
    "wan": wan,
    "wan22": lambda: wan("2.2"),
    "wan5b": lambda: wan("5b"),
    "hunyuan": hunyuan,
    "cogvideox": cogvideox,
    "cogvideox15": lambda: cogvideox("1.5"),
    "pixart": pixart,
    "pixart_alpha": lambda: pixart(alpha=True),
    "dit": dit,
    "ddpm": ddpm,
    "ddim": ddim_pipeline,
}


def make(family: str, **kwargs: Any) -> Any:
    pipe = MAKERS[family](**kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call_kwargs(
    family: str, size: int = 32, guided: bool = True, batch: int = 2, seed: int = 0, steps: int = 4
) -> dict:
    """Return arguments of a call with ``batch`` samples; latents out where the pipeline gives them."""
    generators = [torch.Generator().manual_seed(seed + i) for i in range(batch)]
    kwargs: dict[str, Any] = {"num_inference_steps": steps, "generator": generators}
    if family in ("ddpm", "ddim"):
        return {**kwargs, "batch_size": batch, "output_type": "pt"}
    kwargs["guidance_scale"] = 5.0 if guided else 1.0
    if family == "dit":
        return {**kwargs, "class_labels": [1, 207][:batch], "output_type": "pt"}
    kwargs |= {"prompt": ["a red apple", "two cats"][:batch], "output_type": "latent", "height": size, "width": size}
    if guided and family.startswith("pixart"):
        kwargs["negative_prompt"] = "blurry"
    elif guided:
        kwargs["negative_prompt"] = ["blurry", "low quality"][:batch]
    if family in VIDEO:
        kwargs |= {"num_frames": 5, "max_sequence_length": 16}
    else:
        kwargs |= {"max_sequence_length": 16, "use_resolution_binning": False, "clean_caption": False}
    if family == "hunyuan":
        kwargs["true_cfg_scale"] = 3.0 if guided else 1.0
    return kwargs


def result(output: Any) -> torch.Tensor:
    """Return a pipeline's output as a tensor."""
    frames = output.frames if hasattr(output, "frames") else output.images
    return frames if isinstance(frames, torch.Tensor) else torch.as_tensor(frames)
