"""Tiny random pipelines of every family, with real tokenizers, made in memory: nothing is downloaded."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from made_once import made_once
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

# tiny tensors gain nothing from more threads, and lose a lot on a busy machine
torch.set_num_threads(1)

FLOW = ("flux", "sd3")
UNET = ("sdxl", "sd")
FAMILIES = FLOW + UNET
SIZES = {"flux": (32, 48), "sd3": (32, 48), "sdxl": (32, 48), "sd": (32, 48)}


@cache
def clip_tokenizer() -> CLIPTokenizer:
    letters = [chr(c) for c in range(33, 127)]
    vocab = {piece: i for i, piece in enumerate([*letters, *[c + "</w>" for c in letters]])}
    vocab["<|startoftext|>"] = len(vocab)
    vocab["<|endoftext|>"] = len(vocab)
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=24)


@cache
def t5_tokenizer() -> T5TokenizerFast:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(chr(c), -3.0) for c in range(33, 127)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=24)


def _clip_config(**changes: Any) -> CLIPTextConfig:
    tokenizer = clip_tokenizer()
    values = dict(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=37, num_attention_heads=4, num_hidden_layers=2,
        max_position_embeddings=24, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, projection_dim=32,
    )  # fmt: skip
    return CLIPTextConfig(**{**values, **changes})


def _t5() -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(t5_tokenizer()), d_model=32, d_kv=8, d_ff=37, num_layers=2, num_heads=4,
        is_encoder_decoder=False, dropout_rate=0.0,
    )  # fmt: skip
    return T5EncoderModel(config)


def _vae(channels: int, **changes: Any) -> AutoencoderKL:
    values = dict(
        in_channels=3, out_channels=3, block_out_channels=(4, 4, 4, 4), latent_channels=channels, norm_num_groups=2,
        layers_per_block=1, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=0.5,
    )  # fmt: skip
    return AutoencoderKL(**{**values, **changes})


def _stir(module: torch.nn.Module) -> torch.nn.Module:
    """Zero-initialised layers hide mistakes: give every parameter some size."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=draw))
    return module.eval()


@made_once
def flux(guidance_embeds: bool = False, **scheduler: Any) -> FluxPipeline:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=guidance_embeds,
    )  # fmt: skip
    values = {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 16, **scheduler}
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**values),
        vae=_stir(_vae(4, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1)),
        text_encoder=_stir(CLIPTextModel(_clip_config())),
        tokenizer=clip_tokenizer(),
        text_encoder_2=_stir(_t5()),
        tokenizer_2=t5_tokenizer(),
        transformer=_stir(transformer),
    )


@made_once
def sd3() -> StableDiffusion3Pipeline:
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=64, out_channels=4,
        pos_embed_max_size=16,
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=_stir(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_stir(_vae(4, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1)),
        text_encoder=_stir(CLIPTextModelWithProjection(_clip_config())),
        tokenizer=clip_tokenizer(),
        text_encoder_2=_stir(CLIPTextModelWithProjection(_clip_config())),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=_stir(_t5()),
        tokenizer_3=t5_tokenizer(),
    )


TRAINED = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}


def _unet(**changes: Any) -> UNet2DConditionModel:
    values = dict(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=4, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2, norm_num_groups=4, cross_attention_dim=32,
    )  # fmt: skip
    return _stir(UNet2DConditionModel(**{**values, **changes}))


def _up_to_date(scheduler: Any) -> Any:
    """With the settings that StableDiffusionPipeline would otherwise set itself, with a warning."""
    wanted = {"steps_offset": 1, "clip_sample": False}
    scheduler.register_to_config(**{key: value for key, value in wanted.items() if key in scheduler.config})
    return scheduler


def sd(scheduler: Any = None, **unet: Any) -> StableDiffusionPipeline:
    pipe = _sd(**unet)
    if scheduler is not None:
        pipe.scheduler = _up_to_date(scheduler)
    return pipe


@made_once
def _sd(**unet: Any) -> StableDiffusionPipeline:
    torch.manual_seed(0)
    return StableDiffusionPipeline(
        vae=_stir(_vae(4)),
        text_encoder=_stir(CLIPTextModel(_clip_config())),
        tokenizer=clip_tokenizer(),
        unet=_unet(**unet),
        scheduler=_up_to_date(EulerDiscreteScheduler(**TRAINED)),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(scheduler: Any = None) -> StableDiffusionXLPipeline:
    pipe = _sdxl()
    if scheduler is not None:
        pipe.scheduler = scheduler
    return pipe


@made_once
def _sdxl() -> StableDiffusionXLPipeline:
    torch.manual_seed(0)
    unet = _unet(
        addition_embed_type="text_time", addition_time_embed_dim=8, cross_attention_dim=64,
        transformer_layers_per_block=(1, 1), projection_class_embeddings_input_dim=32 + 6 * 8,
        use_linear_projection=True,
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=_stir(_vae(4)),
        text_encoder=_stir(CLIPTextModel(_clip_config())),
        text_encoder_2=_stir(CLIPTextModelWithProjection(_clip_config())),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(**TRAINED, timestep_spacing="leading", steps_offset=1),
        add_watermarker=False,
    )


def ddim(**changes: Any) -> DDIMScheduler:
    return DDIMScheduler(**{**TRAINED, "clip_sample": False, "set_alpha_to_one": True, "steps_offset": 1, **changes})


def make(family: str, **kwargs: Any) -> Any:
    pipe = {"flux": flux, "sd3": sd3, "sdxl": sdxl, "sd": sd}[family](**kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call_kwargs(
    family: str, size: int = 32, guided: bool = True, batch: int = 2, seed: int = 0, steps: int = 4
) -> dict:
    """Arguments of a call with ``batch`` prompts, latents out."""
    kwargs: dict[str, Any] = dict(
        prompt=["a red apple", "two cats"][:batch], height=size, width=size, num_inference_steps=steps,
        output_type="latent", generator=[torch.Generator().manual_seed(seed + i) for i in range(batch)],
    )  # fmt: skip
    if guided:
        kwargs["negative_prompt"] = ["blurry", "low quality"][:batch]
    if family == "flux":
        kwargs["max_sequence_length"] = 24
        kwargs["true_cfg_scale"] = 3.0 if guided else 1.0
    else:
        kwargs["guidance_scale"] = 5.0 if guided else 1.0
        if family == "sd3":
            kwargs["max_sequence_length"] = 24
    return kwargs
